from __future__ import annotations

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.replay import rows
from slipstream.replay.rows import Rows
from tests.replay.streams import STACK, Row, Stream, head, like, slab

NAMES = ("log_prob", "version", "value", "state0")


def made(slots: int, unroll: int, capacity: int, frame_stack: int = STACK) -> Rows:
    layout = rows.layout(like(slots, unroll), capacity, frame_stack, NAMES)
    return Rows(rows.allocate(layout), unroll, like(slots, unroll)["obs"])


def check(stored: Rows, streams: list[Stream]) -> None:
    """Every row that is said to be there is as the stream had it."""
    for stream in streams:
        slot, count = stream.slot, len(stream.rows)
        assert stored.head[slot] == count
        numbers = np.arange(stored.oldest[slot], count)
        slots = np.full(len(numbers), slot)
        obs = stored.obs(np.full(len(numbers) + 1, slot), np.append(numbers, count)).numpy()
        expected = [row.obs for row in stream.rows[stored.oldest[slot] :]] + [head(stream)]
        np.testing.assert_array_equal(obs, np.stack(expected))
        for name in ("action", "reward", "terminated", "truncated", "valid"):
            wanted = [getattr(row, name) for row in stream.rows[stored.oldest[slot] :]]
            assert stored.column(name, slots, numbers).tolist() == wanted, name
        np.testing.assert_array_equal(stored.column("version", slots, numbers).numpy(), numbers)
        np.testing.assert_array_equal(stored.column("value", slots, numbers).numpy(), 0.5 * numbers)
        begun = numbers[numbers % stored.unroll == 0]
        (state,) = stored.state0(np.full(len(begun), slot), begun)
        np.testing.assert_array_equal(state[:, 0].numpy(), begun + 0.25 * slot)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.sampled_from([1, STACK]), st.lists(st.integers(0, 2), max_size=12))
def test_what_is_read_is_what_was_written(seed: int, unroll: int, frame_stack: int, uneven: list[int]) -> None:
    """Through many wrap-arounds, stacks across episode starts, and slabs in which a slot comes twice."""
    streams = [Stream(slot, seed) for slot in range(3)]
    stored = made(3, unroll, 3 * 10, frame_stack)
    for twice in [*uneven, *range(3), *uneven, 0, 1, 2]:
        stored.append(slab([streams[twice], streams[(twice + 1) % 3], streams[twice]], unroll))
        stored.append(slab([streams[0], streams[1], streams[2]], unroll))
        check(stored, streams)
    if frame_stack == 1:
        assert (stored.head - stored.oldest == stored.kept - 1).all(), "full but for the observation after the head"


def test_oldest_rows_go_early_where_stacks_begin_often() -> None:
    """Frames run out before rows do; then fewer rows are there, and those are whole."""
    stored, stream = made(1, 2, 600), Stream(0, 1)
    for _ in range(700):
        stream.dead = stream.random.random() < 0.9  # nearly every row is an episode of its own
        stored.append(slab([stream], 2))
    check(stored, [stream])
    assert 150 < stored.head[0] - stored.oldest[0] < 500


class Broken(Stream):
    """A stream in which some rows, or all, begin a new stack."""

    share = 1.0

    def next(self) -> Row:
        row = super().next()
        if not self.dead and self.random.random() < self.share:
            self.start()
        return row


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_slab_with_more_frames_than_there_is_room_for_leaves_the_newest_rows_whole(share: float) -> None:
    """Two unrolls of 100 rows have room for 227 frames, and one with a new stack in every row brings 300."""
    stored, stream = made(1, 100, 200), Broken(0, 1)
    stream.share = share
    for _ in range(4):
        stored.append(slab([stream], 100))
        check(stored, [stream])
        assert stored.head[0] - stored.oldest[0] > 50


def test_a_million_atari_rows_fit_in_seven_and_a_half_gigabytes() -> None:
    obs = torch.empty(5, 16, 4, 84, 84, dtype=torch.uint8, device="meta")
    flags = {name: torch.empty(4, 16, dtype=torch.bool, device="meta") for name in ("terminated", "truncated", "valid")}
    shape = {"obs": obs, "action": torch.empty(4, 16, dtype=torch.int64, device="meta"), **flags}
    layout = rows.layout(shape | {"reward": torch.empty(4, 16, device="meta")}, 1_000_000, 4)
    assert 7.05e9 < rows.size(layout) < 7.5e9


def test_a_restart_makes_the_last_row_dead() -> None:
    stored, streams = made(2, 3, 2 * 12), [Stream(0, 3), Stream(1, 3)]
    for stream in streams:
        stream.random = np.random.default_rng(8)  # both have the same ends
    stored.append(slab(streams, 3))
    last = [stream.rows[-1] for stream in streams]
    assert [row.valid for row in last] == [True, True]
    stored.restart()
    for stream in streams:
        stream.rows[-1].valid, stream.rows[-2].truncated = False, True
        stream.start()
    stored.append(slab(streams, 3))
    every = np.arange(6)
    for slot, stream in enumerate(streams):
        slots = np.full(6, slot)
        assert stored.column("valid", slots, every).tolist() == [row.valid for row in stream.rows]
        assert stored.column("truncated", slots, every).tolist() == [row.truncated for row in stream.rows]
        np.testing.assert_array_equal(stored.obs(slots, every).numpy(), np.stack([row.obs for row in stream.rows]))


def test_too_small_a_replay_is_refused() -> None:
    with pytest.raises(ValueError, match="a replay of 50 rows has no room for two unrolls of 3 slots x 9 rows"):
        rows.layout(like(3, 9), 50, 1)


def test_memory_is_taken_when_it_is_written_to() -> None:
    layout = {"frames": torch.empty(16, 1 << 20, 32, dtype=torch.uint8, device="meta")}
    before = psutil.Process().memory_info().rss
    allocated = rows.allocate(layout)["frames"]
    assert allocated.shape == (16, 1 << 20, 32)
    assert allocated.dtype == torch.uint8
    assert psutil.Process().memory_info().rss - before < allocated.nbytes / 8
    assert not allocated[::5, ::4096].any()
