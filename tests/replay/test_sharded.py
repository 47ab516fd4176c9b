"""A replay in shards has the rows of one that is whole, whatever the number of shards; a lost shard takes its own."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream import tree
from slipstream.replay import rows
from slipstream.replay.items import placed, sequences, taken, transitions, unrolls
from slipstream.replay.rows import Rows
from slipstream.replay.sharded import ShardedRows, ShardLostError, Shelf
from slipstream.replay.stored import Stored
from slipstream.replay.windows import Windows
from tests.replay.streams import STACK, Stream, like, slab
from tests.replay.test_rows import NAMES, made

SLOTS, UNROLL = 5, 3


class Here:
    """A shard in this process, whose words are pickled on their way, and which can be lost."""

    def __init__(self, name: str = "shard") -> None:
        self.name = name
        self.starts = 0
        self.dies_before: str | None = None

    def start(self, layout: Any, unroll: int, obs: Any, head: np.ndarray) -> None:
        self.starts += 1
        self.shelf: Shelf | None = Shelf(layout, unroll, obs, head.copy())

    def begin(self, method: str, *words: object) -> Callable[[], Any]:
        if method == self.dies_before:
            self.shelf, self.dies_before = None, None
        if self.shelf is None:
            raise ShardLostError(f"the {self.name} has died")
        found = getattr(self.shelf, method)(*pickle.loads(pickle.dumps(words)))
        return lambda: pickle.loads(pickle.dumps(found))

    def close(self) -> None:
        self.shelf = None


def sharded(
    count: int, capacity: int, frame_stack: int = STACK, restarts: int = 3, stride: int = 1
) -> tuple[ShardedRows, list[Here]]:
    layout = rows.layout(like(SLOTS, UNROLL), capacity, frame_stack, NAMES)
    obs = like(SLOTS, UNROLL)["obs"]
    stored = ShardedRows(layout, UNROLL, obs, frame_stack, count, stride, UNROLL, restarts)
    shards = [Here(f"shard {number}") for number in range(count)]
    stored.start(shards)
    return stored, shards


def slabs(seed: int, count: int) -> list[Any]:
    """Slabs of all slots; every other one brings a slot twice and another not at all."""
    streams = [Stream(slot, seed) for slot in range(SLOTS)]
    orders = [streams, [streams[0], streams[3], *streams[2:4], streams[0]]]
    return [slab(orders[number % 2], UNROLL) for number in range(count)]


def windows_of(stored: Stored, stride: int, alpha: float = 0.0) -> Windows:
    return Windows(stored, stride, UNROLL, alpha)


def same(one: Any, other: Any) -> bool:
    pairs = [(getattr(one, each.name), getattr(other, each.name)) for each in fields(one)]
    return all(
        torch.equal(left, right)
        for part, counterpart in pairs
        for left, right in zip(tree.leaves(part), tree.leaves(counterpart), strict=True)
    )


def double(reward: torch.Tensor) -> torch.Tensor:
    return 2.0 * reward


GATHERS: dict[str, tuple[int, Any]] = {
    "transitions": (1, partial(transitions, n=UNROLL, gamma=0.9, transform=double)),
    "sequences": (UNROLL, partial(sequences, length=UNROLL, transform=double)),
    "unrolls": (UNROLL, partial(unrolls, extras=("value",))),
}


@pytest.mark.parametrize("kind", GATHERS)
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, SLOTS), st.sampled_from([1, STACK]), st.integers(2, 14), st.booleans())
def test_all_that_is_drawn_and_gathered_is_that_of_a_whole_replay(
    kind: str, seed: int, count: int, frame_stack: int, length: int, restarts: bool
) -> None:
    stride, gather = GATHERS[kind]
    whole = windows_of(made(SLOTS, UNROLL, SLOTS * 12, frame_stack), stride, 0.6)
    parts = windows_of(sharded(count, SLOTS * 12, frame_stack)[0], stride, 0.6)
    for number, each in enumerate(slabs(seed, length)):
        for windows in (whole, parts):
            if restarts and number == length // 2:
                windows.restart()
            windows.append(each)
        np.testing.assert_array_equal(whole.rows.oldest, parts.rows.oldest)
        drawn, mine = (windows.draw(np.random.default_rng(number), 1, 7, 0.5) for windows in (whole, parts))
        np.testing.assert_array_equal(drawn.slot, mine.slot)
        np.testing.assert_array_equal(drawn.row, mine.row)
        found = [windows.rows.gathered(gather, drawn.slot[0], drawn.row[0]) for windows in (whole, parts)]
        assert same(*found)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0, 1, 2, SLOTS]), st.sampled_from([0, 1, 3]), st.integers(1, 12))
def test_what_was_saved_is_loaded_whatever_the_number_of_shards(seed: int, before: int, after: int, at: int) -> None:
    """In two checkpoints; 0 is a replay that is whole."""

    def new(count: int) -> Stored:
        return sharded(count, SLOTS * 12)[0] if count else made(SLOTS, UNROLL, SLOTS * 12)

    saved, coming = new(before), slabs(seed, at + 4)
    segments: list[dict[str, torch.Tensor]] = []
    mark = None
    for number, each in enumerate(coming[: at + 2]):
        saved.append(each)
        if number in (at - 1, at + 1):
            segments += list(saved.since(mark))
            mark = saved.state()["head"]
    loaded = new(after)
    loaded.load(saved.state(), segments)
    for each in coming[at + 2 :]:
        saved.append(each)
        loaded.append(each)
    np.testing.assert_array_equal(saved.oldest, loaded.oldest)
    slots, numbers = (np.array(part) for part in zip(*_all(saved), strict=True))
    gather = GATHERS["transitions"][1]
    assert same(saved.gathered(gather, slots, numbers), loaded.gathered(gather, slots, numbers))


def _all(stored: Stored) -> list[tuple[int, int]]:
    """Slots and rows where a transition begins."""
    ranges = zip(stored.oldest.tolist(), stored.head.tolist(), strict=True)
    return [(slot, row) for slot, (first, last) in enumerate(ranges) for row in range(first, last - UNROLL + 1)]


def test_rows_of_another_shape_or_with_gaps_are_refused() -> None:
    whole = made(SLOTS, UNROLL, SLOTS * 12)
    for each in slabs(1, 4):
        whole.append(each)
    segments = list(whole.since())
    with pytest.raises(ValueError, match="make one of the same settings"):
        sharded(2, SLOTS * 15)[0].load(whole.state(), segments)
    with pytest.raises(ValueError, match="some are missing"):
        sharded(2, SLOTS * 12)[0].load(whole.state(), segments[1:])
    with pytest.raises(ValueError, match="6 shards of a replay want as many slots, and there are 5"):
        sharded(6, SLOTS * 12)


@pytest.mark.parametrize("alpha", [0.0, 0.6])
@pytest.mark.parametrize("kind", ["transitions", "unrolls"])
def test_windows_of_a_lost_shard_are_replaced_and_its_rows_are_gone(kind: str, alpha: float) -> None:
    stride, gather = GATHERS[kind]
    stored, shards = sharded(2, SLOTS * 12, stride=stride)
    windows, coming = windows_of(stored, stride, alpha), slabs(3, 8)
    for each in coming[:4]:
        windows.append(each)
    lost = np.arange(SLOTS)[stored.parts[1]]
    shards[1].dies_before = "gather"
    drawn = windows.draw(np.random.default_rng(0), 1, 40, 0.4)
    slots, starts = drawn.slot[0], drawn.row[0]
    items = stored.gathered(gather, slots, starts)
    there = np.flatnonzero(~np.isin(slots, lost))
    assert 0 < len(there) < 40
    assert same(taken(items, there), stored.gathered(gather, slots[there], starts[there]))
    assert stored.replaced == 40 - len(there)
    newest = (items.obs if kind == "transitions" else items.obs[0])[:, -1]  # its numbers: frame, frame, slot, frame
    assert not np.isin(newest[:, 1, 0], lost).any(), "others are of slots that are left"
    assert len({tuple(frame.ravel().tolist()) for frame in newest}) >= 4, "and spread over them"

    before = stored.head.copy()
    windows.append(coming[4])
    assert (stored.lost, shards[1].starts, shards[0].starts) == (1, 2, 1)
    assert (stored.oldest[lost] >= before[lost]).all()
    for each in coming[5:]:
        windows.append(each)
    whole = windows_of(made(SLOTS, UNROLL, SLOTS * 12), stride)
    for each in coming:
        whole.append(each)
    again = windows.draw(np.random.default_rng(1), 1, 60, 0.4)
    assert (again.row[0] >= stored.oldest[again.slot[0]]).all()
    assert np.isin(again.slot[0], lost).any(), "the new shard's rows are drawn"
    assert same(*(each.rows.gathered(gather, again.slot[0], again.row[0]) for each in (whole, windows)))


def test_a_shard_that_is_lost_while_it_takes_rows_in_is_replaced_with_the_next_slab() -> None:
    stored, shards = sharded(3, SLOTS * 12)
    coming = slabs(5, 4)
    stored.append(coming[0])
    shards[0].dies_before = "append"
    stored.append(coming[1])
    assert stored.lost == 0
    with pytest.raises(ShardLostError):
        list(stored.since())
    stored.append(coming[2])
    assert stored.lost == 1
    state, segments = stored.state(), list(stored.since())
    whole = made(SLOTS, UNROLL, SLOTS * 12)
    whole.load(state, segments)
    slots, numbers = (np.array(part) for part in zip(*_all(stored), strict=True))
    gather = GATHERS["transitions"][1]
    assert 0 in slots
    assert same(whole.gathered(gather, slots, numbers), stored.gathered(gather, slots, numbers))


def test_without_a_window_that_is_left_it_ends() -> None:
    stored, shards = sharded(2, SLOTS * 12)
    stored.append(slabs(3, 1)[0])
    shards[0].dies_before = shards[1].dies_before = "gather"
    with pytest.raises(ShardLostError, match="the shard 0 has died"):
        stored.gathered(GATHERS["transitions"][1], np.array([0, 4]), np.array([0, 0]))


def test_a_checkpoint_of_a_slot_that_has_brought_nothing_since_its_shard_was_lost_is_loaded() -> None:
    stored, shards = sharded(2, SLOTS * 12)
    for each in slabs(4, 3):
        stored.append(each)
    shards[1].dies_before = "restart"
    stored.restart()
    stored.append(slab([Stream(slot, 9) for slot in (0, 1, 2, 3, 2)], UNROLL))  # nothing of slot 4
    assert stored.lost == 1
    assert stored.oldest[4] == stored.head[4] > 0
    loaded = made(SLOTS, UNROLL, SLOTS * 12)
    loaded.load(stored.state(), list(stored.since()))
    np.testing.assert_array_equal(loaded.oldest, stored.oldest)
    more = slab([Stream(slot, 8) for slot in range(SLOTS)], UNROLL)
    for each in (loaded, stored):
        each.append(more)
    slots, numbers = (np.array(part) for part in zip(*_all(stored), strict=True))
    gather = GATHERS["transitions"][1]
    assert same(loaded.gathered(gather, slots, numbers), stored.gathered(gather, slots, numbers))


def test_shards_that_are_lost_at_the_same_time_are_patiently_replaced() -> None:
    """As many as a node has, whatever the number of restarts."""
    stored, shards = sharded(4, SLOTS * 12, restarts=1)
    coming = slabs(5, 3)
    for shard in shards:
        shard.dies_before = "append"
    stored.append(coming[0])
    stored.append(coming[1])
    assert stored.lost == 4


def test_shards_that_are_lost_again_and_again_end_it() -> None:
    stored, shards = sharded(2, SLOTS * 12, restarts=1)
    coming = slabs(5, 4)
    for each in coming[:2]:
        shards[0].dies_before = "append"
        stored.append(each)
    with pytest.raises(ShardLostError, match="shard 0 has died"):
        stored.append(coming[2])


def test_windows_are_taken_from_items_and_placed_in_them() -> None:
    whole: Rows = made(SLOTS, UNROLL, SLOTS * 12)
    for each in slabs(2, 3):
        whole.append(each)
    for stride, gather in GATHERS.values():
        starts = np.array([0, 1, 2, 0, 1]) * stride
        items = whole.gathered(gather, np.arange(5), starts)
        parts = [(places, taken(items, places)) for places in (np.array([3, 1]), np.array([0, 2, 4]))]
        assert same(placed(parts, 5), items)
