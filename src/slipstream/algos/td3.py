"""TD3: a deterministic actor, two critics, and targets that are smoothed (Fujimoto et al., 2018).

    y = r + gamma^n min_i Q_target_i(o', clip(mu_target(o') + clip(noise, -c, c)))
    L_Q = sum_i 0.5 (y - Q_i(o, a))^2
    L_mu = -Q_1(o, mu(o)),    every `policy_delay` gradient steps, with the targets

Identity: with one critic, no smoothing and no delay it is DDPG, and `ddpg` is that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from slipstream import ranges
from slipstream.algos.continuous_control import ContinuousControl, squared_errors
from slipstream.algos.replaying import Loss, Networks, Phase, Replayed
from slipstream.nets.continuous import Critics, DeterministicActor, make_critics, make_deterministic_actor
from slipstream.nets.trunk import Network
from slipstream.ops import continuous, q_learning
from slipstream.optimizers import OptimizerKind
from slipstream.replay.items import Transitions
from slipstream.replay.options import ReplayOptions
from slipstream.types import EnvSpec

DeterministicNetworks = Networks[DeterministicActor, Critics]


@dataclass(frozen=True)
class TD3(ContinuousControl):
    """Hyperparameters of TD3.

    Attributes:
        lr: Learning rate of actor and critics.
        anneal_lr: Whether the learning rate falls linearly to 0 over the run.
        gamma: Discount.
        n_step: Steps whose rewards are summed before bootstrapping (n).
        tau: Share of the networks that goes into their targets each time.
        policy_delay: Gradient steps of the critics per one of the actor and of the targets (d).
        exploration_noise: Standard deviation of the noise on actions, in halves of their range.
        target_noise: Standard deviation of the noise on target actions, likewise.
        target_noise_clip: Greatest noise on target actions (c), likewise.
        batch_size: Transitions that one gradient step sees, over all shards.
        replay: Size and use of the replay.
        max_grad_norm: Global norm to which each gradient is clipped.
        optimizer: Rule of the gradient steps.
        eps: Epsilon of the optimisers.
    """

    name: ClassVar[str] = "td3"

    lr: float = 1e-3
    anneal_lr: bool = False
    gamma: float = 0.99
    n_step: int = 1
    tau: float = 0.005
    policy_delay: int = 2
    exploration_noise: float = 0.1
    target_noise: float = 0.2
    target_noise_clip: float = 0.5
    batch_size: int = 256
    replay: ReplayOptions = field(default_factory=partial(ReplayOptions, ratio=1.0))
    max_grad_norm: float = math.inf
    optimizer: OptimizerKind = "adam"
    eps: float = 1e-8

    def __post_init__(self) -> None:
        """Refuses numbers that mean nothing."""
        ranges.at_least(self, "algo.", 0, "lr", "eps", "exploration_noise", "target_noise", "target_noise_clip")
        ranges.at_least(self, "algo.", 1, "n_step", "batch_size", "policy_delay")
        ranges.above(self, "algo.", 0, "max_grad_norm", "tau")
        ranges.between(self, "algo.", 0, 1, "gamma", "tau")

    @property
    def parts(self) -> tuple[str, ...]:
        """Critics and actor."""
        return ("critic", "policy")

    def make_policy(self, spec: EnvSpec, network: Network, torso: nn.Module | None, seed: int) -> DeterministicActor:
        """A deterministic actor that explores by noise, with initial weights drawn from `seed`."""
        return make_deterministic_actor(spec, network, torso, seed, self.exploration_noise)

    def make_critic(self, spec: EnvSpec, network: Network, torso: nn.Module | None, seed: int) -> Critics:
        """Two critics, with initial weights drawn from `seed`."""
        return make_critics(spec, network, torso, seed, 2)

    def loss_dice(self, spec: EnvSpec) -> int:
        """The noise on the target action."""
        return math.prod(spec.action_space.shape or ())

    def phases(self, gradient_step: int) -> Sequence[Phase]:
        """The critics, and now and then the actor."""
        critics = Phase("critic", self.critic_loss)
        return (critics, Phase("policy", actor_loss)) if self._delayed(gradient_step) else (critics,)

    def target_mix(self, gradient_step: int, before: float, now: float) -> float:
        """Tau, with the gradient steps of the actor."""
        return self.tau if self._delayed(gradient_step) else 0.0

    def critic_loss(
        self,
        online: DeterministicNetworks,
        target: DeterministicNetworks,
        batch: Replayed[Transitions],
        progress: float,
    ) -> Loss:
        """sum_i 0.5 (y - Q_i(o, a))^2, weighted; the priorities are the mean of |y - Q_i|."""
        return critic_loss(online, target, batch, self.target_noise, self.target_noise_clip)

    def _delayed(self, gradient_step: int) -> bool:
        return (gradient_step + 1) % self.policy_delay == 0


def critic_loss(
    online: DeterministicNetworks,
    target: DeterministicNetworks,
    batch: Replayed[Transitions],
    noise: float,
    noise_clip: float,
) -> Loss:
    """sum_i 0.5 (y - Q_i(o, a))^2, weighted, with noise on the target's actions; both in halves of their range."""
    items, actor = batch.items, online.policy
    with torch.no_grad():
        low, high = actor.bounds
        action = continuous.smoothed(
            target.policy.mean_action(items.next_obs), batch.dice, low, high, noise, noise_clip
        )
        value = target.critic(actor.normalised(items.next_obs), action).amin(0)
        goal = q_learning.td_target(items.reward, items.discount, value)
    q = online.critic(actor.normalised(items.obs), items.action)
    return squared_errors(batch, q, goal)


def actor_loss(
    online: DeterministicNetworks, target: DeterministicNetworks, batch: Replayed[Transitions], progress: float
) -> Loss:
    """-Q_1(o, mu(o)), weighted."""
    obs, actor = batch.items.obs, online.policy
    loss = -batch.mean(online.critic(actor.normalised(obs), actor.mean_action(obs))[0])
    return Loss(loss, {"actor_loss": loss.detach()})
