"""The rows of all slots, as far back as there is room: what every kind of replay reads from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream import tree
from slipstream.ops.rounds import rounds
from slipstream.replay.frames import Frames
from slipstream.replay.ring import put, spans
from slipstream.tree import Tree
from slipstream.types import Trajectory

Array = NDArray[Any]
Index = NDArray[np.int64]
Item = TypeVar("Item")

_ALWAYS = ("action", "reward", "terminated", "truncated", "valid")

SEGMENT = 256 * 2**20
"""Bytes of a segment, about."""

_CHANGED = 2  # rows at a slot's end that a restart changes


def layout(like: Tree, capacity: int, frame_stack: int, names: Collection[str] = ()) -> Tree:
    """What the rows of all slots consist of, as tensors without memory.

    Args:
        like: A slab's layout, as `slab.layout` has it.
        capacity: Rows over all slots, rounded down to whole unrolls of every slot.
        frame_stack: Frames that an observation stacks along its first axis; each is stored once. 1 for none.
        names: Columns to keep beside action, reward and flags: `log_prob`, `version`, `state0` (one per unroll), and
            names of extras.

    Raises:
        ValueError: If there is no room for two unrolls per slot.
    """
    unroll, slots = like["reward"].shape
    unrolls = capacity // (slots * unroll)
    if unrolls < 2:
        raise ValueError(
            f"a replay of {capacity:,} rows has no room for two unrolls of {slots} slots x {unroll} rows; it needs "
            f"{2 * slots * unroll:,}"
        )
    kept = unrolls * unroll

    def column(name: str) -> Tensor:
        leaf = like[name] if name in like else like["extras"][name]
        return torch.empty((slots, kept, *leaf.shape[2:]), dtype=leaf.dtype, device="meta")

    def state(leaf: Tensor) -> Tensor:
        return torch.empty((slots, unrolls, *leaf.shape[1:]), dtype=leaf.dtype, device="meta")

    def observation(leaf: Tensor) -> dict[str, Tensor]:
        one = leaf[0, 0]
        if frame_stack > 1 and one.dim() > 1 and one.shape[0] == frame_stack:
            return Frames.layout(one, slots, kept)
        return {"whole": torch.empty((slots, kept, *one.shape), dtype=one.dtype, device="meta")}

    return {
        "obs": tuple(observation(leaf) for leaf in tree.leaves(like["obs"])),
        "columns": {name: column(name) for name in (*_ALWAYS, *names) if name != "state0"},
        "state0": tree.map(state, like["state0"]) if "state0" in names else (),
    }


def part(memory: Tree, slots: slice) -> Tree:
    """The layout for some of the slots, as many rows of each."""
    obs = [{name: leaf if name == "stack" else leaf[slots] for name, leaf in store.items()} for store in memory["obs"]]
    return {"obs": tuple(obs), **tree.map(lambda leaf: leaf[slots], {k: memory[k] for k in ("columns", "state0")})}


def size(memory: Tree) -> int:
    """Bytes of a layout, or of the memory for one."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree.leaves(memory))


def allocate(memory: Tree) -> Tree:
    """Zeros for a layout; the system finds memory for them when they are first written."""

    def zeros(leaf: Tensor) -> Tensor:  # torch's write to all of it at once: seconds for a replay of Atari
        return torch.from_numpy(np.zeros(leaf.shape, torch.empty(0, dtype=leaf.dtype).numpy().dtype))

    return tree.map(zeros, memory)


def needed(end: Tensor, oldest: Tensor) -> bool:
    """Whether some rows of a segment are still there, so that a `load` of this state has to be given it.

    Args:
        end: The segment's `end`.
        oldest: The state's `oldest`. Of several states that may be loaded, the earliest has the lowest.
    """
    return bool((end > oldest).any())


def narrowed(segment: Mapping[str, Tensor], part: slice, unroll: int, frame_stack: int) -> dict[str, Tensor]:
    """Of a segment, what is of some slots, neighbours, which are counted from the first of them.

    Args:
        segment: From `Rows.since`.
        part: The slots.
        unroll: T.
        frame_stack: As for `layout`.
    """
    begin, end = segment["begin"].numpy(), segment["end"].numpy()
    some = end > begin

    def within(counts: Index) -> slice:
        return slice(int(counts[: part.start].sum()), int(counts[: part.stop].sum()))

    columns, states = within(end - begin), within(-(-end // unroll) + begin // -unroll)
    shown = end - begin + some
    own = {"begin": segment["begin"][part], "end": segment["end"][part]}
    for name, value in segment.items():
        kind, _, leaf = name.partition(".")
        if kind in ("columns", "state0"):
            own[name] = value[columns if kind == "columns" else states]
        elif leaf.endswith("frames"):
            newest = segment[f"{name.removesuffix('frames')}newest"].numpy()
            own[name] = value[within(Frames.counts(newest, shown, frame_stack))]
        elif kind == "obs":
            own[name] = value[within(shown)]
    return own


class Rows:
    """A ring of rows per slot, filled with slabs in the order (slab, column, row), never in that of arrival.

    Rows of a slot are numbered from the start of the run; row r lies at place r modulo `kept`. Row `head` is the next
    to come: its observation, the successor of the last row, is known already. Dead rows are kept, since their
    observation is that which truly followed; nobody learns from them.

    Args:
        memory: Tensors as `layout` has them.
        unroll: T, rows that a slab brings per column.
        obs: Any observations; the tree's shape counts.

    Attributes:
        kept: Rows per slot, a multiple of T.
        bytes: Memory that they take.
        unroll: T.
        head: int64 `[B]`, rows that each slot has brought.
        oldest: int64 `[B]`, the oldest row that is still whole; `head` if there is none.
    """

    def __init__(self, memory: Tree, unroll: int, obs: Tree) -> None:
        self._columns: dict[str, Tensor] = memory["columns"]
        self._flat = {name: value.flatten(0, 1) for name, value in self._columns.items()}
        self._valid: NDArray[np.bool_] = self._columns["valid"].numpy()
        slots, self.kept = self._valid.shape
        self.bytes = size(memory)
        self.unroll = unroll
        self.head, self.oldest = np.zeros(slots, np.int64), np.zeros(slots, np.int64)
        self._obs_tree = obs
        self._stores = [Frames(store) if "frames" in store else _Whole(store["whole"]) for store in memory["obs"]]
        self._state0: Tree = memory["state0"]
        self._running = np.zeros(slots, np.bool_)
        self._filled = np.zeros(slots, np.int64), np.zeros(slots, np.int64)  # by a load: from where on without a gap

    @property
    def slots(self) -> int:
        """B."""
        return len(self.head)

    @property
    def _shape(self) -> list[int]:
        return [self.slots, self.kept, self.unroll]

    def append(self, trajectory: Trajectory) -> None:
        """Takes in a slab; each slot's oldest rows make room."""
        for columns in rounds(trajectory.slot):
            self._append(trajectory, columns.numpy())

    def restart(self) -> None:
        """Says that the environments start afresh: the next rows don't follow the last.

        The successor of every slot's last row is lost. The row is made the dead one of a truncated episode.
        """
        slots = np.flatnonzero(self._running)
        last = (self.head[slots] - 1) % self.kept
        before = (last - 1) % self.kept
        going = slots[self._valid[slots, before] & self._valid[slots, last]]
        self._columns["truncated"].numpy()[going, (self.head[going] - 2) % self.kept] = True
        self._valid[slots, last] = False
        self._running[:] = False

    def lose(self, slots: Index, head: Index) -> None:
        """Says that all rows of `slots` are gone, of which they have brought `head`; the next do not follow them."""
        self.head[slots] = self.oldest[slots] = head
        self._running[slots] = False

    def gathered(self, gather: Callable[[Rows, Index, Index], Item], slots: Index, starts: Index) -> Item:
        """As `Stored.gathered`."""
        return gather(self, slots, starts)

    def obs(self, slots: Index, rows: Index) -> Tree:
        """Observations `[N, *O]` of rows between `oldest` and `head`, both included."""
        stores = iter(self._stores)
        return tree.map(lambda _: next(stores).read(slots, rows), self._obs_tree)

    def column(self, name: str, slots: Index, rows: Index) -> Tensor:
        """Entries `[*N, ...]` of a stored column, for indices of any shape `[*N]`."""
        places = torch.from_numpy((slots * self.kept + rows % self.kept).ravel())
        return self._flat[name].index_select(0, places).unflatten(0, rows.shape)

    def valid(self, slots: Index, rows: Index) -> NDArray[np.bool_]:
        """Which rows are no dead ones, bool `[*N]`."""
        return self._valid[slots, rows % self.kept]

    def metrics(self) -> dict[str, float]:
        """None: nothing is ever lost."""
        return {}

    def state0(self, slots: Index, rows: Index) -> Tree:
        """Recurrent states `[N, ...]` before rows that began an unroll."""
        index = torch.from_numpy(slots), torch.from_numpy(rows // self.unroll % (self.kept // self.unroll))
        return tree.map(lambda leaf: leaf[index], self._state0)

    def state(self) -> dict[str, Tensor]:
        """Copies of what a later `load` needs beside segments: int64 `head` and `oldest`, bool `running`, all `[B]`.

        And `shape` int64 `[3]`: slots, rows kept of each, and rows of an unroll.
        """
        return {
            "head": torch.from_numpy(self.head.copy()),
            "oldest": torch.from_numpy(self.oldest.copy()),
            "running": torch.from_numpy(self._running.copy()),
            "shape": torch.tensor(self._shape),
        }

    def since(self, mark: Tensor | None = None, limit: int = SEGMENT) -> Iterator[dict[str, Tensor]]:
        """Segments of the rows that came after the mark and are still there, made one by one; none may come meanwhile.

        A segment is a flat dictionary of contiguous tensors that share no memory with the replay:

            begin, end      int64 [B]       rows `begin[s] .. end[s]-1` of slot s; both 0 where it has none
            columns.NAME    [N, ...]        their entries, slot by slot
            state0.LEAF     [U, ...]        recurrent states before those of them that began an unroll
            obs.LEAF.NAME   [M, ...]        their observations and that of row `end[s]`, as the store has them

        It does not refer to other segments: a frame that its first row shares with the row before is in it. It begins
        two rows early, because a `restart` changes the last two, and replaces the observation after them.

        Args:
            mark: int64 `[B]`, `head` of the state that the last segments were saved with; None for all that is there.
            limit: Bytes of a segment, about: that many rows of the mean size. It is up to k times as many where most
                rows begin a new stack of k frames.

        Raises:
            ValueError: If the mark is ahead of the replay.
        """
        before = np.zeros_like(self.head) if mark is None else mark.numpy()
        if (before > self.head).any():
            raise ValueError(f"the rows {self.head.tolist()} of the slots have not come to {before.tolist()} yet")
        begin, end = np.maximum(before - _CHANGED, self.oldest), self.head.copy()
        length = max(limit * self.kept // self.bytes, 1)
        starts = range(0, int((end - begin).max()), length)
        return (self._segment(begin + start, np.minimum(begin + start + length, end)) for start in starts)

    def load(self, state: Mapping[str, Tensor], segments: Iterable[Mapping[str, Tensor]]) -> None:
        """Makes an empty replay the one that was saved: all that is read, and all that comes, is the same from now on.

        Args:
            state: From `state`.
            segments: From `since`, oldest first: all up to those that the state was saved with, but for such as are
                not `needed` any more. They are read one by one.

        Raises:
            KeyError: A tensor is missing.
            ValueError: If the replay is not empty, or not laid out as the one that was saved, or if rows are missing;
                what it holds then is not defined.
        """
        self.empty_for(state)
        for segment in segments:
            self.fill(segment)
        self.filled(state)

    def empty_for(self, state: Mapping[str, Tensor]) -> None:
        """Begins a `load`, which goes on with `fill` for all segments and ends with `filled`; all raise as it does."""
        if self.head.any():
            raise ValueError("a replay that holds rows cannot be loaded; make a new one")
        if (shape := state["shape"].tolist()) != self._shape:
            saved, own = ("{} slots x {} rows in unrolls of {}".format(*each) for each in (shape, self._shape))
            raise ValueError(f"a replay of {saved} was saved, and this one has {own}; make one of the same settings")
        self._filled = np.zeros_like(self.head), np.zeros_like(self.head)

    def fill(self, segment: Mapping[str, Tensor]) -> None:
        """Takes in the next segment."""
        first, last = segment["begin"].numpy(), segment["end"].numpy()
        self._put(segment, first, last)
        begin, end = self._filled
        some = last > first
        self._filled = np.where(some & (first > end), first, begin), np.where(some, last, end)

    def filled(self, state: Mapping[str, Tensor]) -> None:
        """Has the rows be those of `state`."""
        head, oldest, (begin, end) = state["head"].numpy(), state["oldest"].numpy(), self._filled
        if (((begin > oldest) | (end != head)) & (oldest < head)).any():
            raise ValueError(
                f"the segments bring rows {begin.tolist()} to {end.tolist()} of the slots, and {oldest.tolist()} to "
                f"{head.tolist()} were there; some are missing, or they are out of order"
            )
        self.head[:], self.oldest[:], self._running[:] = head, oldest, state["running"].numpy()

    def _segment(self, begin: Index, end: Index) -> dict[str, Tensor]:
        """Copies of rows `begin[s] .. end[s]-1` of every slot s, and of the observation after them."""
        some = end > begin
        begin, end = np.where(some, begin, 0), np.where(some, end, 0)
        slots, rows = spans(begin, end)
        owners, unrolls = spans(*self._unrolls(begin, end))
        states = tree.leaves(self.state0(owners, unrolls * self.unroll))
        segment = {"begin": torch.from_numpy(begin), "end": torch.from_numpy(end)}
        segment |= {f"columns.{name}": self.column(name, slots, rows) for name in self._columns}
        segment |= {f"state0.{leaf}": state for leaf, state in enumerate(states)}
        for leaf, store in enumerate(self._stores):
            segment |= {f"obs.{leaf}.{name}": value for name, value in store.saved(begin, end + some).items()}
        return segment

    def _put(self, segment: Mapping[str, Tensor], begin: Index, end: Index) -> None:
        """Writes what `_segment` returned."""
        rows, unrolls = spans(begin, end), spans(*self._unrolls(begin, end))
        for name, column in self._columns.items():
            put(column, *rows, segment[f"columns.{name}"])
        for leaf, ring in enumerate(tree.leaves(self._state0)):
            put(ring, *unrolls, segment[f"state0.{leaf}"])
        for leaf, store in enumerate(self._stores):
            prefix = f"obs.{leaf}."
            own = {name.removeprefix(prefix): value for name, value in segment.items() if name.startswith(prefix)}
            store.load(own, begin, end + (end > begin))

    def _unrolls(self, begin: Index, end: Index) -> tuple[Index, Index]:
        """Of the unrolls that begin in rows `begin .. end-1`, the first, and after the last."""
        return -(-begin // self.unroll), -(-end // self.unroll)

    def _append(self, trajectory: Trajectory, columns: Index) -> None:
        """Takes in columns of different slots."""
        slots = trajectory.slot.numpy()[columns]
        head, new = self.head[slots], ~self._running[slots]
        every = len(columns) == trajectory.columns
        for store, leaf in zip(self._stores, tree.leaves(trajectory.obs), strict=True):
            obs = leaf.numpy() if every else leaf.numpy()[:, columns]
            if new.any():
                store.write(obs[:1, new], slots[new], head[new], follows=False)
            store.write(obs[1:], slots, head + 1, follows=True)
        places = (head + np.arange(self.unroll)[:, None]) % self.kept
        given = vars(trajectory) | trajectory.extras
        for name, value in self._columns.items():
            value.numpy()[slots, places] = given[name][: self.unroll].numpy()[:, columns]

        def keep(to: Tensor, state: Tensor) -> None:
            to.numpy()[slots, head // self.unroll % to.shape[1]] = state.numpy()[columns]

        if self._state0 != ():
            tree.map(keep, self._state0, trajectory.state0)
        self._running[slots] = True
        self.head[slots] += self.unroll
        # The observation of row `head` has taken the place of row `head - kept`.
        self.oldest = np.maximum(self.oldest, self.head - self.kept + 1)
        for store in self._stores:
            self.oldest = store.oldest(self.oldest, self.head)


class _Whole:
    """Observations as they are, `[B, kept, *O]`."""

    def __init__(self, memory: Tensor) -> None:
        self._array: Array = memory.numpy()
        self._flat = memory.flatten(0, 1)

    def write(self, obs: Array, slots: Index, rows: Index, follows: bool) -> None:
        """As `Frames.write`."""
        places = (rows + np.arange(len(obs))[:, None]) % self._array.shape[1]
        self._array[slots, places] = obs

    def read(self, slots: Index, rows: Index) -> Tensor:
        """As `Frames.read`."""
        kept = self._array.shape[1]
        return self._flat.index_select(0, torch.from_numpy(slots * kept + rows % kept))

    def saved(self, begin: Index, end: Index) -> dict[str, Tensor]:
        """As `Frames.saved`; the observations are `whole` `[N, *O]`."""
        return {"whole": self.read(*spans(begin, end))}

    def load(self, tensors: Mapping[str, Tensor], begin: Index, end: Index) -> None:
        """As `Frames.load`."""
        put(torch.from_numpy(self._array), *spans(begin, end), tensors["whole"])

    def oldest(self, oldest: Index, head: Index) -> Index:
        """Nothing is overwritten early."""
        return oldest
