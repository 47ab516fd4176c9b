"""A replay in shards, each with the rows of some slots: only what draws need to know is here.

    ShardedRows (here): which rows there are, which of them are dead
        append            -> each shard stores the columns of its slots
        gathered          -> each shard gathers its windows; they are put in their places here
        since, load       -> segments, the same as of `Rows`

Which windows are drawn, by which priorities, is not a shard's business, so that a run has the same bits whatever the
number of shards. A shard that is lost takes its rows with it: a new one begins empty, windows that were drawn from the
lost one are replaced by others, and the run is another from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from threading import Lock
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream.patience import Patience
from slipstream.replay import rows
from slipstream.replay.items import placed, taken
from slipstream.replay.ring import spans
from slipstream.replay.rows import Rows
from slipstream.replay.windows import there
from slipstream.tree import Tree
from slipstream.types import Trajectory

Index = NDArray[np.int64]
Item = TypeVar("Item")


class ShardLostError(RuntimeError):
    """A shard is gone, and its rows with it; the message says how."""


class Shelf:
    """The rows of some slots: what a shard does, wherever it is. Slots are counted from the shard's first.

    Args:
        layout: Of these slots, as `rows.part` has it.
        unroll: T.
        obs: Any observations; the tree's shape counts.
        head: int64 `[B]`, rows that each slot has brought; none of them are there.
    """

    def __init__(self, layout: Tree, unroll: int, obs: Tree, head: Index) -> None:
        self._rows = Rows(rows.allocate(layout), unroll, obs)
        self._rows.lose(np.arange(len(head)), head)
        self._segments: Iterator[dict[str, Tensor]] = iter(())

    def append(self, trajectory: Trajectory) -> Index:
        """Takes in columns of a slab; returns the oldest row of every slot."""
        self._rows.append(trajectory)
        return self._rows.oldest

    def restart(self) -> None:
        """As `Rows.restart`."""
        self._rows.restart()

    def gather(self, gather: Callable[[Rows, Index, Index], Item], slots: Index, starts: Index) -> Item:
        """As `Rows.gathered`."""
        return self._rows.gathered(gather, slots, starts)

    def since(self, mark: Tensor | None) -> None:
        """Begins with the segments of the rows that came after the mark."""
        self._segments = self._rows.since(mark)

    def segment(self) -> dict[str, Tensor] | None:
        """The next of them; None after the last."""
        return next(self._segments, None)

    def empty_for(self, state: Mapping[str, Tensor]) -> None:
        """As `Rows.empty_for`."""
        self._rows.empty_for(state)

    def fill(self, segment: Mapping[str, Tensor]) -> None:
        """As `Rows.fill`."""
        self._rows.fill(segment)

    def filled(self, state: Mapping[str, Tensor]) -> None:
        """As `Rows.filled`."""
        self._rows.filled(state)


class Shard(Protocol):
    """The tie to a `Shelf` elsewhere, which does what it is told in the order in which it is told."""

    @property
    def name(self) -> str:
        """What to call it in messages."""
        ...

    def start(self, layout: Tree, unroll: int, obs: Tree, head: Index) -> None:
        """Starts it with an empty shelf, in place of what is left of the one before; returns at once.

        Raises:
            ShardLostError: It can't be started.
        """
        ...

    def begin(self, method: str, *words: object) -> Callable[[], Any]:
        """Tells it to call a method of the shelf; returns what waits for what that returns.

        Any thread may tell it. Both raise as the method does, and `ShardLostError`.
        """
        ...

    def close(self) -> None:
        """Ends it for good."""
        ...


class ShardedRows:
    """The rows of all slots; satisfies `Stored`.

    Args:
        layout: Of all, as `rows.layout` has it.
        unroll: T.
        obs: Any observations; the tree's shape counts.
        frame_stack: As for `rows.layout`.
        shards: How many.
        stride: As for `Windows`; which windows may stand in for others.
        span: Likewise.
        restarts: How often in a row, with less than 100 slabs between, shards that were lost are replaced.

    Attributes:
        kept: Rows per slot.
        bytes: Memory that they take, over all shards.
        unroll: T.
        lost: Shards that were lost.
        replaced: Windows that were replaced by others since their shard was lost.
        parts: The slots of each shard, neighbours.
        layouts: The layout of each shard.

    Raises:
        ValueError: There are more shards than slots.
    """

    def __init__(
        self,
        layout: Tree,
        unroll: int,
        obs: Tree,
        frame_stack: int,
        shards: int,
        stride: int,
        span: int,
        restarts: int = 3,
    ) -> None:
        flags = {name: layout["columns"][name] for name in ("valid", "truncated")}
        ledger: Tree = {"obs": (), "columns": flags, "state0": ()}
        self._ledger = Rows(rows.allocate(ledger), unroll, ())
        self.kept, self.unroll, self.bytes = self._ledger.kept, unroll, rows.size(layout)
        if shards > self.slots:
            raise ValueError(f"{shards} shards of a replay want as many slots, and there are {self.slots}")
        self._stack, self._obs, self._stride, self._span = frame_stack, obs, stride, span
        ends = [self.slots * number // shards for number in range(shards + 1)]
        self.parts = [slice(first, last) for first, last in pairwise(ends)]
        self._ends = np.array(ends[1:])
        self.layouts = [rows.part(layout, part) for part in self.parts]
        self._shards: Sequence[Shard] = ()
        then = "its rows are lost, and an empty one takes its place"
        self._patience = [Patience[ShardLostError](restarts, then) for _ in self.parts]
        self._slabs = self.lost = self.replaced = 0
        self._gone: dict[int, ShardLostError] = {}  # since the last slab, by number
        self._noting = Lock()  # of what is gone: several threads gather

    def start(self, shards: Sequence[Shard]) -> None:
        """Starts the shards, as many as there are parts; returns at once."""
        self._shards = shards
        for number in range(len(shards)):
            self._start(number)

    def close(self) -> None:
        """Ends the shards; the second call does nothing."""
        for shard in self._shards:
            shard.close()

    @property
    def slots(self) -> int:
        """B."""
        return self._ledger.slots

    @property
    def head(self) -> Index:
        """As of `Rows`."""
        return self._ledger.head

    @property
    def oldest(self) -> Index:
        """As of `Rows`."""
        return self._ledger.oldest

    def append(self, trajectory: Trajectory) -> None:
        """Takes in a slab; shards that were lost since the last one are replaced before.

        Raises:
            ShardLostError: One can't be replaced, or too many were lost in a row.
        """
        self._mend()
        self._slabs += 1
        self._ledger.append(replace(trajectory, obs=()))
        owner = self._owner(trajectory.slot.numpy())
        waits: list[tuple[int, Callable[[], Index | None]]] = []
        for number, part in enumerate(self.parts):
            columns = np.flatnonzero(owner == number)
            if len(columns):
                own = taken(trajectory, columns)
                waits.append((number, self._begin(number, "append", _renumbered(own, -part.start))))
        for number, wait in waits:
            if (oldest := wait()) is not None:
                mine = self._ledger.oldest[self.parts[number]]
                np.maximum(mine, oldest, out=mine)

    def restart(self) -> None:
        """As of `Rows`."""
        self._ledger.restart()
        for wait in [self._begin(number, "restart") for number in range(len(self.parts))]:
            wait()

    def gathered(self, gather: Callable[[Rows, Index, Index], Item], slots: Index, starts: Index) -> Item:
        """As of `Stored`.

        Raises:
            ShardLostError: No window is left.
        """
        owner = self._owner(slots)
        waits: list[tuple[int, Index, Callable[[], Item | None]]] = []
        for number, part in enumerate(self.parts):
            places = np.flatnonzero(owner == number)
            if len(places):
                wait = self._begin(number, "gather", gather, slots[places] - part.start, starts[places])
                waits.append((part.start, places, wait))
        answers = [(first, places, wait()) for first, places, wait in waits]
        found = [(places, _renumbered(items, first)) for first, places, items in answers if items is not None]
        if sum(len(places) for places, _ in found) == len(slots):
            return placed(found, len(slots))
        lost = np.concatenate([places for _, places, items in answers if items is None])
        slots, starts = slots.copy(), starts.copy()
        slots[lost], starts[lost] = self._others(len(lost))
        with self._noting:
            self.replaced += len(lost)
        return self.gathered(gather, slots, starts)

    def valid(self, slots: Index, rows: Index) -> NDArray[np.bool_]:
        """As of `Rows`."""
        return self._ledger.valid(slots, rows)

    def metrics(self) -> dict[str, float]:
        """Shards that were lost, and windows that others stood in for."""
        return {"faults/lost_shards": float(self.lost), "faults/replaced_windows": float(self.replaced)}

    def state(self) -> dict[str, Tensor]:
        """As of `Rows`, and the same."""
        return self._ledger.state()

    def since(self, mark: Tensor | None = None) -> Iterator[dict[str, Tensor]]:
        """As of `Rows`; each segment has rows of one shard.

        Raises:
            ShardLostError: A shard was lost; after the next slab it works again.
        """
        for number, part in enumerate(self.parts):
            self._begin(number, "since", None if mark is None else mark[part])()
            while (segment := self._begin(number, "segment")()) is not None:
                yield segment | {name: self._spread(part, segment[name]) for name in ("begin", "end")}
            if number in self._gone:
                raise self._gone[number]

    def load(self, state: Mapping[str, Tensor], segments: Iterable[Mapping[str, Tensor]]) -> None:
        """As of `Rows`; whatever the number of shards was."""
        self._ledger.empty_for(state)
        own = [self._own(state, part) for part in self.parts]
        self._each("empty_for", own)

        def shared_out() -> Iterator[Mapping[str, Tensor]]:
            for segment in segments:
                self._each("fill", [rows.narrowed(segment, part, self.unroll, self._stack) for part in self.parts])
                yield segment

        self._ledger.load(state, shared_out())
        self._each("filled", own)

    def _others(self, count: int) -> tuple[Index, Index]:
        """Windows of shards that are left, evenly spread over them: slots and first rows."""
        begin, end = there(self, self._stride, self._span)
        with self._noting:
            gone = dict(self._gone)
        for number in gone:
            end[self.parts[number]] = 0
        slots, windows = spans(begin, end)
        if self._stride == 1:
            alive = self.valid(slots, windows)
            slots, windows = slots[alive], windows[alive]
        if not len(slots):
            raise next(iter(gone.values()))
        picks = np.linspace(0, len(slots) - 1, count).astype(np.int64)
        return slots[picks], windows[picks] * self._stride

    def _each(self, method: str, words: Sequence[object]) -> None:
        """Has every shard do the same with its own."""
        for wait in [shard.begin(method, word) for shard, word in zip(self._shards, words, strict=True)]:
            wait()

    def _own(self, state: Mapping[str, Tensor], part: slice) -> dict[str, Tensor]:
        """A shard's part of a state."""
        slots, kept, unroll = state["shape"].tolist()
        shape = torch.tensor([len(range(slots)[part]), kept, unroll])
        return {name: state[name][part] for name in ("head", "oldest", "running")} | {"shape": shape}

    def _spread(self, part: slice, numbers: Tensor) -> Tensor:
        """Numbers of a shard's slots, for all slots."""
        every = torch.zeros(self.slots, dtype=numbers.dtype)
        every[part] = numbers
        return every

    def _owner(self, slots: Index) -> Index:
        """Numbers of the shards that have the slots."""
        return np.searchsorted(self._ends, slots, side="right")

    def _note(self, number: int, error: ShardLostError) -> None:
        with self._noting:
            self._gone.setdefault(number, error)

    def _start(self, number: int) -> None:
        self._shards[number].start(self.layouts[number], self.unroll, self._obs, self.head[self.parts[number]])

    def _mend(self) -> None:
        """Replaces shards that were lost."""
        for number, error in sorted(self._gone.items()):
            self._patience[number].pause(error, "", self._slabs)
            slots = np.arange(self.slots)[self.parts[number]]
            self._ledger.lose(slots, self.head[slots])
            self._start(number)
            self.lost += 1
        self._gone.clear()

    def _begin(self, number: int, method: str, *words: object) -> Callable[[], Any]:
        """As `Shard.begin`; returns None instead of what a shard that is lost would have said."""
        if number in self._gone:
            return _nothing
        try:
            wait = self._shards[number].begin(method, *words)
        except ShardLostError as error:
            self._note(number, error)
            return _nothing

        def outcome() -> Any:
            try:
                return wait()
            except ShardLostError as error:
                self._note(number, error)
                return None

        return outcome


def _renumbered(items: Item, by: int) -> Item:
    """Items whose slots, if they have any, are counted from another."""
    return replace(items, slot=items.slot + by) if isinstance(items, Trajectory) else items


def _nothing() -> None:
    """What a shard that is lost says."""
