"""Learners that share the work on gradients, as the one that applies them sees them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from slipstream.descent import Gradient, added

Reduction = Literal["ordered", "all_reduce", "asynchronous"]
"""What becomes of the gradients of several learners; see `Config.reduction`."""

KINDS = ("parameters", "buffers")
"""What a section of a module holds, `MODULE.KIND`."""


class Order(NamedTuple):
    """Which loss of which networks is to be differentiated.

    Attributes:
        progress: Share of the run's steps already taken.
        version: Updates before.
        step: Number of the gradient step, for a learner that replays.
        phase: Number of the phase in it.
        delayed: Whether at the parameters of the policy that acted.
    """

    progress: float
    version: int
    step: int = 0
    phase: int = 0
    delayed: bool = False


class Ask(NamedTuple):
    """A gradient that is wanted.

    Attributes:
        order: Of what.
        parts: The minibatch, in one part per shard.
    """

    order: Order
    parts: Sequence[Any]


Own = Callable[[Order, Sequence[Any]], Sequence[Gradient]]
"""Differentiates parts of a minibatch here."""


class Team(Protocol):
    """Who differentiates.

    Parameters and optimisers are the caller's alone; the others are told what has changed since they were last asked.
    """

    def gradients(self, asks: Iterable[Ask], own: Own, *, all_now: bool) -> Generator[tuple[Ask, Gradient]]:
        """The gradients that are wanted, as they come; the caller applies each before it takes the next.

        They come in their order, each at the parameters as they are when it is asked for, which is after the one before
        it has been applied. Of asynchronous learners they come as they are ready, and each is of parameters to which
        those that came meanwhile had not been applied yet.

        Args:
            asks: What is wanted, as it becomes known.
            own: Does the caller's share.
            all_now: Whether all come now; otherwise some of those of asynchronous learners come with the next call.

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
        """`faults/*` and `lag/*`, of the last update, by name."""
        ...

    def close(self) -> None:
        """Ends the others; the second call does nothing."""
        ...


class Alone:
    """A learner without others; satisfies `Team`."""

    def gradients(self, asks: Iterable[Ask], own: Own, *, all_now: bool) -> Generator[tuple[Ask, Gradient]]:
        """All is the caller's."""
        for ask in asks:
            yield ask, added(own(*ask))

    def changed(self, *sections: str) -> None:
        """Nobody is to know."""

    def metrics(self) -> dict[str, float]:
        """None."""
        return {}

    def close(self) -> None:
        """Nothing."""
