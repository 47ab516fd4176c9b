"""Rainbow: C51 with double Q-learning, dueling heads, n steps, priorities and noisy layers (Hessel et al., 2018).

Each of the six can be switched off; with all of them off it is C51. Without `noisy`, and with the epsilons that then
explore, it is the epsilon-Rainbow of Accelerated Methods (Stooke and Abbeel, 2018), which has Adam's epsilon at 0.005
over the batch (`eps=0.005`, `scale_eps`) and tolerates batches of 512: `--system alternating` on Atari.

With noisy layers nobody needs an epsilon; `exploration` is used while learning has not begun, and its rates are 0 from
then on. The noise is drawn anew for every gradient step, whose rows share it, and for acting with every version of the
weights, where every slot has its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from slipstream import ranges
from slipstream.algos.c51 import categorical_loss
from slipstream.algos.exploring import Exploration, LrScaling
from slipstream.algos.q_learning import QLearning, QNetworks, feed_forward
from slipstream.algos.replaying import Loss, Replayed
from slipstream.nets.q_policy import QHeads, QPolicy, make_q_policy
from slipstream.nets.trunk import Network
from slipstream.optimizers import OptimizerKind
from slipstream.replay.items import Transitions
from slipstream.replay.options import ReplayOptions
from slipstream.types import EnvSpec


@dataclass(frozen=True)
class Rainbow(QLearning):
    """Hyperparameters of Rainbow.

    Attributes:
        lr: Learning rate (alpha).
        anneal_lr: Whether the learning rate falls linearly to 0 over the run.
        lr_scaling: How the learning rate grows with the batch, from 32 windows on.
        gamma: Discount.
        n_step: Steps whose rewards are summed before bootstrapping (n).
        double: Whether the online network chooses the action that the target network values.
        dueling: Whether value and advantages have layers of their own.
        noisy: Whether the layers of the head are noisy and explore in place of epsilon.
        sigma0: Initial noise of noisy layers.
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

    name: ClassVar[str] = "rainbow"

    lr: float = 6.25e-5
    anneal_lr: bool = False
    lr_scaling: LrScaling = "none"
    gamma: float = 0.99
    n_step: int = 3
    double: bool = True
    dueling: bool = True
    noisy: bool = True
    sigma0: float = 0.5
    batch_size: int = 32
    target_every: int = 8_000
    tau: float = 1.0
    atoms: int = 51
    v_min: float = -10.0
    v_max: float = 10.0
    exploration: Exploration = field(default_factory=Exploration)
    replay: ReplayOptions = field(default_factory=partial(ReplayOptions, learning_starts=20_000, alpha=0.5))
    max_grad_norm: float = 10.0
    optimizer: OptimizerKind = "adam"
    eps: float = 1.5e-4
    scale_eps: bool = False

    def __post_init__(self) -> None:
        """Refuses numbers that mean nothing."""
        ranges.at_least(self, "algo.", 0, "lr", "eps", "sigma0")
        ranges.at_least(self, "algo.", 1, "n_step", "batch_size", "target_every")
        ranges.above(self, "algo.", 0, "max_grad_norm", "tau")
        ranges.at_least(self, "algo.", 2, "atoms")
        ranges.ordered(self, "algo.", "v_min", "v_max")
        ranges.between(self, "algo.", 0, 1, "gamma", "tau")

    def make_policy(self, spec: EnvSpec, network: Network, torso: nn.Module | None, seed: int) -> QPolicy:
        """A network that says the log-probabilities of all atoms of every action."""
        heads = QHeads(
            "categorical",
            self.atoms,
            self.v_min,
            self.v_max,
            self.dueling,
            self.noisy,
            self.sigma0,
            gradient_scale=2.0**-0.5 if self.dueling else 1.0,
        )
        return make_q_policy(spec, feed_forward(self.name, network), torso, seed, heads, self.exploration.evaluation)

    def loss(self, online: QNetworks, target: QNetworks, batch: Replayed[Transitions], progress: float) -> Loss:
        """Cross-entropy to the projected target distribution, weighted."""
        return categorical_loss(online, target, batch, self.double)

    def exploration_rates(self, steps: int, num_envs: int) -> NDArray[np.float32]:
        """Epsilon of every slot; 0 with noisy layers, once learning has begun."""
        learned = steps - self.replay.learning_starts
        if self.noisy and learned >= 0:
            return np.zeros(num_envs, np.float32)
        return self.exploration.rates(learned, num_envs)
