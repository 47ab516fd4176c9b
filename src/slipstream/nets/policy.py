"""What the library asks of policies: to act; where they are judged as actor-critics, to unroll; to explore by slot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from slipstream.nets.trunk import Encoded
from slipstream.ops.distributions import Distribution
from slipstream.tree import Tree
from slipstream.types import Act


class Outputs(NamedTuple):
    """What a policy says about rows it is shown.

    Attributes:
        distribution: Over actions, for every row.
        value: float32, one per row.
        encoded: What the heads were given, flat `[N, ...]` in the order of the rows, for an auto-encoder; None where a
            policy does not tell.
    """

    distribution: Distribution
    value: Tensor
    encoded: Encoded | None = None


class Policy(Protocol):
    """What acting asks of a policy: an `nn.Module` with the members below.

    Attributes:
        dice_width: D, uniform numbers that `act` needs per slot.
        recurrent: Whether there is a state, so that rows must be unrolled in order.
    """

    dice_width: int
    recurrent: bool

    def initial_state(self, batch: int) -> Tree:
        """State `[batch, ...]` at the start of an episode: zeros, or an empty tuple for a feed-forward policy."""
        ...

    def act(self, obs: Tree, state: Tree, dice: Tensor, greedy: bool = False, slot: Tensor | None = None) -> Act:
        """Actions for `B` slots, without gradient.

        Args:
            obs: Tree `[B, *O]`.
            state: Tree `[B, ...]`, zeroed by the caller in slots where an episode starts.
            dice: float32 `[B, D]`, uniform in `[0, 1)`, multiples of 2**-23.
            greedy: Whether to take the most probable action instead of a draw.
            slot: int64 `[B]`, the slots that collect, for policies that explore by slot; None where nobody learns from
                the actions (evaluation).
        """
        ...

    def observe(self, obs: Tree, valid: Tensor) -> None:
        """Takes the observations `[T, B, *O]` of an update into account, where the policy keeps statistics of them."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """As `nn.Module`."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As `nn.Module`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """As `nn.Module`."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any:
        """As `nn.Module`."""
        ...

    def to(self, device: torch.device) -> Self:
        """As `nn.Module`."""
        ...


class ActorCriticPolicy(Policy, Protocol):
    """A policy that can judge what it is shown, as actor-critic algorithms want it."""

    def unroll(self, obs: Tree, state0: Tree, first: Tensor | None) -> Outputs:
        """Distributions and values of rows `[T, B]`, or of flat rows `[N]` if the policy is feed-forward.

        Args:
            obs: Tree `[T, B, *O]` or `[N, *O]`.
            state0: Tree `[B, ...]`, state before row 0.
            first: bool `[T, B]`, rows at which an episode starts, from a state of zeros.
        """
        ...


class ExploringPolicy(Policy, Protocol):
    """A policy that explores by slot, as algorithms that learn from replays want it.

    Attributes:
        exploration: float32 `[num_envs]`, a buffer: the probability of a uniformly random action, by slot. The learner
            sets it, and it is published with the weights.
        noise_width: W, uniform numbers that `renoise` takes; 0 for a policy without noisy layers.
    """

    exploration: Tensor
    noise_width: int

    def renoise(self, dice: Tensor) -> None:
        """Draws the noise of noisy layers anew from uniform numbers in `[0, 1)`, multiples of 2**-23.

        Args:
            dice: float32 `[W]` for gradients, or `[num_envs, W]` for all slots that collect.
        """
        ...
