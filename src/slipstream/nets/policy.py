"""The actor-critic: torso, optional recurrent core, policy head and value head behind one small contract.

    trunk(o) = core(torso(normalise(o)))        pi = policy_head(trunk(o))        V = value_head(trunk'(o))

where trunk' is the same trunk, or a second one with `share_torso=False`. The same forward serves rows `[T, B]`, flat
samples `[N]` and the `[B]` slots of a lane.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from slipstream import ranges, tree
from slipstream.nets.check import check_torso
from slipstream.nets.initialize import Init, initialise, keyed_initialisation
from slipstream.nets.recurrent import Core, State
from slipstream.nets.torso import Activation, Torso, TorsoName
from slipstream.ops.distributions import ActionHead, Distribution, distribution_of
from slipstream.ops.normalize import RunningMoments
from slipstream.ops.spaces import ACTION_MASK, feature_space, mask_space
from slipstream.tree import Tree
from slipstream.types import Act, EnvSpec

Precision = Literal["float32", "bfloat16"]


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
        precision: Arithmetic of the torso; parameters, core, heads and losses stay float32. `bfloat16` is about 1.6
            times as fast on processors and GPUs that have it, and slower than `float32` on others.
        normalize_obs: Whether float vectors are brought to mean 0 and variance 1 by running statistics, a part of the
            policy.
        log_std_init: Logarithm of the initial standard deviation of continuous actions.
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

    def __post_init__(self) -> None:
        """Refuses numbers that mean nothing."""
        if any(size < 1 for size in self.hidden):
            raise ValueError(f"net.hidden must be sizes of at least 1, got {self.hidden}")
        ranges.at_least(self, "net.", 1, "core_size")
        if not math.isfinite(self.log_std_init):
            raise ValueError(f"net.log_std_init must be a finite number, got {self.log_std_init}")


class Outputs(NamedTuple):
    """What a policy says about rows it is shown.

    Attributes:
        distribution: Over actions, for every row.
        value: float32, one per row.
    """

    distribution: Distribution
    value: Tensor


class Policy(Protocol):
    """What the library asks of a policy: an `nn.Module` with the members below.

    Attributes:
        dice_width: D, uniform numbers that `act` needs per slot.
        recurrent: Whether there is a state, so that rows must be unrolled in order.
    """

    dice_width: int
    recurrent: bool

    def initial_state(self, batch: int) -> Tree:
        """State `[batch, ...]` at the start of an episode: zeros, or an empty tuple for a feed-forward policy."""
        ...

    def act(self, obs: Tree, state: Tree, dice: Tensor, greedy: bool = False) -> Act:
        """Actions for `B` slots, without gradient.

        Args:
            obs: Tree `[B, *O]`.
            state: Tree `[B, ...]`, zeroed by the caller in slots where an episode starts.
            dice: float32 `[B, D]`, uniform in `[0, 1)`, multiples of 2**-23.
            greedy: Whether to take the most probable action instead of a draw.
        """
        ...

    def unroll(self, obs: Tree, state0: Tree, first: Tensor | None) -> Outputs:
        """Distributions and values of rows `[T, B]`, or of flat rows `[N]` if the policy is feed-forward.

        Args:
            obs: Tree `[T, B, *O]` or `[N, *O]`.
            state0: Tree `[B, ...]`, state before row 0.
            first: bool `[T, B]`, rows at which an episode starts, from a state of zeros.
        """
        ...

    def observe(self, obs: Tree, valid: Tensor) -> None:
        """Takes the observations `[T, B, *O]` of an update into account, where the policy keeps statistics of them."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
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


class ActorCritic(nn.Module):
    """The library's own `Policy`, built by `make_actor_critic`, which also seeds the weights.

    Attributes:
        dice_width: D, uniform numbers that `act` needs per slot.
        recurrent: Whether rows must be unrolled in order, from a state.
        moments: Statistics of the observations, if they are normalised.

    Args:
        spec: What the environments show and want.
        network: Shape of the networks.
        torso: A user's own torso instead of `network.torso`: observations `[N, *O]` to features float32 `[N, F]`. A
            separate value torso starts as its copy. Its weights are left as they come.
    """

    def __init__(self, spec: EnvSpec, network: Network, torso: nn.Module | None = None) -> None:
        super().__init__()
        self._head = distribution_of(spec.action_space)
        self._masked = _has_mask(spec, self._head)
        self._leaf, space = tree.items(feature_space(spec.observation_space))[0]
        self._leaf_dims = len(space.shape or ())
        self.dice_width: int = self._head.num_uniforms
        self.recurrent: bool = network.core != "none"
        self.moments = RunningMoments(spec.observation_space) if network.normalize_obs else None
        self.trunk = _Trunk(spec, network, torso)
        self.value_trunk = None if network.share_torso else _Trunk(spec, network, copy.deepcopy(torso))
        continuous = self._head.family == "diag_gaussian"
        # The standard deviation does not depend on the observation: half of the parameters are no outputs.
        self.policy_head = nn.Linear(self.trunk.features, self._head.num_params // (2 if continuous else 1))
        self.log_std = (
            nn.Parameter(torch.full((self._head.num_uniforms,), network.log_std_init)) if continuous else None
        )
        self.value_head = nn.Linear((self.value_trunk or self.trunk).features, 1)
        initialise(self.policy_head, network.init, gain=0.01)
        initialise(self.value_head, network.init, gain=1.0)

    def initial_state(self, batch: int) -> Tree:
        """Zeros `[B, H]`: `()`, the state of the core, or `(policy's, value's)` where the trunks are separate."""
        state = self.trunk.initial_state(batch)
        if self.value_trunk is None or not self.recurrent:
            return state
        return state, self.value_trunk.initial_state(batch)

    @torch.no_grad()
    def act(self, obs: Tree, state: Tree, dice: Tensor, greedy: bool = False) -> Act:
        """Actions for `B` slots.

        Args:
            obs: Tree `[B, *O]`.
            state: Tree `[B, ...]`, zeroed by the caller in slots where an episode starts.
            dice: float32 `[B, D]`, uniform in `[0, 1)`, multiples of 2**-23.
            greedy: Whether to take the most probable action instead of a draw.

        Returns:
            `Act` with `extras["value"]`, float32 `[B]`; no gradient.
        """
        outputs, state = self._forward(obs, state, None)
        action = outputs.distribution.mode() if greedy else outputs.distribution.sample(dice)
        return Act(action, outputs.distribution.log_prob(action), state, {"value": outputs.value})

    def unroll(self, obs: Tree, state0: Tree = (), first: Tensor | None = None) -> Outputs:
        """Distributions and values of rows.

        Args:
            obs: Tree `[T, B, *O]`; a feed-forward policy also takes flat `[N, *O]`.
            state0: Tree `[B, ...]`, state before row 0; ignored by a feed-forward policy.
            first: bool `[T, B]`, True where an episode starts at that row, so that the state is zeroed before it;
                ignored by a feed-forward policy.

        Returns:
            `Outputs` with the leading dimensions of `obs`.

        Raises:
            ValueError: The policy is recurrent and `first` is missing.
        """
        if not self.recurrent:
            return self._forward(obs, (), None)[0]
        if first is None:
            raise ValueError("unroll: a recurrent policy needs `first` [T, B], True where an episode starts")
        return self._forward(obs, state0, first)[0]

    def observe(self, obs: Tree, valid: Tensor) -> None:
        """Updates the statistics of the observations, if there are any; the learner calls it once per update.

        Args:
            obs: Tree `[..., *O]`.
            valid: bool `[...]`, rows to take into account.
        """
        if self.moments is not None:
            self.moments.update(obs, valid)

    def _forward(self, obs: Tree, state: Tree, first: Tensor | None) -> tuple[Outputs, Tree]:
        """Rows `[..., *O]` to outputs `[...]`, and the next state."""
        if self.moments is not None:
            obs = self.moments(obs)
        leading = self._leading(obs)
        flat: Tree = tree.map(_flat_rows, obs) if len(leading) == 2 else obs
        if self.value_trunk is None:
            features, state = self.trunk(flat, state, first)
            value_features = features
        else:
            policy_state, value_state = state if self.recurrent else ((), ())
            features, policy_state = self.trunk(flat, policy_state, first)
            value_features, value_state = self.value_trunk(flat, value_state, first)
            state = (policy_state, value_state) if self.recurrent else ()
        params = self.policy_head(features)
        value = self.value_head(value_features).squeeze(-1)
        if self.log_std is not None:
            params = torch.cat([params, self.log_std.expand_as(params)], dim=-1)
        mask = _flat_mask(flat[ACTION_MASK]) if self._masked else None
        if len(leading) == 2:
            params, value = params.unflatten(0, leading), value.unflatten(0, leading)
            mask = None if mask is None else mask.unflatten(0, leading)
        return Outputs(self._head.distribution(params, mask), value), state

    def _leading(self, obs: Tree) -> tuple[int, ...]:
        """`(T, B)` or `(N,)`, from the dimensions that the observation has beyond its space."""
        leaf = dict(tree.items(obs))[self._leaf]
        return tuple(leaf.shape[: leaf.dim() - self._leaf_dims])


class _Trunk(nn.Module):
    """Torso and optional core: observations `[N, *O]` to features `[N, F]`."""

    def __init__(self, spec: EnvSpec, network: Network, torso: nn.Module | None) -> None:
        super().__init__()
        space = spec.observation_space
        if torso is None:
            self.torso: nn.Module = Torso(space, network.torso, network.hidden, network.activation)
            initialise(self.torso, network.init)
        else:
            self.torso = torso
        self._bfloat16 = network.precision == "bfloat16"
        self.features = check_torso(self.torso, space)
        self.core = None if network.core == "none" else Core(network.core, self.features, network.core_size)
        if self.core is not None:
            initialise(self.core, network.init)
            self.features = network.core_size

    def initial_state(self, columns: int) -> State:
        """State of the core, or an empty tuple."""
        return () if self.core is None else self.core.initial_state(columns)

    def forward(self, flat: Tree, state: State, first: Tensor | None) -> tuple[Tensor, State]:
        """Features of flat rows; with `first[T, B]` they are unrolled, without it they are one row `[B]`."""
        # The rest stays in float32: a log-probability in bfloat16 has two digits.
        with torch.autocast(tree.leaves(flat)[0].device.type, torch.bfloat16, enabled=self._bfloat16):
            features = self.torso(flat).float()
        if self.core is None:
            return features, state
        if first is None:
            return self.core.step(features, state)
        output, state = self.core(features.unflatten(0, first.shape), state, first)
        return output.flatten(0, 1), state


def make_actor_critic(spec: EnvSpec, network: Network, torso: nn.Module | None = None, seed: int = 0) -> ActorCritic:
    """An actor-critic on the CPU whose weights are a function of `seed`, the spec's spaces and `network` only.

    Args:
        spec: What the environments show and want.
        network: Shape of the networks.
        torso: A user's own torso, see `ActorCritic`.
        seed: The user's seed. torch's global generator is left as it was.

    Raises:
        ValueError: A space is not supported, an image is too small for the torso, or the user's torso gives something
            else than float features `[N, F]`.
    """
    with keyed_initialisation(seed, "policy"):
        return ActorCritic(spec, network, torso)


def _flat_rows(leaf: Tensor) -> Tensor:
    """`[T, B, ...]` as `[T*B, ...]`."""
    return leaf.flatten(0, 1)


def _has_mask(spec: EnvSpec, head: ActionHead) -> bool:
    """Whether observations carry an action mask; checks that it fits the actions."""
    mask = mask_space(spec.observation_space)
    if mask is None:
        return False
    entries = sum(math.prod(leaf.shape or ()) for leaf in tree.leaves(mask))
    if head.family == "diag_gaussian" or entries != head.num_params:
        allowed = "no mask" if head.family == "diag_gaussian" else f"{head.num_params} entries, one per choice"
        raise ValueError(
            f"observation 'action_mask' has {entries} entries; the action space {spec.action_space} takes {allowed}"
        )
    return True


def _flat_mask(mask: Tree) -> Tensor:
    """The mask's leaves `[N, ...]` side by side, bool `[N, P]`."""
    return torch.cat([leaf.flatten(1) for leaf in tree.leaves(mask)], dim=1) != 0
