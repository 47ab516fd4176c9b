"""R2D2: recurrent Q-learning from replayed sequences, with stored states and burn-in (Kapturowski et al., 2019).

    h(x) = sign(x) (sqrt(|x| + 1) - 1) + 1e-3 x
    y_t = h(sum_{k<n} gamma^k r_{t+k} + gamma^n h^-1(Q_target(o_{t+n}, a*)))        a* = argmax_a Q(o_{t+n}, a)
    L = mean_t 0.5 (y_t - Q(o_t, a_t))^2

A sequence begins where an unroll did, from the recurrent state that was stored there. Its first `burn_in` rows only
bring that state up to date, for both networks; the other `length` rows are learned from. So sequences overlap where
`unroll` is smaller than the two together: `unroll=40` with `burn_in=40`, `length=80` are the paper's.

Identity: where the environment needs no memory and h is the identity, the targets are those of double DQN.

Deviations: a sequence may go on through the end of an episode (the state is zeroed there) instead of being padded; the
n-step windows of its last rows are shorter; the target network is copied by collected steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from slipstream import ranges, tree
from slipstream.algos.exploring import Exploration, LrScaling
from slipstream.algos.q_learning import QLearning, QNetworks
from slipstream.algos.replaying import Index, Loss, Replayed
from slipstream.nets.q_policy import QHeads, QPolicy, make_q_policy
from slipstream.nets.trunk import Network
from slipstream.ops import q_learning
from slipstream.optimizers import OptimizerKind
from slipstream.replay.items import Sequences, Transform, sequences
from slipstream.replay.options import ReplayOptions
from slipstream.replay.rows import Rows
from slipstream.types import EnvSpec


@dataclass(frozen=True)
class R2D2(QLearning):
    """Hyperparameters of R2D2.

    Attributes:
        lr: Learning rate (alpha).
        anneal_lr: Whether the learning rate falls linearly to 0 over the run.
        lr_scaling: How the learning rate grows with the batch, from 32 sequences on.
        gamma: Discount.
        n_step: Steps whose rewards are summed before bootstrapping (n).
        burn_in: Rows of a sequence that only bring the recurrent state up to date.
        length: Rows of a sequence that are learned from.
        rescale: Epsilon of the rescaling of values h; 0 for none.
        eta: Share of the greatest error in the priority of a sequence; the rest is their mean.
        dueling: Whether value and advantages have layers of their own.
        batch_size: Sequences that one gradient step sees, over all shards.
        target_every: Collected steps between two moves of the target network.
        tau: Share of the online network that goes into it each time; 1 makes it a copy.
        exploration: Epsilon-greedy exploration.
        replay: Size and use of the replay.
        max_grad_norm: Global norm to which the gradient is clipped.
        optimizer: Rule of the gradient step.
        eps: Epsilon of the optimiser.
        scale_eps: Whether `eps` is divided by `batch_size`.
    """

    name: ClassVar[str] = "r2d2"

    lr: float = 1e-4
    anneal_lr: bool = False
    lr_scaling: LrScaling = "none"
    gamma: float = 0.997
    n_step: int = 5
    burn_in: int = 40
    length: int = 80
    rescale: float = 1e-3
    eta: float = 0.9
    dueling: bool = True
    batch_size: int = 64
    target_every: int = 10_000
    tau: float = 1.0
    exploration: Exploration = field(default_factory=partial(Exploration, final=0.4, least=0.4**8))
    replay: ReplayOptions = field(default_factory=partial(ReplayOptions, ratio=0.0125, alpha=0.9, beta=0.6))
    max_grad_norm: float = 80.0
    optimizer: OptimizerKind = "adam"
    eps: float = 1e-3
    scale_eps: bool = False

    def __post_init__(self) -> None:
        """Refuses numbers that mean nothing."""
        ranges.at_least(self, "algo.", 0, "lr", "eps", "burn_in", "rescale")
        ranges.at_least(self, "algo.", 1, "n_step", "length", "batch_size", "target_every")
        ranges.above(self, "algo.", 0, "max_grad_norm", "tau")
        ranges.between(self, "algo.", 0, 1, "gamma", "tau", "eta")

    @property
    def span(self) -> int:
        """Rows of a sequence."""
        return self.burn_in + self.length

    def stride(self, unroll: int) -> int:
        """Unrolls: where they begin, the state is known.

        Raises:
            ValueError: If an unroll is longer than what is learned of a sequence.
        """
        if unroll > self.length:
            raise ValueError(
                f"r2d2's sequences begin every unroll={unroll} rows and learn algo.length={self.length} of them, so "
                f"that some would never be learned from; use --unroll {self.length} at most, or a greater algo.length"
            )
        return unroll

    def make_policy(self, spec: EnvSpec, network: Network, torso: nn.Module | None, seed: int) -> QPolicy:
        """A recurrent network that says Q of every action.

        Raises:
            ValueError: If the network has no memory.
        """
        if network.core == "none":
            raise ValueError("r2d2 is for networks with memory: use --net.core lstm (or gru), or algorithm dqn")
        heads = QHeads(dueling=self.dueling)
        return make_q_policy(spec, network, torso, seed, heads, self.exploration.evaluation)

    def gather(self, rows: Rows, slots: Index, starts: Index, transform: Transform) -> Sequences:
        """Sequences of `burn_in + length` rows."""
        return sequences(rows, slots, starts, self.span, transform)

    def loss(self, online: QNetworks, target: QNetworks, batch: Replayed[Sequences], progress: float) -> Loss:
        """0.5 (y - Q)^2, the mean over the learned rows of a sequence, weighted; dead rows count as 0."""
        items, begin = batch.items, self.burn_in
        obs: Any = tree.map(lambda leaf: leaf[begin:], items.obs)
        state, state_of_target = (self._burnt_in(networks.policy, items) for networks in (online, target))
        # What follows the burn-in starts from its state; where an episode starts there, the state is zeroed.
        output = online.policy.unroll(obs, state, items.first[begin:])
        with torch.no_grad():
            judged = target.policy.values(target.policy.unroll(obs, state_of_target, items.first[begin:]), obs)
            value = q_learning.double_value(online.policy.values(output.detach(), obs), judged)
            steps = q_learning.n_step(
                items.reward[begin:], items.terminated[begin:], items.valid[begin:], self.gamma, self.n_step
            )
            value = q_learning.ahead(value, steps.offset)
            if self.rescale > 0:
                value = q_learning.unscale(value, self.rescale)
            goal = q_learning.td_target(steps.reward, steps.discount, value)
            if self.rescale > 0:
                goal = q_learning.rescale(goal, self.rescale)
        q = q_learning.chosen(output[:-1], items.action[begin:])
        valid = items.valid[begin:].float()
        error = (goal - q) * valid
        loss = batch.mean(0.5 * error.square().mean(0))
        error = error.detach()
        alive = valid.sum(0).clamp(min=1)
        metrics = {
            "loss": loss.detach(),
            "q_mean": batch.average((q.detach() * valid).sum(0) / alive),
            "td_error": batch.average(error.abs().sum(0) / alive),
        }
        return Loss(loss, metrics, q_learning.sequence_priority(error, valid, self.eta))

    @torch.no_grad()
    def _burnt_in(self, policy: QPolicy, items: Sequences) -> Any:
        """The recurrent state before the first row that is learned from."""
        if not self.burn_in:
            return items.state0
        obs: Any = tree.map(lambda leaf: leaf[: self.burn_in], items.obs)
        return policy.unroll_state(obs, items.state0, items.first[: self.burn_in])[1]
