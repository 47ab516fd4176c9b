"""Action distributions: described by a flat head output, sampled from given uniform numbers.

A policy head emits `params[..., P]`; the collector hands in `u[..., D]`, uniform in `[0, 1)` and multiples of 2**-23
(see `slipstream.dice`), so that the same numbers always choose the same action. All arithmetic is float32, whatever
the precision of the network. Discrete actions count from 0; environments add the start of their space.

Leading dimensions `...` are `[B]`, `[N]` or `[T, B]`. Log-probabilities, entropies and divergences are sums over the
dimensions of an action, in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol, Self, final

import numpy as np
import torch
from gymnasium import Space, spaces
from numpy.typing import NDArray
from torch import Tensor

_LOWEST = torch.finfo(torch.float32).min


class Distribution(Protocol):
    """What a policy says about its next action, for every row of `...`."""

    def sample(self, u: Tensor) -> Tensor:
        """Action `[..., *A]` chosen by the uniform numbers `u[..., D]`."""
        ...

    def mode(self) -> Tensor:
        """Most probable action `[..., *A]`."""
        ...

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probability (density for continuous actions) of `action[..., *A]`, float32 `[...]`."""
        ...

    def entropy(self) -> Tensor:
        """Entropy, float32 `[...]`."""
        ...

    def kl(self, other: Self) -> Tensor:
        """KL(self || other), float32 `[...]`."""
        ...

    def params(self) -> Tensor:
        """What describes it, float32 `[..., P]`, masks included: `like(params())` is the same distribution."""
        ...

    def like(self, params: Tensor) -> Self:
        """The distribution of this kind that `params[..., P]` describes."""
        ...


@final
class Categorical:
    """One choice out of A.

    Args:
        logits: `[..., A]`, any float dtype.
        mask: bool `[..., A]`, True where the action is allowed; a masked action has probability exactly 0 and is never
            drawn. A row that allows nothing counts as unmasked: environments send such rows with the observation that
            ends an episode, where no action will be used.
    """

    def __init__(self, logits: Tensor, mask: Tensor | None = None) -> None:
        logits = logits.float()
        if mask is not None:
            logits = torch.where(mask | ~mask.any(-1, keepdim=True), logits, _LOWEST)
        self.log_probs = logits.log_softmax(-1)

    def sample(self, u: Tensor) -> Tensor:
        """Action int64 `[...]`: inverse of the cumulative distribution at `u[..., 1]`.

        The draw is the first action that is possible and whose cumulative probability exceeds `u * total`. It exists:
        `u <= 1 - 2**-23`, so `u * total < total` after rounding too.
        """
        if self.log_probs.is_cpu:  # by NumPy, which takes a third of PyTorch's time for the rows of a lane
            return torch.from_numpy(drawn(self.log_probs.detach().numpy(), u.numpy()))
        return drawn_there(self.log_probs, u)

    def mode(self) -> Tensor:
        """Most probable action, int64 `[...]`; the first one of equals."""
        return self.log_probs.argmax(-1)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probability of `action`, int64 `[...]`."""
        return self.log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        """Entropy, float32 `[...]`."""
        return -(self.log_probs.exp() * self.log_probs).sum(-1)

    def kl(self, other: Categorical) -> Tensor:
        """KL(self || other), float32 `[...]`; huge where `other` rules out what `self` allows."""
        return (self.log_probs.exp() * (self.log_probs - other.log_probs)).sum(-1)

    def params(self) -> Tensor:
        """Log-probabilities, float32 `[..., A]`."""
        return self.log_probs

    def like(self, params: Tensor) -> Categorical:
        """The distribution of these log-probabilities."""
        return Categorical(params)


@final
class MultiCategorical:
    """K independent choices, out of `sizes[k]` each.

    Computed as one `Categorical` over `[..., K, max(sizes)]` whose surplus places are impossible.

    Args:
        logits: `[..., sum(sizes)]`, the choices one after the other.
        sizes: Number of options of each choice.
        mask: bool `[..., sum(sizes)]`, as in `Categorical`, choice by choice.
        shape: Shape of one action; `(K,)` if empty.
    """

    def __init__(
        self,
        logits: Tensor,
        sizes: tuple[int, ...],
        mask: Tensor | None = None,
        shape: tuple[int, ...] = (),
    ) -> None:
        self.sizes = sizes
        self.shape = shape or (len(sizes),)
        self.choices = Categorical(
            _padded(logits.float(), sizes, _LOWEST), None if mask is None else _padded(mask, sizes, False)
        )

    def sample(self, u: Tensor) -> Tensor:
        """Action int64 `[..., *shape]` chosen by `u[..., K]`."""
        return self.choices.sample(u.unsqueeze(-1)).unflatten(-1, self.shape)

    def mode(self) -> Tensor:
        """Most probable action, int64 `[..., *shape]`."""
        return self.choices.mode().unflatten(-1, self.shape)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probability of `action`, int64 `[..., *shape]`."""
        return self.choices.log_prob(action.flatten(-len(self.shape))).sum(-1)

    def entropy(self) -> Tensor:
        """Sum of the entropies of the choices, float32 `[...]`."""
        return self.choices.entropy().sum(-1)

    def kl(self, other: MultiCategorical) -> Tensor:
        """KL(self || other), float32 `[...]`."""
        return self.choices.kl(other.choices).sum(-1)

    def params(self) -> Tensor:
        """Log-probabilities, float32 `[..., sum(sizes)]`, the choices one after the other."""
        padded = self.choices.log_probs.flatten(-2)
        return padded.index_select(-1, _places(self.sizes, padded.device))

    def like(self, params: Tensor) -> MultiCategorical:
        """The distribution of these log-probabilities."""
        return MultiCategorical(params, self.sizes, None, self.shape)


@final
class DiagGaussian:
    """Independent normal distributions, one per dimension of a continuous action; not squashed, not clipped.

    Args:
        mean: `[..., prod(shape)]`, any float dtype.
        log_std: `[..., prod(shape)]`, any float dtype.
        shape: Shape of one action; `(prod,)` if empty.
    """

    def __init__(self, mean: Tensor, log_std: Tensor, shape: tuple[int, ...] = ()) -> None:
        self.mean = mean.float()
        self.log_std = log_std.float()
        self.shape = shape or tuple(mean.shape[-1:])

    def sample(self, u: Tensor) -> Tensor:
        """Action float32 `[..., *shape]`: `mean + std * Phi^-1(u + 2**-24)`.

        Half a step is added to `u` so that both ends stay finite and as far from the middle (5.3 standard deviations).
        """
        noise = torch.special.ndtri(u + 2.0**-24)
        return (self.mean + self.log_std.exp() * noise).unflatten(-1, self.shape)

    def mode(self) -> Tensor:
        """The mean, float32 `[..., *shape]`."""
        return self.mean.unflatten(-1, self.shape)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-density of `action`, float32 `[..., *shape]`."""
        z = (action.flatten(-len(self.shape)) - self.mean) * (-self.log_std).exp()
        return (-0.5 * z.square() - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        """Differential entropy, float32 `[...]`."""
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def kl(self, other: DiagGaussian) -> Tensor:
        """KL(self || other), float32 `[...]`."""
        ratio = self.log_std - other.log_std
        distance = (self.mean - other.mean) * (-other.log_std).exp()
        return (0.5 * ((2 * ratio).exp() + distance.square() - 1.0) - ratio).sum(-1)

    def params(self) -> Tensor:
        """Means, then logarithms of standard deviations, float32 `[..., 2 D]`."""
        return torch.cat([self.mean, self.log_std.expand_as(self.mean)], dim=-1)

    def like(self, params: Tensor) -> DiagGaussian:
        """The distribution of these means and deviations."""
        mean, log_std = params.chunk(2, dim=-1)
        return DiagGaussian(mean, log_std, self.shape)


@dataclass(frozen=True)
class ActionHead:
    """How the actions of a space are parameterised and drawn.

    Attributes:
        family: `categorical` (Discrete), `multi_categorical` (MultiDiscrete) or `diag_gaussian` (Box).
        action_shape: Shape of one action, `*A`.
        sizes: Options of each choice; empty for `diag_gaussian`.
    """

    family: Literal["categorical", "multi_categorical", "diag_gaussian"]
    action_shape: tuple[int, ...]
    sizes: tuple[int, ...] = ()

    @property
    def num_params(self) -> int:
        """P: logits one after the other, or means and then logarithms of standard deviations."""
        return 2 * math.prod(self.action_shape) if self.family == "diag_gaussian" else sum(self.sizes)

    @property
    def num_uniforms(self) -> int:
        """D: uniform numbers that choose one action."""
        return math.prod(self.action_shape)

    @property
    def action_dtype(self) -> torch.dtype:
        """Float32 for `diag_gaussian`, otherwise int64."""
        return torch.float32 if self.family == "diag_gaussian" else torch.int64

    def distribution(self, params: Tensor, mask: Tensor | None = None) -> Distribution:
        """The distribution that `params[..., P]` describes.

        Args:
            params: `[..., P]`, any float dtype.
            mask: bool `[..., P]`, True where allowed; only for discrete actions.

        Raises:
            ValueError: A mask was given for continuous actions.
        """
        match self.family:
            case "categorical":
                return Categorical(params, mask)
            case "multi_categorical":
                return MultiCategorical(params, self.sizes, mask, self.action_shape)
            case "diag_gaussian":
                if mask is not None:
                    raise ValueError("action_mask: continuous actions can't be masked; remove it from the observation")
                mean, log_std = params.chunk(2, dim=-1)
                return DiagGaussian(mean, log_std, self.action_shape)


def distribution_of(space: Space[Any]) -> ActionHead:
    """The head for an action space.

    Raises:
        ValueError: The space is not Discrete, MultiDiscrete or a Box of floats.
    """
    match space:
        case spaces.Discrete():
            return ActionHead("categorical", (), (int(space.n),))
        case spaces.MultiDiscrete():
            sizes = tuple(int(size) for size in space.nvec.flat)
            return ActionHead("multi_categorical", space.nvec.shape, sizes)
        case spaces.Box() if np.issubdtype(space.dtype, np.floating) and math.prod(space.shape):
            return ActionHead("diag_gaussian", space.shape)
        case _:
            raise ValueError(
                f"action space {space}: expected Discrete, MultiDiscrete or a Box of floats with at least one entry; "
                "flatten or convert it with a gymnasium.ActionWrapper"
            )


def drawn(log_probs: NDArray[np.float32], u: NDArray[np.float32]) -> NDArray[np.int64]:
    """What `Categorical.sample` draws, int64 `[...]`, from `log_probs[..., A]` by `u[..., 1]`."""
    probs = np.exp(log_probs)
    cumulative = np.where(probs > 0, probs.cumsum(-1), 0.0)
    return np.asarray((cumulative > u * cumulative.max(-1, keepdims=True)).argmax(-1))


def drawn_there(log_probs: Tensor, u: Tensor) -> Tensor:
    """The same on the device of tensors."""
    probs = log_probs.exp()
    cumulative = torch.where(probs > 0, probs.cumsum(-1), 0.0)
    hit = cumulative > u * cumulative.amax(-1, keepdim=True)
    return hit.byte().argmax(-1)


def _padded(flat: Tensor, sizes: tuple[int, ...], fill: float | bool) -> Tensor:
    """`flat[..., sum(sizes)]` as `[..., K, max(sizes)]`; places past a size hold `fill`."""
    base = flat.new_full((*flat.shape[:-1], len(sizes) * max(sizes)), fill)
    return base.index_copy(-1, _places(sizes, flat.device), flat).unflatten(-1, (len(sizes), max(sizes)))


@lru_cache
def _places(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each entry of the flat form goes in the padded form, int64 `[sum(sizes)]`."""
    places = [row * max(sizes) + column for row, size in enumerate(sizes) for column in range(size)]
    with torch.inference_mode(False):  # it is kept, and a tensor made in inference mode could not be learned with later
        return torch.tensor(places, device=device)
