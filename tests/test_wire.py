"""Stacks of frames on their way: what comes out is what went in, and each frame travels once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.wire import Stacks, pack


def stacks(rows: int, columns: int, stack: int, starts: set[tuple[int, int]], seed: int) -> np.ndarray:
    """Observations of frames that are all different; new stacks begin at `starts`, (row, column)."""
    rng = np.random.default_rng(seed)
    obs = np.zeros((rows, columns, stack, 3, 2), np.uint8)
    for column in range(columns):
        for row in range(rows):
            if row and (row, column) not in starts:
                obs[row, column, :-1] = obs[row - 1, column, 1:]
                obs[row, column, -1] = rng.integers(0, 255, (3, 2))
            else:
                obs[row, column] = rng.integers(0, 255, (stack, 3, 2))
    return obs


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 4),
    stack=st.integers(2, 4),
    starts=st.sets(st.tuples(st.integers(1, 8), st.integers(0, 3)), max_size=6),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_comes_out_is_what_went_in(
    rows: int, columns: int, stack: int, starts: set[tuple[int, int]], seed: int
) -> None:
    obs = stacks(rows, columns, stack, starts, seed)
    found = np.full_like(obs, 7)
    Stacks.pack(obs).unpack(found)
    np.testing.assert_array_equal(found, obs)


@pytest.mark.parametrize(("starts", "whole"), [(set(), 2), ({(4, 1)}, 3)])
def test_each_frame_travels_once(starts: set[tuple[int, int]], whole: int) -> None:
    packed = Stacks.pack(stacks(9, 2, 4, starts, 1))
    assert packed.nbytes == 18 + 6 * (18 - whole) + 24 * whole
    assert len(packed.whole) == whole
    assert len(packed.newest) == 18 - whole
    assert packed.newest.shape[1:] == (3, 2)


def test_only_stacks_are_packed() -> None:
    obs = {"frames": stacks(5, 2, 3, set(), 1), "other": np.zeros((5, 2, 3)), "image": np.zeros((5, 2, 8, 8))}
    packed = pack(obs, 3)
    assert isinstance(packed["frames"], Stacks)
    assert packed["other"] is obs["other"]
    assert packed["image"] is obs["image"]
    assert pack(obs, 1)["frames"] is obs["frames"]


def test_signs_of_zero_travel() -> None:
    obs = np.zeros((2, 1, 2, 1), np.float32)
    obs[0, 0, 1] = -0.0
    found = np.ones_like(obs)
    Stacks.pack(obs).unpack(found)
    assert found.tobytes() == obs.tobytes()
