"""QR-DQN: Q-learning of quantiles of the return (Dabney et al., 2018).

    y_j = r + gamma^n theta_target_j(o', a*)
    L = sum_i mean_j rho_tau_i(y_j - theta_i(o, a)),  tau_i = (i + 1/2) / M

This is DQN with another head and loss; the options are DQN's. Unlike C51 it needs no bounds of the return. The
priorities are the errors of the mean.

Identity: with one quantile (tau = 1/2) the loss is half of DQN's Huber loss.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from slipstream import ranges
from slipstream.algos.exploring import Exploration, LrScaling
from slipstream.algos.q_learning import QLearning, QNetworks, best_following, feed_forward
from slipstream.algos.replaying import Loss, Replayed
from slipstream.nets.q_policy import QHeads, QPolicy, make_q_policy
from slipstream.nets.trunk import Network
from slipstream.ops import q_learning
from slipstream.optimizers import OptimizerKind
from slipstream.replay.items import Transitions
from slipstream.replay.options import ReplayOptions
from slipstream.types import EnvSpec


@dataclass(frozen=True)
class QRDQN(QLearning):
    """Hyperparameters of QR-DQN.

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
        quantiles: Number of quantiles (M).
        kappa: Error beyond which the loss of a quantile is linear.
        exploration: Epsilon-greedy exploration.
        replay: Size and use of the replay.
        max_grad_norm: Global norm to which the gradient is clipped.
        optimizer: Rule of the gradient step.
        eps: Epsilon of the optimiser.
        scale_eps: Whether `eps` is divided by `batch_size`.
    """

    name: ClassVar[str] = "qrdqn"

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
    quantiles: int = 200
    kappa: float = 1.0
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
        ranges.above(self, "algo.", 0, "max_grad_norm", "tau")
        ranges.at_least(self, "algo.", 0, "kappa")
        ranges.at_least(self, "algo.", 1, "quantiles")
        ranges.between(self, "algo.", 0, 1, "gamma", "tau")

    def make_policy(self, spec: EnvSpec, network: Network, torso: nn.Module | None, seed: int) -> QPolicy:
        """A network that says the quantiles of every action."""
        scale = 2.0**-0.5 if self.dueling else 1.0
        heads = QHeads("quantile", self.quantiles, dueling=self.dueling, gradient_scale=scale)
        return make_q_policy(spec, feed_forward(self.name, network), torso, seed, heads, self.exploration.evaluation)

    def loss(self, online: QNetworks, target: QNetworks, batch: Replayed[Transitions], progress: float) -> Loss:
        """Quantile Huber loss to the target's quantiles, weighted."""
        items = batch.items
        with torch.no_grad():
            quantiles = best_following(online, target, items.next_obs, self.double)
            goal = q_learning.td_target(items.reward.unsqueeze(-1), items.discount.unsqueeze(-1), quantiles)
        quantiles = q_learning.chosen(online.policy.unroll(items.obs), items.action)
        loss = batch.mean(q_learning.quantile_huber_loss(quantiles, goal, self.kappa))
        q = quantiles.detach().mean(-1)
        error = goal.mean(-1) - q
        metrics = {"loss": loss.detach(), "q_mean": batch.average(q), "td_error": batch.average(error.abs())}
        return Loss(loss, metrics, error)
