"""What draws, learners and checkpoints want of the rows of a replay, wherever they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from slipstream.types import Trajectory

if TYPE_CHECKING:
    from slipstream.replay.rows import Rows

Index = NDArray[np.int64]
Item = TypeVar("Item")


class Stored(Protocol):
    """The rows of all slots, wherever they lie; attributes and methods as of `Rows`."""

    kept: int
    bytes: int
    unroll: int

    @property
    def slots(self) -> int:
        """B."""
        ...

    @property
    def head(self) -> Index:
        """int64 `[B]`, rows that each slot has brought."""
        ...

    @property
    def oldest(self) -> Index:
        """int64 `[B]`, the oldest row that is still whole; `head` if there is none."""
        ...

    def append(self, trajectory: Trajectory) -> None:
        """Takes in a slab."""
        ...

    def restart(self) -> None:
        """Says that the environments start afresh."""
        ...

    def gathered(self, gather: Callable[[Rows, Index, Index], Item], slots: Index, starts: Index) -> Item:
        """Windows that begin at rows `starts` of `slots`, int64 `[N]` each, as `gather` makes them of rows."""
        ...

    def valid(self, slots: Index, rows: Index) -> NDArray[np.bool_]:
        """Which rows are no dead ones."""
        ...

    def metrics(self) -> dict[str, float]:
        """`faults/*`, since the start or resume."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What a later `load` needs beside segments."""
        ...

    def since(self, mark: Tensor | None = None) -> Iterator[dict[str, Tensor]]:
        """Segments of the rows that came after the mark."""
        ...

    def load(self, state: Mapping[str, Tensor], segments: Iterable[Mapping[str, Tensor]]) -> None:
        """Makes an empty replay the one that was saved."""
        ...
