"""What an algorithm asks of its replay."""

from __future__ import annotations

from dataclasses import dataclass

from slipstream import ranges

LEAST_RATIO = 1e-6
"""Gradient steps per step collected, at least. Its inverse is the greatest denominator of a ratio as a fraction."""


@dataclass(frozen=True)
class ReplayOptions:
    """Size and use of a replay.

    Attributes:
        capacity: Rows kept, over all environments.
        ratio: Gradient steps per step collected, at least a millionth; exact over the run, fractions are carried.
        learning_starts: Steps collected before the first gradient step, with the exploration of the start: actions are
            random with probability exploration.initial, and all of them for continuous actions.
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
        ranges.at_least(self, "algo.replay.", LEAST_RATIO, "ratio")
        ranges.finite(self, "algo.replay.", "ratio", "alpha")
        ranges.between(self, "algo.replay.", 0, 1, "beta")


@dataclass(frozen=True)
class UnrollReplay:
    """A replay of whole unrolls beside the fresh ones, for actor-critics.

    Attributes:
        proportion: Replayed unrolls per fresh one (p of p:1), exact in every update; 0 for no replay.
        capacity: Rows kept, over all environments; the oldest unrolls make room.
        clone_policy: Weight of KL(mu || pi) on replayed rows, per nat: the policy is to stay near the one that acted.
        clone_value: Weight of (V - V_mu)^2 on replayed rows: so are its values.
        trust_region: Greatest KL(mu || pi) of a replayed or fresh row that is learned from, in nats; 0 for no bound.
        memory_map: Whether the rows lie in a file without a name in the run directory's file system instead of memory.
    """

    proportion: float = 0.0
    capacity: int = 100_000
    clone_policy: float = 0.0
    clone_value: float = 0.0
    trust_region: float = 0.0
    memory_map: bool = False

    def __post_init__(self) -> None:
        """Refuses numbers that mean nothing."""
        ranges.at_least(self, "algo.replay.", 0, "proportion", "clone_policy", "clone_value", "trust_region")
        ranges.finite(self, "algo.replay.", "proportion", "clone_policy", "clone_value")
        ranges.at_least(self, "algo.replay.", 1, "capacity")
        if self.clones and not self.proportion:
            raise ValueError(
                "algo.replay.clone_policy and clone_value are for replayed rows: set algo.replay.proportion"
            )

    @property
    def clones(self) -> bool:
        """Whether the loss has a term of cloning."""
        return self.clone_policy > 0 or self.clone_value > 0

    @property
    def remembers(self) -> bool:
        """Whether the distribution that acted has to be stored, not only its log-probabilities."""
        return self.clone_policy > 0 or self.trust_region > 0
