"""SAC: soft actor-critic with an adapted temperature (Haarnoja et al., 2018, arXiv 1812.05905).

    y = r + gamma^n (min_i Q_target_i(o', a') - alpha log pi(a'|o')),    a' ~ pi(.|o')
    L_Q = sum_i 0.5 (y - Q_i(o, a))^2
    L_pi = alpha log pi(a_theta|o) - min_i Q_i(o, a_theta),    a_theta reparameterised
    L_alpha = -alpha (log pi(a|o) + target entropy)

Entropies are those of the action scaled to [-1, 1], so that the usual target, minus the number of its entries, does not
depend on the bounds.

Identity: with alpha = 0 and one critic it is DDPG with a random actor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from slipstream import ranges
from slipstream.algos.continuous_control import ContinuousControl, squared_errors
from slipstream.algos.replaying import Loss, Networks, Phase, Replayed
from slipstream.nets.continuous import Critics, GaussianActor, Temperature, make_critics, make_gaussian_actor
from slipstream.nets.trunk import Network
from slipstream.ops import continuous, q_learning
from slipstream.optimizers import OptimizerKind
from slipstream.replay.items import Transitions
from slipstream.replay.options import ReplayOptions
from slipstream.tree import Tree
from slipstream.types import EnvSpec


class SoftCritic(nn.Module):
    """What SAC learns beside its actor: critics and temperature."""

    def __init__(self, critics: Critics, temperature: Temperature) -> None:
        super().__init__()
        self.critics, self.temperature = critics, temperature


SoftNetworks = Networks[GaussianActor, SoftCritic]


@dataclass(frozen=True)
class SAC(ContinuousControl):
    """Hyperparameters of SAC.

    Attributes:
        lr: Learning rate of actor, critics and temperature.
        anneal_lr: Whether the learning rate falls linearly to 0 over the run.
        gamma: Discount.
        n_step: Steps whose rewards are summed before bootstrapping (n).
        tau: Share of the critics that goes into their targets with every gradient step.
        critics: Number of critics.
        alpha: Temperature, reward per nat; where it starts, if it is adapted.
        adapt_alpha: Whether the temperature follows the target entropy.
        target_entropy: Entropy to keep, in nats, of actions scaled to [-1, 1]; None for minus the entries of an action.
        batch_size: Transitions that one gradient step sees, over all shards.
        replay: Size and use of the replay.
        max_grad_norm: Global norm to which each gradient is clipped.
        optimizer: Rule of the gradient steps.
        eps: Epsilon of the optimisers.
    """

    name: ClassVar[str] = "sac"

    lr: float = 3e-4
    anneal_lr: bool = False
    gamma: float = 0.99
    n_step: int = 1
    tau: float = 0.005
    critics: int = 2
    alpha: float = 1.0
    adapt_alpha: bool = True
    target_entropy: float | None = None
    batch_size: int = 256
    replay: ReplayOptions = field(default_factory=partial(ReplayOptions, ratio=1.0))
    max_grad_norm: float = math.inf
    optimizer: OptimizerKind = "adam"
    eps: float = 1e-8

    def __post_init__(self) -> None:
        """Refuses numbers that mean nothing."""
        ranges.at_least(self, "algo.", 0, "lr", "eps")
        ranges.at_least(self, "algo.", 1, "n_step", "batch_size", "critics")
        ranges.above(self, "algo.", 0, "alpha", "max_grad_norm", "tau")
        ranges.between(self, "algo.", 0, 1, "gamma", "tau")
        if self.target_entropy is not None:
            ranges.finite(self, "algo.", "target_entropy")

    @property
    def parts(self) -> tuple[str, ...]:
        """Critics, actor, and the temperature if it is adapted."""
        return ("critic.critics", "policy", *(("critic.temperature",) if self.adapt_alpha else ()))

    def make_policy(self, spec: EnvSpec, network: Network, torso: nn.Module | None, seed: int) -> GaussianActor:
        """A squashed normal distribution, with initial weights drawn from `seed`."""
        return make_gaussian_actor(spec, network, torso, seed)

    def make_critic(self, spec: EnvSpec, network: Network, torso: nn.Module | None, seed: int) -> SoftCritic:
        """Critics, with initial weights drawn from `seed`, and the temperature."""
        return SoftCritic(make_critics(spec, network, torso, seed, self.critics), Temperature(self.alpha))

    def loss_dice(self, spec: EnvSpec) -> int:
        """The numbers that choose an action, for each of the three losses."""
        return 3 * math.prod(spec.action_space.shape or ())

    def phases(self, gradient_step: int) -> Sequence[Phase]:
        """Critics, actor, temperature."""
        losses = (self.critic_loss, self.actor_loss, self.temperature_loss)
        return tuple(Phase(part, loss) for part, loss in zip(self.parts, losses, strict=False))

    def critic_loss(
        self, online: SoftNetworks, target: SoftNetworks, batch: Replayed[Transitions], progress: float
    ) -> Loss:
        """sum_i 0.5 (y - Q_i(o, a))^2, weighted; the priorities are the mean of |y - Q_i|."""
        items, actor = batch.items, online.policy
        with torch.no_grad():
            action, log_prob = _draw(actor, items.next_obs, batch.dice, 0)
            following = target.critic.critics(actor.normalised(items.next_obs), action).amin(0)
            value = continuous.soft_value(following, online.critic.temperature(), log_prob)
            goal = q_learning.td_target(items.reward, items.discount, value)
        q = online.critic.critics(actor.normalised(items.obs), items.action)
        return squared_errors(batch, q, goal)

    def actor_loss(
        self, online: SoftNetworks, target: SoftNetworks, batch: Replayed[Transitions], progress: float
    ) -> Loss:
        """The actor's: alpha log pi(a|o) - min_i Q_i(o, a) for an action drawn now, weighted."""
        obs, actor = batch.items.obs, online.policy
        action, log_prob = _draw(actor, obs, batch.dice, 1)
        q = online.critic.critics(actor.normalised(obs), action).amin(0)
        loss = batch.mean(continuous.soft_actor_loss(log_prob, q, online.critic.temperature().detach()))
        return Loss(loss, {"actor_loss": loss.detach(), "entropy": -batch.average(log_prob.detach())})

    def temperature_loss(
        self, online: SoftNetworks, target: SoftNetworks, batch: Replayed[Transitions], progress: float
    ) -> Loss:
        """-alpha (log pi(a|o) + target entropy) for an action of the new actor, weighted."""
        temperature = online.critic.temperature
        with torch.no_grad():
            action, log_prob = _draw(online.policy, batch.items.obs, batch.dice, 2)
        entropy = -float(action[0].numel()) if self.target_entropy is None else self.target_entropy
        loss = batch.mean(continuous.temperature_loss(temperature.log_alpha, log_prob, entropy))
        return Loss(loss, {"ent_coef": batch.average(temperature().detach()), "ent_coef_loss": loss.detach()})


def _draw(actor: GaussianActor, obs: Tree, dice: Tensor, which: int) -> tuple[Tensor, Tensor]:
    """An action and its log-density, as if it were scaled to [-1, 1], by the `which`-th third of the dice."""
    action, log_prob = actor.sample(obs, dice.chunk(3, dim=-1)[which])
    low, high = actor.bounds
    return action, log_prob + (0.5 * (high - low)).log().sum()
