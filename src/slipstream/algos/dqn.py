"""DQN: Q-learning on replayed transitions, with a target network (Mnih et al., 2015).

    L = huber(r + gamma^n max_a' Q_target(o', a') - Q(o, a))

Options, each a paper: `double` (van Hasselt et al., 2016: the online net chooses a', the target net says its value),
`dueling` (Wang et al., 2016), `n_step` (Sutton, 1988; r is then the sum of n discounted rewards), and priorities
(Schaul et al., 2016: `replay.alpha` above 0). Large batches after Stooke and Abbeel (2018): `lr_scaling`, `scale_eps`.

Identities: where the nets are equal, double DQN is DQN. C51 and QR-DQN are this with other heads and losses.

Deviations: with several slots epsilon is a number per slot; the target network is copied by collected steps, so that
its age does not depend on the replay ratio.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from slipstream import ranges
from slipstream.algos.exploring import Exploration, LrScaling
from slipstream.algos.q_learning import QLearning, QNetworks, feed_forward
from slipstream.algos.replaying import Loss, Replayed
from slipstream.nets.q_policy import QHeads, QPolicy, make_q_policy
from slipstream.nets.trunk import Network
from slipstream.ops import q_learning
from slipstream.optimizers import OptimizerKind
from slipstream.replay.items import Transitions
from slipstream.replay.options import ReplayOptions
from slipstream.types import EnvSpec


@dataclass(frozen=True)
class DQN(QLearning):
    """Hyperparameters of DQN.

    Attributes:
        lr: Learning rate (alpha).
        anneal_lr: Whether the learning rate falls linearly to 0 over the run.
        lr_scaling: How the learning rate grows with the batch, from 32 windows on.
        gamma: Discount.
        n_step: Steps whose rewards are summed before bootstrapping (n).
        double: Whether the online network chooses the action that the target network values.
        dueling: Whether value and advantages have layers of their own.
        batch_size: Transitions that one gradient step sees, over all shards.
        target_every: Collected steps between two moves of the target network.
        tau: Share of the online network that goes into it each time; 1 makes it a copy.
        huber_delta: Error beyond which the loss is linear.
        exploration: Epsilon-greedy exploration.
        replay: Size and use of the replay.
        max_grad_norm: Global norm to which the gradient is clipped.
        optimizer: Rule of the gradient step.
        eps: Epsilon of the optimiser.
        scale_eps: Whether `eps` is divided by `batch_size`.
    """

    name: ClassVar[str] = "dqn"

    lr: float = 1e-4
    anneal_lr: bool = False
    lr_scaling: LrScaling = "none"
    gamma: float = 0.99
    n_step: int = 1
    double: bool = False
    dueling: bool = False
    batch_size: int = 32
    target_every: int = 10_000
    tau: float = 1.0
    huber_delta: float = 1.0
    exploration: Exploration = field(default_factory=Exploration)
    replay: ReplayOptions = field(default_factory=ReplayOptions)
    max_grad_norm: float = 10.0
    optimizer: OptimizerKind = "adam"
    eps: float = 1e-8
    scale_eps: bool = False

    def __post_init__(self) -> None:
        """Refuses numbers that mean nothing."""
        ranges.at_least(self, "algo.", 0, "lr", "eps")
        ranges.at_least(self, "algo.", 1, "n_step", "batch_size", "target_every")
        ranges.above(self, "algo.", 0, "huber_delta", "max_grad_norm", "tau")
        ranges.between(self, "algo.", 0, 1, "gamma", "tau")

    def make_policy(self, spec: EnvSpec, network: Network, torso: nn.Module | None, seed: int) -> QPolicy:
        """A network that says Q of every action, with initial weights drawn from `seed`."""
        heads = QHeads(dueling=self.dueling, gradient_scale=2.0**-0.5 if self.dueling else 1.0)
        return make_q_policy(spec, feed_forward(self.name, network), torso, seed, heads, self.exploration.evaluation)

    def loss(self, online: QNetworks, target: QNetworks, batch: Replayed[Transitions], progress: float) -> Loss:
        """huber(r + discount max_a' Q_target(o', a') - Q(o, a)), weighted; the errors are the priorities."""
        items = batch.items
        with torch.no_grad():
            next_q = target.policy.values(target.policy.unroll(items.next_obs), items.next_obs)
            value = q_learning.max_value(next_q)
            if self.double:
                chooser = online.policy.values(online.policy.unroll(items.next_obs), items.next_obs)
                value = q_learning.double_value(chooser, next_q)
            goal = q_learning.td_target(items.reward, items.discount, value)
        q = q_learning.chosen(online.policy.unroll(items.obs), items.action)
        error = goal - q
        loss, error = batch.mean(q_learning.huber(error, self.huber_delta)), error.detach()
        metrics = {"loss": loss.detach(), "q_mean": batch.average(q.detach()), "td_error": batch.average(error.abs())}
        return Loss(loss, metrics, error)
