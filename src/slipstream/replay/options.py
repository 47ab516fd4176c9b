"""What an algorithm asks of its replay."""

from __future__ import annotations

from dataclasses import dataclass

from slipstream import ranges


@dataclass(frozen=True)
class ReplayOptions:
    """Size and use of a replay.

    Attributes:
        capacity: Rows kept, over all environments.
        ratio: Gradient steps per step collected; exact over the run, fractions are carried.
        learning_starts: Steps collected, with random actions, before the first gradient step.
        alpha: Exponent of the priorities (alpha of prioritised replay); 0 draws uniformly.
        beta: Exponent of the importance weights at the start, which grows linearly to 1 over the run.
        memory_map: Whether the rows lie in a file without a name in the run directory's file system instead of memory.
    """

    capacity: int = 1_000_000
    ratio: float = 0.25
    learning_starts: int = 10_000
    alpha: float = 0.0
    beta: float = 0.4
    memory_map: bool = False

    def __post_init__(self) -> None:
        """Refuses numbers that mean nothing."""
        ranges.at_least(self, "algo.replay.", 1, "capacity")
        ranges.at_least(self, "algo.replay.", 0, "learning_starts", "alpha")
        ranges.above(self, "algo.replay.", 0, "ratio")
        ranges.between(self, "algo.replay.", 0, 1, "beta")
