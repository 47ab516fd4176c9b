"""The trunk that all networks share: torso and optional memory, and the settings that shape them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from slipstream import ranges, tree
from slipstream.nets.check import check_torso
from slipstream.nets.initialize import Init, initialise
from slipstream.nets.recurrent import Core, State
from slipstream.nets.torso import Activation, Torso, TorsoName
from slipstream.tree import Tree
from slipstream.types import EnvSpec

Precision = Literal["float32", "bfloat16", "auto"]


@dataclass(frozen=True)
class Network:
    """Shape of the networks.

    Attributes:
        torso: Network for image observations; `auto` is `nature_cnn` for images of at least 36x36 pixels and `mlp` for
            everything else.
        hidden: Layer sizes of the perceptron that sees everything that is no image.
        activation: Activation of that perceptron.
        core: Memory between rows.
        core_size: Size of the recurrent state.
        init: Initial weights: `orthogonal` (gains sqrt(2), 0.01 for the policy head, 1 for the value head), `paac`
            (uniform in +-1/sqrt(fan_in)), `default` (torch's).
        share_torso: Whether policy and value share torso and core.
        precision: Arithmetic of the torso, of a layer of a head that stands in for one of it, and of a decoder;
            parameters, core, other layers of heads, and losses stay float32. `bfloat16` is about 1.6 times as fast on
            GPUs, with AMX, and with AVX-512 BF16 on AMD's processors, and slower than `float32` elsewhere; `auto` is
            the faster one of this machine, and is written down as what it stands for.
        normalize_obs: Whether float vectors are brought to mean 0 and variance 1 by running statistics, a part of the
            policy.
        log_std_init: Logarithm of the initial standard deviation of continuous actions.
        latent: Size of a linear bottleneck after the torso; 0 for none.
        latent_from_rl: Whether the losses of policy and value reach the torso; if not, an auto-encoder alone shapes it.
    """

    torso: TorsoName = "auto"
    hidden: tuple[int, ...] = (64, 64)
    activation: Activation = "tanh"
    core: Literal["none", "lstm", "gru"] = "none"
    core_size: int = 256
    init: Init = "orthogonal"
    share_torso: bool = True
    precision: Precision = "float32"
    normalize_obs: bool = False
    log_std_init: float = 0.0
    latent: int = 0
    latent_from_rl: bool = True

    def __post_init__(self) -> None:
        """Refuses numbers that mean nothing."""
        if any(size < 1 for size in self.hidden):
            raise ValueError(f"net.hidden must be sizes of at least 1, got {self.hidden}")
        ranges.at_least(self, "net.", 1, "core_size")
        ranges.at_least(self, "net.", 0, "latent")
        ranges.finite(self, "net.", "log_std_init")


def in_bfloat16(device: torch.device, enabled: bool) -> AbstractContextManager[object]:
    """Has products within computed in bfloat16, or, if not `enabled`, in the dtype of what goes in.

    Casts are not kept: each weight is used once, and threads that share a cache could find a cast without its history.
    """
    if not enabled and not torch.is_autocast_enabled(device.type):
        return nullcontext()  # a context that changes nothing takes as long as a small layer
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


class Encoded(NamedTuple):
    """What a trunk makes of flat rows before any memory.

    Attributes:
        features: float32 `[N, F]`, of the torso.
        latent: float32 `[N, L]`, what the heads (or the core) see: a linear map of the features, or themselves.
    """

    features: Tensor
    latent: Tensor


class Packs(nn.Module, ABC):
    """A module that can keep weights in another form than that in which they are learned."""

    @abstractmethod
    def pack(self) -> None:
        """Keeps weights as products take them, so that a forward casts none; gradients are over.

        Nothing that comes out changes.
        """


class Trunk(Packs):
    """Torso, optional bottleneck, optional core: observations `[N, *O]` to features `[N, F]`.

    Args:
        spec: What the environments show.
        network: Shape of the networks.
        torso: A user's own torso instead of `network.torso`; its weights are left as they come.
        stem: Whether to stop before the torso's last linear layers, for heads that bring their own. A user's own torso
            is left whole, and so is one that a core follows.

    Attributes:
        features: F.
        cut: Whether layers were left out.
        width: F of the whole trunk: outputs of the layers that were left out, or F where none was.
        encoded: Sizes of what `encode` gives: features of the torso, and the latent.

    Raises:
        ValueError: A stem is to have a bottleneck, or the precision is `auto`, which depends on the machine.
    """

    def __init__(self, spec: EnvSpec, network: Network, torso: nn.Module | None, stem: bool = False) -> None:
        super().__init__()
        space = spec.observation_space
        self.torso: nn.Module
        if torso is None:
            self.torso = own = Torso(space, network.torso, network.hidden, network.activation)
            initialise(own, network.init)
        else:
            self.torso, own = torso, None
        if network.precision == "auto":
            raise ValueError("net.precision=auto is for configurations; a network is given float32 or bfloat16")
        self._bfloat16 = network.precision == "bfloat16"
        self.features = self.width = check_torso(self.torso, space)
        self.cut = False
        self.encoded = (self.features, network.latent or self.features)
        self._detached = not network.latent_from_rl
        self.latent = nn.Linear(self.features, network.latent) if network.latent else None
        if self.latent is not None:
            if stem:
                raise ValueError(
                    "net.latent is a bottleneck after the torso; dueling and noisy heads take its place: set 0"
                )
            initialise(self.latent, network.init, gain=1.0)
            self.features = self.width = network.latent
        self.core = None if network.core == "none" else Core(network.core, self.features, network.core_size)
        if self.core is not None:
            initialise(self.core, network.init)
            self.features = self.width = network.core_size
        elif stem and own is not None:
            own.cut()
            self.cut = True
            self.features = check_torso(own, space)

    @property
    def perceptron(self) -> nn.Sequential | None:
        """All that there is, in float32, if it is a perceptron over one vector of floats."""
        torso = self.torso
        whole = not (self._bfloat16 or self.latent or self.core)
        return torso.perceptron if whole and type(torso) is Torso else None  # a subclass may see otherwise

    def initial_state(self, columns: int) -> State:
        """State of the core, or an empty tuple."""
        return () if self.core is None else self.core.initial_state(columns)

    @torch.no_grad()
    def pack(self) -> None:
        """Packs the torso.

        A user's own torso is left alone: its forward may do anything with its weights.
        """
        if self._bfloat16 and isinstance(self.torso, Torso):
            for layer in self.torso.modules():
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    layer.to(torch.bfloat16)

    def forward(self, flat: Tree, state: State, first: Tensor | None) -> tuple[Tensor, State]:
        """Features of flat rows; with `first[T, B]` they are unrolled, without it they are one row `[B]`."""
        return self.remember(self.encode(flat).latent, state, first)

    def encode(self, flat: Tree) -> Encoded:
        """What torso and bottleneck make of flat rows `[N, *O]`."""
        # The rest stays in float32: a log-probability in bfloat16 has two digits.
        with in_bfloat16(tree.leaves(flat)[0].device, self._bfloat16):
            features = self.torso(flat).float()
        return Encoded(features, features if self.latent is None else self.latent(features))

    def remember(self, latent: Tensor, state: State, first: Tensor | None) -> tuple[Tensor, State]:
        """What the core makes of flat latents `[N, L]`: they themselves without a core."""
        if self._detached:
            latent = latent.detach()
        if self.core is None:
            return latent, state
        if first is None:
            return self.core.step(latent, state)
        output, state = self.core(latent.unflatten(0, first.shape), state, first)
        return output.flatten(0, 1), state


Module = TypeVar("Module")


def packed(policy: Module) -> Module:
    """A copy of a policy to act with, whose modules are packed; `copy_into` brings it up to date."""
    replica = copy.deepcopy(policy)
    if isinstance(replica, nn.Module):
        for module in replica.modules():
            if isinstance(module, Packs):
                module.pack()
    return replica
