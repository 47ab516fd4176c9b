"""Learners that share the shards of a gradient, as the one that applies it sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

from slipstream.descent import Gradient, added

Reduction = Literal["ordered", "all_reduce"]
"""How the gradients of several learners are added: shard by shard in their order, or as is fastest."""

KINDS = ("parameters", "buffers")
"""What a section of a module holds, `MODULE.KIND`."""


class Order(NamedTuple):
    """Which loss of which networks is to be differentiated.

    Attributes:
        progress: Share of the run's steps already taken.
        step: Number of the gradient step, for a learner that replays.
        phase: Number of the phase in it.
        delayed: Whether at the parameters of the policy that acted.
    """

    progress: float
    step: int = 0
    phase: int = 0
    delayed: bool = False


class Team(Protocol):
    """Who differentiates the shards of a minibatch.

    Parameters and optimisers are the caller's alone; the others are told what has changed since they were last asked.
    """

    def ask(self, order: Order, parts: Sequence[Any]) -> int:
        """Has the others differentiate their parts of a minibatch.

        Args:
            order: What loss.
            parts: The shards, in their order.

        Returns:
            How many of them, the first ones, are the caller's own.
        """
        ...

    def total(self, own: Sequence[Gradient]) -> Gradient:
        """The sum of the gradients of all shards, given those of the caller; waits for the others.

        Raises:
            RuntimeError: Another learner failed, with its traceback.
        """
        ...

    def changed(self, *sections: str) -> None:
        """Says that tensors have other values than when the others were last asked.

        Args:
            sections: `MODULE.KIND` of an `Objective`'s modules; none for all.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """`faults/*`, by name."""
        ...

    def close(self) -> None:
        """Ends the others; the second call does nothing."""
        ...


class Alone:
    """A learner without others; satisfies `Team`."""

    def ask(self, order: Order, parts: Sequence[Any]) -> int:
        """All are the caller's."""
        return len(parts)

    def total(self, own: Sequence[Gradient]) -> Gradient:
        """Their sum."""
        return added(own)

    def changed(self, *sections: str) -> None:
        """Nobody is to know."""

    def metrics(self) -> dict[str, float]:
        """None."""
        return {}

    def close(self) -> None:
        """Nothing."""
