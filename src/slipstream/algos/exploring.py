"""What algorithms that learn from replays share: rates of exploration, scaling with the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from slipstream import ranges
from slipstream.ops.q_learning import epsilons

LrScaling = Literal["none", "sqrt", "linear"]

_USUAL_BATCH = 32


@dataclass(frozen=True)
class Exploration:
    """Epsilon-greedy exploration, with a final rate for every slot.

    Attributes:
        initial: Epsilon while learning has not begun, and where its linear decay starts.
        final: Epsilon at the end of the decay, that of slot 0.
        least: Final epsilon of the last slot; between the two they are evenly spaced in the logarithm (Ape-X: 0.4 to
            0.4^8). None for the same everywhere.
        steps: Collected steps that the decay takes, from the first gradient step on.
        evaluation: Epsilon of evaluations that are not greedy.
    """

    initial: float = 1.0
    final: float = 0.01
    least: float | None = None
    steps: int = 50_000
    evaluation: float = 0.001

    def __post_init__(self) -> None:
        """Refuses numbers that mean nothing."""
        ranges.between(self, "algo.exploration.", 0, 1, "initial", "final", "evaluation")
        ranges.at_least(self, "algo.exploration.", 0, "steps")
        if self.least is not None and not 0 < self.least <= self.final:
            raise ValueError(
                f"algo.exploration.final={self.final:g} is the epsilon of the first slot and algo.exploration.least="
                f"{self.least:g} that of the last, which must be above 0 and at most as great; set least as well "
                "(none: final for all slots)"
            )

    def rates(self, steps: int, num_envs: int) -> NDArray[np.float32]:
        """Epsilon of every slot, float32 `[num_envs]`, `steps` collected steps after the first gradient step."""
        share = min(max(steps, 0) / self.steps, 1.0) if self.steps else float(steps >= 0)
        finals = epsilons(num_envs, self.final, self.final if self.least is None else self.least)
        return (self.initial + share * (finals - self.initial)).astype(np.float32)


def scaled_lr(lr: float, batch_size: int, rule: LrScaling) -> float:
    """The learning rate of a batch of 32, for one of `batch_size`."""
    power = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[rule]
    return lr * (batch_size / _USUAL_BATCH) ** power
