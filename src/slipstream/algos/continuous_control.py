"""What SAC, TD3 and DDPG share: everything but networks and losses."""

from __future__ import annotations

from typing import ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from slipstream.algos.algorithm import Correction, anneal
from slipstream.algos.replaying import Index, Loss, Replayed
from slipstream.replay.items import Transform, Transitions, transitions
from slipstream.replay.options import ReplayOptions
from slipstream.replay.rows import Rows


class ContinuousControl(Protocol):
    """Learning from transitions of n steps, with targets that follow slowly, after a start with random actions."""

    correction: ClassVar[Correction] = "off_policy"
    max_lag: ClassVar[int | None] = None
    replays: ClassVar[Literal[True]] = True

    lr: float
    anneal_lr: bool
    gamma: float
    n_step: int
    tau: float
    replay: ReplayOptions
    eps: float

    @property
    def span(self) -> int:
        """Rows of a return: `n_step`."""
        return self.n_step

    def stride(self, unroll: int) -> int:
        """1: any row."""
        return 1

    @property
    def optimizer_eps(self) -> float:
        """Epsilon."""
        return self.eps

    def gather(self, rows: Rows, slots: Index, starts: Index, transform: Transform) -> Transitions:
        """Transitions of n steps."""
        return transitions(rows, slots, starts, self.n_step, self.gamma, transform)

    def target_mix(self, gradient_step: int, before: float, now: float) -> float:
        """Tau, after every gradient step."""
        return self.tau

    def exploration_rates(self, steps: int, num_envs: int) -> NDArray[np.float32]:
        """1 while learning has not begun, then 0: from there on the policies explore by themselves."""
        return np.full(num_envs, float(steps < self.replay.learning_starts), np.float32)

    def learning_rate(self, progress: float, num_envs: int) -> float:
        """Constant, or linear to 0."""
        return anneal(self.lr, progress, self.anneal_lr)


def squared_errors(batch: Replayed[Transitions], q: Tensor, goal: Tensor) -> Loss:
    """sum_i 0.5 (y - Q_i)^2, weighted; the priorities are the mean of |y - Q_i|.

    Args:
        batch: Its weights.
        q: float32 `[C, N]`, of each critic.
        goal: float32 `[N]`, y.
    """
    error = goal - q
    loss = batch.mean(0.5 * error.square().sum(0))
    metrics = {"critic_loss": loss.detach(), "q_mean": batch.average(q.detach().mean(0))}
    return Loss(loss, metrics, error.detach().abs().mean(0))
