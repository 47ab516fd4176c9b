"""Networks for continuous actions within bounds: the actors of SAC, TD3 and DDPG, their critics, SAC's temperature.

    mean, log_std = head(torso(normalise(o)))        Q_i(o, a) = critic_i(normalise(o), a),    i = 1 .. count

Actors and critics share nothing. They are feed-forward. The statistics of normalised observations are the actor's; a
loss hands its critics what `normalised` returns.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from slipstream.nets.initialize import initialise, keyed_initialisation
from slipstream.nets.rows import ObservedRows
from slipstream.nets.torso import mlp
from slipstream.nets.trunk import Network, Trunk
from slipstream.ops.continuous import TanhGaussian, perturbed, uniform_action
from slipstream.ops.distributions import distribution_of
from slipstream.ops.normalize import RunningMoments
from slipstream.tree import Tree
from slipstream.types import Act, EnvSpec

_LEAST_LOG_STD, _GREATEST_LOG_STD = -5.0, 2.0


class GaussianActor(nn.Module):
    """SAC's actor, a normal distribution squashed into the bounds; an `ExploringPolicy`, see `make_gaussian_actor`.

        a = mid + half tanh(mean + std xi),    log_std = -5 + (2 + 5) (1 + tanh(z)) / 2

    Deviation: the paper's code clips log_std to [-20, 2], which leaves no gradient outside and lets a log-density grow
    to 20 nats per entry; the bounds here are those of CleanRL, and are approached smoothly.

    Attributes:
        dice_width: 1 + D: whether to act uniformly, and the D numbers that choose the action.
        recurrent: False.
        exploration: float32 `[num_envs]`, a buffer: probability of a uniformly random action, by slot.
        noise_width: 0.

    Args:
        spec: What the environments show and want.
        network: Shape of the networks; `share_torso` and `log_std_init` have no meaning here.
        torso: A user's own torso instead of `network.torso`: observations `[N, *O]` to features float32 `[N, F]`. Its
            weights are left as they come.

    Raises:
        ValueError: Actions are no Box of finite bounds, or the network has a core.
    """

    exploration: Tensor

    def __init__(self, spec: EnvSpec, network: Network, torso: nn.Module | None = None) -> None:
        super().__init__()
        self.body = _Body(spec, network, torso, numbers=2)
        self.dice_width: int = 1 + len(self.body.low)
        self.recurrent: bool = False
        self.noise_width: int = 0
        self.register_buffer("exploration", torch.ones(spec.num_envs))

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Least and greatest action, float32 `[D]` each."""
        return self.body.low, self.body.high

    def initial_state(self, batch: int) -> Tree:
        """`()`."""
        return ()

    @torch.no_grad()
    def act(self, obs: Tree, state: Tree, dice: Tensor, greedy: bool = False, slot: Tensor | None = None) -> Act:
        """Actions for `B` slots.

        Args:
            obs: Tree `[B, *O]`.
            state: `()`.
            dice: float32 `[B, 1 + D]`, uniform in `[0, 1)`, multiples of 2**-23.
            greedy: Whether to take `mean_action` instead of a draw.
            slot: int64 `[B]`, the slots that collect: by their `exploration` they act uniformly. None: all draw from
                the policy.

        Returns:
            `Act` without extras; its log-density is that of the distribution that the action was drawn from.
        """
        distribution = self.distribution(obs)
        if greedy:
            action = distribution.mode()
            return Act(action, distribution.log_prob(action), (), {})
        action, log_prob = distribution.sample_with_log_prob(dice[:, 1:])
        if slot is not None:
            action, log_prob = self.body.explored(action, log_prob, dice, self.exploration[slot])
        return Act(action, log_prob, (), {})

    def distribution(self, obs: Tree) -> TanhGaussian:
        """The policy at rows `[..., *O]`."""
        mean, z = self.body(obs).chunk(2, dim=-1)
        log_std = _LEAST_LOG_STD + 0.5 * (_GREATEST_LOG_STD - _LEAST_LOG_STD) * (1.0 + z.tanh())
        return TanhGaussian(mean, log_std, *self.bounds, self.body.shape)

    def sample(self, obs: Tree, dice: Tensor) -> tuple[Tensor, Tensor]:
        """Actions of the policy and their log-densities, differentiable (reparameterised).

        Args:
            obs: Tree `[..., *O]`.
            dice: float32 `[..., D]`, uniform in `[0, 1)`, multiples of 2**-23.

        Returns:
            Action float32 `[..., *A]` and log-density float32 `[...]`.
        """
        return self.distribution(obs).sample_with_log_prob(dice)

    def mean_action(self, obs: Tree) -> Tensor:
        """The squashed mean at rows `[..., *O]`, float32 `[..., *A]`."""
        return self.distribution(obs).mode()

    def normalised(self, obs: Tree) -> Tree:
        """Rows `[..., *O]` as the networks see them, for the critics; `obs` itself if they are not normalised."""
        return self.body.normalised(obs)

    def observe(self, obs: Tree, valid: Tensor) -> None:
        """Takes rows `[..., *O]` into the statistics of the observations, if there are any, where `valid[...]`."""
        self.body.observe(obs, valid)

    def renoise(self, dice: Tensor) -> None:
        """Does nothing: there are no noisy layers."""


class DeterministicActor(nn.Module):
    """Actor of TD3 and DDPG; an `ExploringPolicy`, see `make_deterministic_actor`.

        a = mid + half tanh(x)

    Attributes:
        dice_width: 1 + D: whether to act uniformly, and the D numbers of the noise or of the uniform action.
        recurrent: False.
        exploration: float32 `[num_envs]`, a buffer: probability of a uniformly random action, by slot.
        noise_width: 0.

    Args:
        spec: What the environments show and want.
        network: As of `GaussianActor`.
        torso: As of `GaussianActor`.
        sigma: Standard deviation of the exploration noise, in units of half the range.

    Raises:
        ValueError: Actions are no Box of finite bounds, or the network has a core.
    """

    exploration: Tensor

    def __init__(self, spec: EnvSpec, network: Network, torso: nn.Module | None = None, sigma: float = 0.1) -> None:
        super().__init__()
        self.body = _Body(spec, network, torso, numbers=1)
        self._sigma = sigma
        self.dice_width: int = 1 + len(self.body.low)
        self.recurrent: bool = False
        self.noise_width: int = 0
        self.register_buffer("exploration", torch.ones(spec.num_envs))

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Least and greatest action, float32 `[D]` each."""
        return self.body.low, self.body.high

    def initial_state(self, batch: int) -> Tree:
        """`()`."""
        return ()

    @torch.no_grad()
    def act(self, obs: Tree, state: Tree, dice: Tensor, greedy: bool = False, slot: Tensor | None = None) -> Act:
        """Actions for `B` slots.

        Args:
            obs: Tree `[B, *O]`.
            state: `()`.
            dice: float32 `[B, 1 + D]`, uniform in `[0, 1)`, multiples of 2**-23.
            greedy: Whether to take `mean_action` whatever `slot` says.
            slot: int64 `[B]`, the slots that collect: by their `exploration` they act uniformly, and otherwise with
                noise on `mean_action`. None: `mean_action`.

        Returns:
            `Act` without extras. Its log-density is that of the distribution that the action was drawn from, before it
            was clipped, and 0 where nothing was drawn.
        """
        action = self.mean_action(obs)
        if greedy or slot is None:
            return Act(action, torch.zeros_like(dice[:, 0]), (), {})
        action, log_prob = perturbed(action, dice[:, 1:], *self.bounds, self._sigma)
        action, log_prob = self.body.explored(action, log_prob, dice, self.exploration[slot])
        return Act(action, log_prob, (), {})

    def mean_action(self, obs: Tree) -> Tensor:
        """The action without noise at rows `[..., *O]`, float32 `[..., *A]`, differentiable."""
        low, high = self.bounds
        action = 0.5 * (high + low) + 0.5 * (high - low) * self.body(obs).tanh()
        return action.clamp(low, high).unflatten(-1, self.body.shape)

    def normalised(self, obs: Tree) -> Tree:
        """As of `GaussianActor`."""
        return self.body.normalised(obs)

    def observe(self, obs: Tree, valid: Tensor) -> None:
        """As of `GaussianActor`."""
        self.body.observe(obs, valid)

    def renoise(self, dice: Tensor) -> None:
        """Does nothing: there are no noisy layers."""


class Critics(nn.Module):
    """Networks Q_i(o, a) that share nothing; see `make_critics`.

    Images go through a torso of the network's own; its features, all else that is observed, and the action, brought to
    [-1, 1], go together through a perceptron of the sizes `network.hidden` to one value.

    They run one after the other: stacked into one batch of matrices, a gradient of two critics of 256x256 took 1.08
    times as long on 256 rows, and 0.88 times on 128, on one core.

    Args:
        spec: What the environments show and want.
        network: Shape of the networks.
        torso: A user's own torso; every critic has a copy. Its features join the action.
        count: Number of networks: 2 in SAC and TD3, 1 in DDPG.

    Raises:
        ValueError: Actions are no Box of finite bounds, or the network has a core.
    """

    low: Tensor
    high: Tensor

    def __init__(self, spec: EnvSpec, network: Network, torso: nn.Module | None = None, count: int = 2) -> None:
        super().__init__()
        _bound(self, spec, network)
        self._rows = ObservedRows(spec, distribution_of(spec.action_space))
        self.critics = nn.ModuleList(_Critic(spec, network, copy.deepcopy(torso)) for _ in range(count))

    def forward(self, obs: Tree, action: Tensor) -> Tensor:
        """Values of actions.

        Args:
            obs: Tree `[..., *O]`, as the actor's `normalised` returns it.
            action: float32 `[..., *A]`, in the environment's units.

        Returns:
            float32 `[count, ...]`.
        """
        flat, leading = self._rows.flat(obs)
        within = (2.0 * action.reshape(-1, len(self.low)) - self.high - self.low) / (self.high - self.low)
        values = torch.stack([critic(flat, within) for critic in self.critics])
        return values.unflatten(1, leading) if len(leading) == 2 else values


class Temperature(nn.Module):
    """SAC's weight of the entropy, `alpha = exp(log_alpha)`, reward per nat.

    Args:
        initial: Alpha at the start, positive.

    Attributes:
        log_alpha: float32 `[]`, the parameter.
    """

    def __init__(self, initial: float = 1.0) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.tensor(math.log(initial)))

    def forward(self) -> Tensor:
        """Alpha, float32 `[]`."""
        return self.log_alpha.exp()


def make_gaussian_actor(
    spec: EnvSpec, network: Network, torso: nn.Module | None = None, seed: int = 0
) -> GaussianActor:
    """SAC's actor on the CPU; its weights are a function of `seed`, the spec's spaces and `network` only.

    Args:
        spec: What the environments show and want.
        network: Shape of the networks.
        torso: A user's own torso, see `GaussianActor`.
        seed: The user's seed. torch's global generator is left as it was.

    Raises:
        ValueError: See `GaussianActor`; or an observation is not supported, or the user's torso gives something else
            than float features `[N, F]`.
    """
    with keyed_initialisation(seed, "policy"):
        return GaussianActor(spec, network, torso)


def make_deterministic_actor(
    spec: EnvSpec, network: Network, torso: nn.Module | None = None, seed: int = 0, sigma: float = 0.1
) -> DeterministicActor:
    """Actor of TD3 and DDPG, as `make_gaussian_actor` makes SAC's; `sigma` as of `DeterministicActor`."""
    with keyed_initialisation(seed, "policy"):
        return DeterministicActor(spec, network, torso, sigma)


def make_critics(
    spec: EnvSpec, network: Network, torso: nn.Module | None = None, seed: int = 0, count: int = 2
) -> Critics:
    """Critics on the CPU, as `make_gaussian_actor` makes the actor; `count` as of `Critics`."""
    with keyed_initialisation(seed, "critic"):
        return Critics(spec, network, torso, count)


class _Body(nn.Module):
    """What both actors are made of: rows `[..., *O]` to `numbers` per entry of an action, float32 `[..., numbers * D]`.

    Attributes:
        low: float32 `[D]`.
        high: float32 `[D]`.
        shape: `*A`.
    """

    low: Tensor
    high: Tensor

    def __init__(self, spec: EnvSpec, network: Network, torso: nn.Module | None, numbers: int) -> None:
        super().__init__()
        self.shape = _bound(self, spec, network)
        self._rows = ObservedRows(spec, distribution_of(spec.action_space))
        self.moments = RunningMoments(spec.observation_space) if network.normalize_obs else None
        self.trunk = Trunk(spec, network, torso)
        self.head = nn.Linear(self.trunk.features, numbers * len(self.low))
        # As of every policy head: all actions begin in the middle, where tanh has a slope.
        initialise(self.head, network.init, gain=0.01)

    def forward(self, obs: Tree) -> Tensor:
        flat, leading = self._rows.flat(self.normalised(obs))
        numbers = self.head(self.trunk(flat, (), None)[0])
        return numbers.unflatten(0, leading) if len(leading) == 2 else numbers

    def normalised(self, obs: Tree) -> Tree:
        return obs if self.moments is None else self.moments(obs)

    def observe(self, obs: Tree, valid: Tensor) -> None:
        if self.moments is not None:
            self.moments.update(obs, valid)

    def explored(self, action: Tensor, log_prob: Tensor, dice: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
        """With probability `chance[B]` an action from anywhere within the bounds instead, and its log-density."""
        anything, its_log_prob = uniform_action(dice[:, 1:], self.low, self.high, self.shape)
        explores = dice[:, 0] < chance
        chosen = torch.where(explores.view(-1, *(1,) * len(self.shape)), anything, action)
        return chosen, torch.where(explores, its_log_prob, log_prob)


class _Critic(nn.Module):
    """One Q: flat rows `[N, *O]` and actions within [-1, 1], float32 `[N, D]`, to values `[N]`."""

    def __init__(self, spec: EnvSpec, network: Network, torso: nn.Module | None) -> None:
        super().__init__()
        # Without layers of its own the torso hands on what is no image as it is.
        self.trunk = Trunk(spec, replace(network, hidden=()), torso)
        inputs = self.trunk.features + math.prod(spec.action_space.shape or ())
        self.joint = mlp(inputs, network.hidden, network.activation)
        self.head = nn.Linear(network.hidden[-1] if network.hidden else inputs, 1)
        initialise(self.joint, network.init)
        initialise(self.head, network.init, gain=1.0)

    def forward(self, flat: Tree, action: Tensor) -> Tensor:
        features = self.trunk(flat, (), None)[0]
        return self.head(self.joint(torch.cat([features, action], dim=1))).squeeze(-1)


def _bound(module: nn.Module, spec: EnvSpec, network: Network) -> tuple[int, ...]:
    """Gives `module` the bounds as buffers `low` and `high`, float32 `[D]`, no state; returns `*A`."""
    space = spec.action_space
    if not isinstance(space, spaces.Box):
        instead = "dqn or rainbow" if isinstance(space, spaces.Discrete) else "ppo"
        raise ValueError(f"action space {space}: sac, td3 and ddpg want a Box; use {instead}")
    low, high = space.low.ravel().astype(np.float32), space.high.ravel().astype(np.float32)
    with np.errstate(over="ignore"):
        extent = high - low
    if not (np.isfinite(extent) & (extent > 0)).all():
        raise ValueError(
            f"action space {space}: sac, td3 and ddpg want finite bounds, low < high, for every entry; set them with "
            "a gymnasium.wrappers.TransformAction, or use ppo"
        )
    if network.core != "none":
        raise ValueError(
            f"net.core={network.core}: sac, td3 and ddpg have no recurrent form; use --net.core none, or ppo "
            "(for Discrete actions r2d2)"
        )
    module.register_buffer("low", torch.from_numpy(low), persistent=False)
    module.register_buffer("high", torch.from_numpy(high), persistent=False)
    return space.shape or (1,)
