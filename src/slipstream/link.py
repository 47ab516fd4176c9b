"""What ties the driver to an outpost: how it starts, is told what to do, answers and ends. One file per kind of tie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from slipstream.outpost import Status, Unroll
from slipstream.standing import Standing
from slipstream.tie import Tie
from slipstream.types import Place, Trajectory, Weights


class Answer(NamedTuple):
    """What an outpost says to what it was told.

    Attributes:
        lost: To `restore`: slots that are back but show something else than then.
        unroll: To `collect`: what it brought, its rows in their places; None if it was stopped.
    """

    lost: Sequence[int] = ()
    unroll: Unroll | None = None


class Link(Tie, Protocol):
    """The driver's end of a tie to one outpost; to be used by one thread at a time, but for `stop`.

    `wait` also brings `status` up to date.
    """

    @property
    def status(self) -> Status:
        """What the outpost is doing, as far as is known here."""
        ...

    @property
    def pid(self) -> int:
        """Number of its process."""
        ...

    def begin(self, seed: int, row: int) -> None:
        """Tells it to reset its environments and start afresh.

        Raises:
            ChildDied: It is not there to be told; so in `restore` and `collect`.
        """
        ...

    def restore(self, seed: int, row: int, standing: Standing) -> None:
        """Tells it to bring its slots to where they had `row` rows."""
        ...

    def collect(self, places: Sequence[Place]) -> None:
        """Tells it to fill an unroll of every lane; if its medium carries more than one, after those under way."""
        ...

    def stop(self, wanted: bool) -> None:
        """Has it stop at its next row, now and whenever it collects, until this is taken back."""
        ...

    def read(self) -> Answer:
        """The first answer that has not been read, once it has come.

        Raises:
            ChildDied: It breaks off.
            ChildFailed: It is the report of an error.
        """
        ...


class Medium(Protocol):
    """What the links of a run have in common: where rows come to and weights go out."""

    @property
    def slabs(self) -> Sequence[Trajectory]:
        """What the outposts fill."""
        ...

    @property
    def links(self) -> Sequence[Link]:
        """To the outposts, in the order of their lanes; not started yet."""
        ...

    def publish(self, weights: Weights) -> None:
        """Makes `weights` the newest."""
        ...

    def metrics(self) -> dict[str, float]:
        """Numbers of the medium, by name; may be called by any thread."""
        ...

    def close(self) -> None:
        """Ends the outposts within a few seconds; the second call does nothing."""
        ...
