"""Networks of Q-learning: a trunk, and heads that say of every action what it is worth.

    phi = core(torso(normalise(o)))        Q(o, a) = head_a(phi)        or        Q(o, a) = V(phi) + A_a(phi) - mean A

What a head says of an action is its value, the probabilities of Z values (C51), or M quantiles (QR-DQN). Dueling and
noisy heads bring a hidden layer of their own: it stands in for the last linear layer of the torso, or follows the core.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from gymnasium import spaces
from torch import Tensor, nn

from slipstream.nets.initialize import Init, initialise, keyed_initialisation
from slipstream.nets.noisy import NoisyLinear
from slipstream.nets.rows import ObservedRows
from slipstream.nets.trunk import Network, Packs, Trunk, in_bfloat16
from slipstream.ops.distributions import Categorical, distribution_of
from slipstream.ops.normalize import RunningMoments
from slipstream.ops.q_learning import support
from slipstream.tree import Tree
from slipstream.types import Act, EnvSpec

_LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class QHeads:
    """What is said of every action, and by which layers.

    Attributes:
        distribution: `value` (DQN: its Q), `categorical` (C51: log-probabilities of evenly spaced values) or `quantile`
            (QR-DQN: quantiles at the levels (i + 1/2) / M).
        outputs: Numbers per action: 1 value, Z atoms (51 in C51) or M quantiles (200 in QR-DQN).
        low: Least atom of `categorical`, in units of the return as the loss sees it.
        high: Greatest atom.
        dueling: Whether value and advantages have layers of their own (Wang et al., 2016).
        noisy: Whether all layers of the head are noisy (Fortunato et al., 2018).
        sigma0: Initial noise of noisy layers.
        gradient_scale: Factor of the gradient that enters the trunk; 1/sqrt(2) for the dueling paper's.
        slots: Slots that act, each with noise of its own; the policy knows them.
    """

    distribution: Literal["value", "categorical", "quantile"] = "value"
    outputs: int = 1
    low: float = -10.0
    high: float = 10.0
    dueling: bool = False
    noisy: bool = False
    sigma0: float = 0.5
    gradient_scale: float = 1.0
    slots: int = 0

    def __post_init__(self) -> None:
        """Refuses numbers that mean nothing."""
        least = 2 if self.distribution == "categorical" else 1
        if self.outputs < least or (self.distribution == "value" and self.outputs > 1):
            expected = "1" if self.distribution == "value" else f"at least {least}"
            raise ValueError(
                f"outputs of a {self.distribution} head: expected {expected} per action, got {self.outputs}"
            )
        if self.distribution == "categorical" and not self.low < self.high:
            raise ValueError(f"atoms of a categorical head: expected low < high, got {self.low} and {self.high}")

    @property
    def hidden(self) -> bool:
        """Whether the head has a hidden layer of its own."""
        return self.dueling or self.noisy


class QHead(nn.Module):
    """Features `[N, F]` to what is said of A actions: `[N, A]` values, `[N, A, Z]` log-probabilities or `[N, A, M]`.

        V + A_a - mean_a' A_a'                      (dueling: Wang et al., 2016, eq. 9)

    on values, on quantiles, or on logits before their softmax over the atoms (Rainbow: Hessel et al., 2018).

    Identities: the mean of a dueling head over the actions is V; adding a constant to all A changes nothing.

    Weights are drawn by `init`, with gain sqrt(2) in hidden layers, which have ReLU, and 1 in output layers, as in the
    actor-critic's value head: both estimate a return. A start near zero, which keeps the softmax of a policy head even,
    has no such use for an argmax. Noisy layers keep their own initial weights.

    Attributes:
        atoms: float32 `[Z]`, the values of `categorical`; a buffer that is no state.

    Args:
        heads: What is said, and by which layers.
        features: F.
        width: Size of each hidden layer.
        actions: A.
        init: The scheme.
        bfloat16: Whether hidden layers, which stand in for a layer of the torso, are computed as that would be.
    """

    atoms: Tensor

    def __init__(
        self, heads: QHeads, features: int, width: int, actions: int, init: Init, bfloat16: bool = False
    ) -> None:
        super().__init__()
        self._heads, self._actions = heads, actions
        shape = heads, features, width
        self.action_stream = _Stream(*shape, actions * heads.outputs, init, bfloat16)
        self.value_stream = _Stream(*shape, heads.outputs, init, bfloat16) if heads.dueling else None
        self.register_buffer("atoms", support(heads.low, heads.high, heads.outputs), persistent=False)

    def forward(self, features: Tensor, mean: bool = False, slot: Tensor | None = None) -> Tensor:
        """What is said of every action; without noise if `mean`, else with that of gradients, or of slots `[N]`."""
        scale = self._heads.gradient_scale
        if features.requires_grad and scale != 1.0:
            features.register_hook(lambda gradient: gradient * scale)
        output = self.action_stream(features, mean, slot).unflatten(-1, (self._actions, self._heads.outputs))
        if self.value_stream is not None:
            output = output - output.mean(-2, keepdim=True) + self.value_stream(features, mean, slot).unsqueeze(-2)
        match self._heads.distribution:
            case "value":
                return output.squeeze(-1)
            case "categorical":
                return output.log_softmax(-1)
            case "quantile":
                return output

    def values(self, output: Tensor) -> Tensor:
        """Q float32 `[..., A]` of what `forward` said: its mean over atoms or quantiles."""
        match self._heads.distribution:
            case "value":
                return output
            case "categorical":
                return output.exp() @ self.atoms
            case "quantile":
                return output.mean(-1)


class QPolicy(nn.Module):
    """An `ExploringPolicy` that takes the action of the greatest Q, or by some probability any; see `make_q_policy`.

    Acting of slots that collect explores: by `exploration`, and by the noise of noisy layers. All other acting is by
    the mean weights.

    Attributes:
        dice_width: 2: whether to take any action, and which.
        recurrent: Whether rows must be unrolled in order, from a state.
        exploration: float32 `[num_envs]`, a buffer: probability of a uniformly random action, by slot.
        noise_width: W, uniform numbers that `renoise` takes; 0 without noisy layers.
        moments: Statistics of the observations, if they are normalised.

    Args:
        spec: What the environments show and want.
        network: Shape of the networks; `share_torso` has no meaning here.
        torso: A user's own torso instead of `network.torso`: observations `[N, *O]` to features float32 `[N, F]`. Its
            weights are left as they come. Hidden layers of the head follow it.
        heads: What is said of every action.
        evaluation_epsilon: Probability of a uniformly random action where nobody learns from the actions.

    Raises:
        ValueError: Actions are not Discrete.
    """

    exploration: Tensor

    def __init__(
        self,
        spec: EnvSpec,
        network: Network,
        torso: nn.Module | None = None,
        heads: QHeads | None = None,
        evaluation_epsilon: float = 0.001,
    ) -> None:
        super().__init__()
        heads = replace(heads or QHeads(), slots=spec.num_envs)
        if not isinstance(spec.action_space, spaces.Discrete):
            instead = "sac, td3 or ddpg" if isinstance(spec.action_space, spaces.Box) else "ppo"
            raise ValueError(f"action space {spec.action_space}: Q-learning wants Discrete actions; use {instead}")
        self._rows = ObservedRows(spec, distribution_of(spec.action_space))
        self._evaluation_epsilon = evaluation_epsilon
        self.dice_width: int = 2
        self.recurrent: bool = network.core != "none"
        self.moments = RunningMoments(spec.observation_space) if network.normalize_obs else None
        self.trunk = Trunk(spec, network, torso, stem=heads.hidden)
        features, width = self.trunk.features, self.trunk.width
        actions = int(spec.action_space.n)
        bfloat16 = self.trunk.cut and network.precision == "bfloat16"
        self.head = QHead(heads, features, width, actions, network.init, bfloat16)
        self.noise_width: int = sum(layer.noise_width for layer in self._noisy_layers())
        self.register_buffer("exploration", torch.ones(spec.num_envs))

    def initial_state(self, batch: int) -> Tree:
        """Zeros `[B, H]`: the state of the core, or `()`."""
        return self.trunk.initial_state(batch)

    @torch.no_grad()
    def act(self, obs: Tree, state: Tree, dice: Tensor, greedy: bool = False, slot: Tensor | None = None) -> Act:
        """Actions for `B` slots.

            P(a) = epsilon / (number of allowed actions) + (1 - epsilon) 1{a = argmax Q}

        The first of equals is the greatest. Masked actions are never taken.

        Args:
            obs: Tree `[B, *O]`.
            state: Tree `[B, ...]`, zeroed by the caller in slots where an episode starts.
            dice: float32 `[B, 2]`, uniform in `[0, 1)`, multiples of 2**-23.
            greedy: Whether epsilon is 0, and weights are the mean weights.
            slot: int64 `[B]`, the slots that collect: epsilon is their `exploration`, and noisy layers have their
                noise. None: epsilon is `evaluation_epsilon`, and weights are the mean weights.

        Returns:
            `Act` without extras, with log P of the action; no gradient.
        """
        output, state = self._forward(obs, state, None, mean=greedy or slot is None, slot=slot)
        q = self.values(output, obs)
        action = q.argmax(-1)
        if greedy:
            return Act(action, torch.zeros_like(dice[:, 0]), state, {})
        epsilon = torch.full_like(dice[:, 0], self._evaluation_epsilon) if slot is None else self.exploration[slot]
        anything = Categorical(torch.zeros_like(q), self._rows.mask(obs))
        chosen = torch.where(dice[:, 0] < epsilon, anything.sample(dice[:, 1:]), action)
        probability = epsilon * anything.log_prob(chosen).exp() + (1.0 - epsilon) * (chosen == action)
        return Act(chosen, probability.log(), state, {})

    def unroll(self, obs: Tree, state0: Tree = (), first: Tensor | None = None) -> Tensor:
        """What the head says of every action in rows; noisy layers have their noise.

        Args:
            obs: Tree `[T, B, *O]`; a feed-forward policy also takes flat `[N, *O]`.
            state0: Tree `[B, ...]`, state before row 0; ignored by a feed-forward policy.
            first: bool `[T, B]`, True where an episode starts at that row, so that the state is zeroed before it;
                ignored by a feed-forward policy.

        Returns:
            float32: Q `[..., A]`, log-probabilities `[..., A, Z]` or quantiles `[..., A, M]`, masked actions included;
            `...` are the leading dimensions of `obs`.

        Raises:
            ValueError: The policy is recurrent and `first` is missing.
        """
        return self.unroll_state(obs, state0, first)[0]

    def unroll_state(self, obs: Tree, state0: Tree = (), first: Tensor | None = None) -> tuple[Tensor, Tree]:
        """As `unroll`, and the state `[B, ...]` after the last row: what a burn-in is for."""
        if not self.recurrent:
            return self._forward(obs, (), None)
        if first is None:
            raise ValueError("unroll: a recurrent policy needs `first` [T, B], True where an episode starts")
        return self._forward(obs, state0, first)

    def values(self, output: Tensor, obs: Tree) -> Tensor:
        """Q of what `unroll` said.

        Args:
            output: float32 `[..., A]`, `[..., A, Z]` or `[..., A, M]`.
            obs: Tree `[..., *O]` that it was said of, for its action mask.

        Returns:
            float32 `[..., A]`; the least float for masked actions. A row that allows nothing counts as unmasked.
        """
        q, mask = self.head.values(output), self._rows.mask(obs)
        return q if mask is None else torch.where(mask | ~mask.any(-1, keepdim=True), q, _LOWEST)

    def observe(self, obs: Tree, valid: Tensor) -> None:
        """Updates the statistics of the observations, if there are any; the learner calls it once per update.

        Args:
            obs: Tree `[..., *O]`.
            valid: bool `[...]`, rows to take into account.
        """
        if self.moments is not None:
            self.moments.update(obs, valid)

    def renoise(self, dice: Tensor) -> None:
        """As `ExploringPolicy.renoise`."""
        layers = self._noisy_layers()
        for layer, part in zip(layers, dice.split([layer.noise_width for layer in layers], dim=-1), strict=True):
            layer.renoise(part)

    def _noisy_layers(self) -> list[NoisyLinear]:
        return [layer for layer in self.head.modules() if isinstance(layer, NoisyLinear)]

    def _forward(
        self, obs: Tree, state: Tree, first: Tensor | None, mean: bool = False, slot: Tensor | None = None
    ) -> tuple[Tensor, Tree]:
        """Rows `[..., *O]` to what the head says, and the next state; noise as of `QHead`."""
        if self.moments is not None:
            obs = self.moments(obs)
        flat, leading = self._rows.flat(obs)
        features, state = self.trunk(flat, state, first)
        output = self.head(features, mean, slot)
        return (output.unflatten(0, leading) if len(leading) == 2 else output), state


def make_q_policy(
    spec: EnvSpec,
    network: Network,
    torso: nn.Module | None = None,
    seed: int = 0,
    heads: QHeads | None = None,
    evaluation_epsilon: float = 0.001,
) -> QPolicy:
    """A Q-network on the CPU whose weights are a function of `seed`, spaces, `network` and `heads` only.

    Args:
        spec: What the environments show and want.
        network: Shape of the networks.
        torso: A user's own torso, see `QPolicy`.
        seed: The user's seed. torch's global generator is left as it was.
        heads: What is said of every action; values if None.
        evaluation_epsilon: See `QPolicy`.

    Raises:
        ValueError: A space is not supported, an image is too small for the torso, or the user's torso gives something
            else than float features `[N, F]`.
    """
    with keyed_initialisation(seed, "policy"):
        return QPolicy(spec, network, torso, heads, evaluation_epsilon)


class _Stream(Packs):
    """Output layer of a head, after a hidden layer with ReLU if the head has those."""

    def __init__(self, heads: QHeads, features: int, width: int, outputs: int, init: Init, bfloat16: bool) -> None:
        super().__init__()
        self._bfloat16 = bfloat16
        self.hidden = _linear(heads, features, width, init, math.sqrt(2.0)) if heads.hidden else None
        self.output = _linear(heads, width if heads.hidden else features, outputs, init, 1.0)

    @torch.no_grad()
    def pack(self) -> None:
        """As `Trunk.pack`, of the hidden layer; its noise, which is multiplied in float32, is left as it is."""
        if self._bfloat16 and self.hidden is not None:
            for parameter in self.hidden.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)

    def forward(self, x: Tensor, mean: bool, slot: Tensor | None = None) -> Tensor:
        """`[N, F]` to `[N, outputs]`."""
        if self.hidden is not None:
            with in_bfloat16(x.device, self._bfloat16):
                x = _through(self.hidden, x, mean, slot).relu().float()
        return _through(self.output, x, mean, slot)


def _linear(heads: QHeads, inputs: int, outputs: int, init: Init, gain: float) -> nn.Linear | NoisyLinear:
    """A layer of a head, with its initial weights."""
    if heads.noisy:
        return NoisyLinear(inputs, outputs, heads.sigma0, heads.slots)
    layer = nn.Linear(inputs, outputs)
    initialise(layer, init, gain)
    return layer


def _through(layer: nn.Linear | NoisyLinear, x: Tensor, mean: bool, slot: Tensor | None) -> Tensor:
    return layer(x, mean, slot) if isinstance(layer, NoisyLinear) else layer(x)
