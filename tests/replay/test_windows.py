from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.replay.windows import Windows
from tests.replay.streams import Stream, slab
from tests.replay.test_rows import made


def filled(seed: int, slabs: int, unroll: int, stride: int, span: int, alpha: float, kept: int = 12) -> Windows:
    """Windows over three slots, one of which brings two unrolls with every other slab."""
    streams = [Stream(slot, seed) for slot in range(3)]
    windows = Windows(made(3, unroll, 3 * kept), stride, span, alpha)
    for number in range(slabs):
        order = [streams[0], streams[1], streams[0]] if number % 2 else streams
        windows.append(slab(order, unroll))
    return windows


def expected(windows: Windows, stride: int, span: int) -> set[tuple[int, int]]:
    """All windows that are whole, by looking at every row."""
    rows, found = windows.rows, set[tuple[int, int]]()
    for slot in range(rows.slots):
        for start in range(int(rows.oldest[slot]), int(rows.head[slot])):
            alive = stride > 1 or bool(rows.valid(np.array([slot]), np.array([start]))[0])
            if start % stride == 0 and start + span <= rows.head[slot] and alive:
                found.add((slot, start))
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 14), st.sampled_from([(1, 1), (1, 3), (2, 4), (2, 2)]), st.booleans())
def test_exactly_the_whole_windows_are_drawn(seed: int, slabs: int, shape: tuple[int, int], prioritised: bool) -> None:
    stride, span = shape
    windows = filled(seed, slabs, 2, stride, span, 0.7 if prioritised else 0.0)
    wanted = expected(windows, stride, span)
    generator = np.random.default_rng(seed)
    if not wanted:
        with pytest.raises(ValueError, match="draw"):
            windows.draw(generator, 1, 4, 0.5)
        return
    drawn = windows.draw(generator, 6, 40 * len(wanted), 0.5)
    assert drawn.slot.shape == drawn.row.shape == drawn.weight.shape == (6, 40 * len(wanted))
    pairs = list(zip(drawn.slot.ravel().tolist(), drawn.row.ravel().tolist(), strict=True))
    assert set(pairs) == wanted
    counts = np.array([pairs.count(pair) for pair in sorted(wanted)])
    assert counts.max() < 2 * len(pairs) / len(wanted), "new windows are equally likely, under both rules"


@pytest.mark.parametrize(("stride", "span"), [(1, 1), (1, 3), (2, 4)])
def test_the_most_windows_are_those_of_a_full_replay(stride: int, span: int) -> None:
    counts = [filled(5, slabs, 2, stride, span, 0.0).count for slabs in range(20)]
    assert max(counts) == filled(5, 0, 2, stride, span, 0.0).most


@pytest.mark.parametrize(("stride", "span"), [(1, 1), (1, 3), (2, 4)])
def test_a_replay_holds_so_many_windows_after_the_rows_that_they_take(stride: int, span: int) -> None:
    """And not a slab before, if all slots bring as many rows."""
    streams = [Stream(slot, 1) for slot in range(3)]
    windows = Windows(made(3, 2, 36), stride, span)
    counts = {0: 0}
    for _ in range(6):
        windows.append(slab(streams, 2))
        counts[windows.rows.slots * int(windows.rows.head[0])] = windows.count
    for count in range(1, windows.most + 1):
        assert windows.rows_to(count) == min(steps for steps, there in counts.items() if there >= count)


def test_draws_follow_the_errors_that_windows_were_given() -> None:
    windows = filled(3, 5, 2, 1, 1, 0.5)
    generator = np.random.default_rng(1)
    pairs = sorted(expected(windows, 1, 1))
    slots, rows = (np.array(part) for part in zip(*pairs, strict=True))
    errors = np.arange(1.0, len(pairs) + 1)
    windows.reprioritise(slots, rows, errors)
    drawn = windows.draw(generator, 1, 20_000, 1.0)
    share = np.sqrt(errors) / np.sqrt(errors).sum()
    for (slot, row), wanted in zip(pairs, share, strict=True):
        mine = (drawn.slot[0] == slot) & (drawn.row[0] == row)
        assert mine.mean() == pytest.approx(wanted, abs=2 / 20_000), "stratified draws hardly vary"
        assert drawn.weight[0, mine] == pytest.approx((share.min() / wanted), rel=1e-4)


def test_a_new_window_has_the_greatest_priority_so_far() -> None:
    streams = [Stream(0, 9)]
    windows = Windows(made(1, 2, 24), 1, 1, 1.0)
    windows.append(slab(streams, 2))
    windows.reprioritise(np.array([0, 0]), np.array([0, 1]), np.array([9.0, 1.0]))
    windows.append(slab(streams, 2))
    assert [row.valid for row in streams[0].rows] == [True] * 4, "the stream has no dead row here"
    drawn = windows.draw(np.random.default_rng(0), 1, 2800, 0.0)
    assert np.bincount(drawn.row[0]) == pytest.approx([900, 100, 900, 900], abs=2)


def test_draws_are_a_function_of_the_generator() -> None:
    windows = filled(5, 6, 2, 1, 3, 0.0)
    one, same = (windows.draw(np.random.default_rng(7), 3, 5, 0.4) for _ in range(2))
    other = windows.draw(np.random.default_rng(8), 3, 5, 0.4)
    assert np.array_equal(one.row, same.row)
    assert np.array_equal(one.slot, same.slot)
    assert not np.array_equal(one.row, other.row)


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_a_restart_takes_the_last_row_out(alpha: float) -> None:
    streams = [Stream(slot, 3) for slot in range(3)]
    windows = Windows(made(3, 3, 36), 1, 1, alpha)
    windows.append(slab(streams, 3))
    before = expected(windows, 1, 1)
    windows.restart()
    after = expected(windows, 1, 1)
    assert before - after == {pair for pair in before if pair[1] == 2} != set()
    drawn = windows.draw(np.random.default_rng(0), 1, 300, 0.0)
    assert set(zip(drawn.slot[0].tolist(), drawn.row[0].tolist(), strict=True)) == after


def test_a_replay_of_dead_rows_says_so_instead_of_drawing_for_ever() -> None:
    windows = Windows(made(2, 2, 24), 1, 1)
    with pytest.raises(ValueError, match="nothing to draw: it is empty"):
        windows.draw(np.random.default_rng(0), 1, 4, 0.0)
    dead = slab([Stream(slot, 3) for slot in range(2)], 2)
    dead.valid.zero_()
    windows.append(dead)
    with pytest.raises(ValueError, match="all of its 4 windows begin dead"):
        windows.draw(np.random.default_rng(0), 1, 4, 0.0)
    windows.append(slab([Stream(slot, 4) for slot in range(2)], 2))
    drawn = windows.draw(np.random.default_rng(0), 1, 400, 0.0)
    assert set(zip(drawn.slot[0].tolist(), drawn.row[0].tolist(), strict=True)) == expected(windows, 1, 1)


def test_windows_longer_than_the_replay_are_refused() -> None:
    with pytest.raises(ValueError, match="too small for windows of 11 rows in 3 slots; it needs 45"):
        Windows(made(3, 2, 36), 1, 11)
