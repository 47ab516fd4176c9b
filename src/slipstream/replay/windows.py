"""Which windows of rows may be drawn, and drawing them: uniformly, or by priority."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from slipstream.replay.prioritized import Proportional
from slipstream.replay.ring import spans
from slipstream.replay.stored import Stored
from slipstream.types import Trajectory

Index = NDArray[np.int64]


class Drawn(NamedTuple):
    """Windows of K batches.

    Attributes:
        slot: int64 `[K, N]`.
        row: int64 `[K, N]`, number of each window's first row.
        weight: float32 `[K, N]`, importance weights, at most 1 in every batch; 1 if drawn uniformly.
    """

    slot: Index
    row: Index
    weight: NDArray[np.float32]


def there(rows: Stored, stride: int, span: int) -> tuple[Index, Index]:
    """Windows of every slot that are whole, counted in strides: the oldest, and after the newest; int64 `[B]` each."""
    return -(-rows.oldest // stride), np.maximum((rows.head - span) // stride + 1, 0)


class Windows:
    """The windows of `span` rows that begin at every `stride`-th row of every slot.

    A window may be drawn once all of its rows and the observation after them are there, until its first row makes room.
    A window of single rows (stride 1) that begins with a dead row is never drawn.

    With `alpha > 0` the draws are those of proportional prioritised replay (Schaul et al., 2016). All batches of a call
    are drawn before the first of them changes a priority, so that they can be gathered ahead.

    Args:
        rows: Where the windows lie; to be filled by `append` only.
        stride: Rows between two beginnings; 1, or the unroll.
        span: Rows that must follow a beginning (the first included).
        alpha: Exponent of the priorities; 0 draws uniformly.
    """

    def __init__(self, rows: Stored, stride: int, span: int, alpha: float = 0.0) -> None:
        self.rows = rows
        if span > rows.kept - rows.unroll:
            raise ValueError(
                f"a replay of {rows.kept * rows.slots:,} rows is too small for windows of {span} rows in {rows.slots} "
                f"slots; it needs {(span + 2 * rows.unroll) * rows.slots:,}"
            )
        self._stride, self._span = stride, span
        self._places = rows.kept // stride
        self._priorities = Proportional(rows.slots * self._places, alpha) if alpha > 0 else None
        self._begin, self._end = there(self.rows, self._stride, self._span)

    def append(self, trajectory: Trajectory) -> None:
        """Takes in a slab."""
        self.rows.append(trajectory)
        begin, end = there(self.rows, self._stride, self._span)
        if self._priorities is not None:
            self._priorities.remove(self._item(*spans(self._begin, np.minimum(begin, self._end))))
            slots, windows = spans(np.maximum(self._end, begin), end)
            drawable = self._drawable(slots, windows * self._stride)
            self._priorities.insert(self._item(slots[drawable], windows[drawable]))
        self._begin, self._end = begin, end

    def restart(self) -> None:
        """Says that the environments start afresh; see `Rows.restart`."""
        self.rows.restart()
        if self._priorities is not None and self._stride == 1:
            slots = np.flatnonzero((self._end == self.rows.head) & (self._end > 0))
            self._priorities.remove(self._item(slots, self._end[slots] - 1))

    def state(self) -> dict[str, Tensor]:
        """Copies of what a later `load` needs beside segments: `Rows.state`, and `Proportional.state` if any.

        Rows are written once, however often a replay is saved:

            state = windows.state()
            for segment in windows.since(mark): ...     # to the disk, to stay there while `rows.needed`
            mark = state["head"]
        """
        return self.rows.state() | ({} if self._priorities is None else self._priorities.state())

    def since(self, mark: Tensor | None = None) -> Iterator[dict[str, Tensor]]:
        """Segments of the rows that came after the mark; see `Rows.since`."""
        return self.rows.since(mark)

    def load(self, state: Mapping[str, Tensor], segments: Iterable[Mapping[str, Tensor]]) -> None:
        """Makes empty windows those that were saved: everything that is drawn from now on has the same bits.

        Args:
            state: From `state`.
            segments: As for `Rows.load`.

        Raises:
            KeyError: A tensor is missing.
            ValueError: As `Rows.load`.
        """
        self.rows.load(state, segments)
        self._begin, self._end = there(self.rows, self._stride, self._span)
        if self._priorities is not None:
            self._priorities.load(state)

    @property
    def priorities(self) -> Proportional | None:
        """What prioritised draws are made by; None if they are uniform."""
        return self._priorities

    @property
    def most(self) -> int:
        """The greatest number of windows that are ever there."""
        return self.rows.slots * ((self.rows.kept - self._span) // self._stride)

    @property
    def count(self) -> int:
        """Windows that are there, those that begin with a dead row included."""
        return int(np.maximum(self._end - self._begin, 0).sum())

    def rows_to(self, count: int) -> int:
        """Rows of whole slabs after which an empty replay holds that many windows, if all slots bring as many."""
        rows = (-(-count // self.rows.slots) - 1) * self._stride + self._span
        return -(-rows // self.rows.unroll) * self.rows.unroll * self.rows.slots

    def draw(self, generator: np.random.Generator, batches: int, size: int, beta: float) -> Drawn:
        """Draws K batches of N windows, with replacement.

        Args:
            generator: Source of the draws.
            batches: K.
            size: N.
            beta: Exponent of the importance weights `(count P)^-beta`, which are divided by the batch's greatest.

        Raises:
            ValueError: There is nothing to draw.
        """
        if self._priorities is None:
            slot, window = self._uniform(generator, (batches, size))
            return Drawn(slot, window * self._stride, np.ones((batches, size), np.float32))
        draws = [self._priorities.draw(generator.random(size), self.count, beta) for _ in range(batches)]
        slot, place = np.divmod(np.stack([draw.items for draw in draws]), self._places)
        begin = self._begin[slot]
        window = begin + (place - begin) % self._places
        return Drawn(slot, window * self._stride, np.stack([draw.weight for draw in draws]).astype(np.float32))

    def reprioritise(self, slots: Index, rows: Index, errors: NDArray[np.floating[Any]]) -> None:
        """Gives windows that were drawn, int64 `[N]`, the priorities of their `errors[N]`."""
        if self._priorities is not None:
            self._priorities.update(self._item(slots, rows // self._stride), errors)

    def _uniform(self, generator: np.random.Generator, shape: tuple[int, int]) -> tuple[Index, Index]:
        """Slots and windows, each as likely as any other."""
        counts = np.maximum(self._end - self._begin, 0)
        ends = counts.cumsum()
        if not ends[-1]:
            raise ValueError("the replay has nothing to draw: it is empty")
        slot, window = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        open_ = np.ones(shape, np.bool_)
        while open_.any():  # dead rows are drawn again
            picks = generator.integers(ends[-1], size=int(open_.sum()))
            slot[open_] = np.searchsorted(ends, picks, side="right")
            window[open_] = self._begin[slot[open_]] + picks - (ends - counts)[slot[open_]]
            dead = ~self._drawable(slot, window * self._stride)
            if dead.all() and not self._drawable(*spans(self._begin, self._end)).any():
                raise ValueError(f"the replay has nothing to draw: all of its {ends[-1]:,} windows begin dead")
            open_ &= dead
        return slot, window

    def _drawable(self, slots: Index, rows: Index) -> NDArray[np.bool_]:
        return self.rows.valid(slots, rows) if self._stride == 1 else np.ones(slots.shape, np.bool_)

    def _item(self, slots: Index, windows: Index) -> Index:
        """Number of a window in the tree."""
        return slots * self._places + windows % self._places
