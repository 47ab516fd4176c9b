"""DDPG: a deterministic actor and a critic, with targets that follow slowly (Lillicrap et al., 2016).

    y = r + gamma^n Q_target(o', mu_target(o'))        L_Q = 0.5 (y - Q(o, a))^2        L_mu = -Q(o, mu(o))

Identity: it is TD3 with one critic, no smoothing and no delay.

Deviations: the noise on actions is white, not an Ornstein-Uhlenbeck process (Fujimoto et al., 2018, saw no difference);
the critic's weights do not decay, and no layer normalises its batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from torch import nn

from slipstream import ranges
from slipstream.algos.continuous_control import ContinuousControl
from slipstream.algos.replaying import Loss, Phase, Replayed
from slipstream.algos.td3 import DeterministicNetworks, actor_loss, critic_loss
from slipstream.nets.continuous import Critics, DeterministicActor, make_critics, make_deterministic_actor
from slipstream.nets.trunk import Network
from slipstream.optimizers import OptimizerKind
from slipstream.replay.items import Transitions
from slipstream.replay.options import ReplayOptions
from slipstream.types import EnvSpec


@dataclass(frozen=True)
class DDPG(ContinuousControl):
    """Hyperparameters of DDPG.

    Attributes:
        lr: Learning rate of actor and critic.
        anneal_lr: Whether the learning rate falls linearly to 0 over the run.
        gamma: Discount.
        n_step: Steps whose rewards are summed before bootstrapping (n).
        tau: Share of the networks that goes into their targets with every gradient step.
        exploration_noise: Standard deviation of the noise on actions, in halves of their range.
        batch_size: Transitions that one gradient step sees, over all shards.
        replay: Size and use of the replay.
        max_grad_norm: Global norm to which each gradient is clipped.
        optimizer: Rule of the gradient steps.
        eps: Epsilon of the optimisers.
    """

    name: ClassVar[str] = "ddpg"

    lr: float = 1e-3
    anneal_lr: bool = False
    gamma: float = 0.99
    n_step: int = 1
    tau: float = 0.005
    exploration_noise: float = 0.1
    batch_size: int = 256
    replay: ReplayOptions = field(default_factory=partial(ReplayOptions, ratio=1.0))
    max_grad_norm: float = math.inf
    optimizer: OptimizerKind = "adam"
    eps: float = 1e-8

    def __post_init__(self) -> None:
        """Refuses numbers that mean nothing."""
        ranges.at_least(self, "algo.", 0, "lr", "eps", "exploration_noise")
        ranges.at_least(self, "algo.", 1, "n_step", "batch_size")
        ranges.above(self, "algo.", 0, "max_grad_norm", "tau")
        ranges.between(self, "algo.", 0, 1, "gamma", "tau")

    @property
    def parts(self) -> tuple[str, ...]:
        """Critic and actor."""
        return ("critic", "policy")

    def make_policy(self, spec: EnvSpec, network: Network, torso: nn.Module | None, seed: int) -> DeterministicActor:
        """A deterministic actor that explores by noise, with initial weights drawn from `seed`."""
        return make_deterministic_actor(spec, network, torso, seed, self.exploration_noise)

    def make_critic(self, spec: EnvSpec, network: Network, torso: nn.Module | None, seed: int) -> Critics:
        """One critic, with initial weights drawn from `seed`."""
        return make_critics(spec, network, torso, seed, 1)

    def loss_dice(self, spec: EnvSpec) -> int:
        """As many numbers as an action has, for noise of size 0."""
        return math.prod(spec.action_space.shape or ())

    def phases(self, gradient_step: int) -> Sequence[Phase]:
        """The critic, then the actor."""
        return Phase("critic", self.critic_loss), Phase("policy", actor_loss)

    def critic_loss(
        self,
        online: DeterministicNetworks,
        target: DeterministicNetworks,
        batch: Replayed[Transitions],
        progress: float,
    ) -> Loss:
        """0.5 (y - Q(o, a))^2, weighted; the errors are the priorities."""
        return critic_loss(online, target, batch, 0.0, 0.0)
