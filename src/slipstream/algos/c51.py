"""C51: Q-learning of the distribution of returns over fixed atoms (Bellemare et al., 2017).

    m = projection of r + gamma^n z on the atoms, weighted by p_target(o', a*)        a* = argmax_a' sum_i z_i p(o', a')
    L = -sum_i m_i log p_i(o, a)

This is DQN with another head and loss; the options are DQN's. Categorical values tolerate batches of 2,048 (Stooke and
Abbeel, 2018), with Adam's epsilon at 0.01 over the batch: `eps=0.01`, `scale_eps`. Priorities are KL(m || p), as in
Rainbow.

Identity: with one atom per return that occurs, and no clamping, the mean of m is DQN's target.
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
class C51(QLearning):
    """Hyperparameters of C51.

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
        atoms: Number of atoms (Z).
        v_min: Least atom, in units of the discounted training reward; smaller returns count as this.
        v_max: Greatest atom.
        exploration: Epsilon-greedy exploration.
        replay: Size and use of the replay.
        max_grad_norm: Global norm to which the gradient is clipped.
        optimizer: Rule of the gradient step.
        eps: Epsilon of the optimiser.
        scale_eps: Whether `eps` is divided by `batch_size`.
    """

    name: ClassVar[str] = "c51"

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
    atoms: int = 51
    v_min: float = -10.0
    v_max: float = 10.0
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
        ranges.at_least(self, "algo.", 2, "atoms")
        ranges.ordered(self, "algo.", "v_min", "v_max")
        ranges.between(self, "algo.", 0, 1, "gamma", "tau")

    def make_policy(self, spec: EnvSpec, network: Network, torso: nn.Module | None, seed: int) -> QPolicy:
        """A network that says the log-probabilities of all atoms of every action."""
        scale = 2.0**-0.5 if self.dueling else 1.0
        heads = QHeads("categorical", self.atoms, self.v_min, self.v_max, self.dueling, gradient_scale=scale)
        return make_q_policy(spec, feed_forward(self.name, network), torso, seed, heads, self.exploration.evaluation)

    def loss(self, online: QNetworks, target: QNetworks, batch: Replayed[Transitions], progress: float) -> Loss:
        """Cross-entropy to the projected target distribution, weighted."""
        return categorical_loss(online, target, batch, self.double)


def categorical_loss(online: QNetworks, target: QNetworks, batch: Replayed[Transitions], double: bool) -> Loss:
    """-sum_i m_i log p_i(o, a), weighted; the errors are KL(m || p).

    Args:
        online: The networks that are learned, with categorical heads.
        target: The target networks.
        batch: Transitions.
        double: Whether the online network chooses the action whose distribution is the target's.
    """
    items = batch.items
    with torch.no_grad():
        probs = best_following(online, target, items.next_obs, double).exp()
        shifted = probs, items.reward, items.discount, online.policy.head.atoms
        goal, beyond = q_learning.categorical_projection(*shifted), q_learning.beyond_atoms(*shifted)
    log_probs = q_learning.chosen(online.policy.unroll(items.obs), items.action)
    loss = batch.mean(q_learning.cross_entropy(log_probs, goal))
    error = q_learning.categorical_kl(log_probs.detach(), goal)
    q = log_probs.detach().exp() @ online.policy.head.atoms
    means = {"q_mean": q, "kl": error, "beyond_atoms": beyond}
    metrics = {name: batch.average(value) for name, value in means.items()}
    return Loss(loss, {"loss": loss.detach(), **metrics}, error)
