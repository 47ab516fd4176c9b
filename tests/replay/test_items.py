from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.replay import items
from slipstream.replay.rows import Rows
from tests.replay.streams import Stream, head, slab
from tests.replay.test_rows import made

GAMMA = 0.9


def filled(seed: int, unroll: int, slabs: int) -> tuple[Rows, list[Stream]]:
    streams = [Stream(slot, seed) for slot in range(2)]
    stored = made(2, unroll, 2 * unroll * slabs * 2)
    for _ in range(slabs):
        stored.append(slab(streams, unroll))
    return stored, streams


def observation(stream: Stream, number: int) -> np.ndarray:
    return stream.rows[number].obs if number < len(stream.rows) else head(stream)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 5))
def test_transitions_are_n_step_returns_up_to_the_end(seed: int, unroll: int, n: int) -> None:
    """Against a walk row by row: across slab edges, dead rows never crossed, truncation bootstraps from the last."""
    stored, streams = filled(seed, unroll, 7)
    for slot, stream in enumerate(streams):
        starts = [t for t in range(len(stream.rows) - n + 1) if stream.rows[t].valid]
        slots = np.full(len(starts), slot)
        got = items.transitions(stored, slots, np.array(starts, np.int64), n, GAMMA, lambda reward: reward * 2)
        for i, start in enumerate(starts):
            total, factor, t = 0.0, 1.0, start
            while True:
                row = stream.rows[t]
                assert row.valid
                total, factor, t = total + factor * 2 * row.reward, factor * GAMMA, t + 1
                if row.terminated or row.truncated or t == start + n:
                    break
            assert np.isclose(got.reward[i], total, rtol=1e-5, atol=1e-5)
            assert np.isclose(got.discount[i], 0.0 if row.terminated else factor, rtol=1e-6)
            assert got.action[i] == stream.rows[start].action
            np.testing.assert_array_equal(got.obs[i].numpy(), stream.rows[start].obs)
            np.testing.assert_array_equal(got.next_obs[i].numpy(), observation(stream, t))


def test_sequences_hold_their_rows_and_the_observation_after_them() -> None:
    stored, streams = filled(2, 3, 6)
    slots, starts = np.array([1, 0, 1]), np.array([3, 6, 9])
    got = items.sequences(stored, slots, starts, 7, lambda reward: -reward)
    assert got.obs.shape[:2] == (8, 3)
    for column, (slot, start) in enumerate(zip(slots.tolist(), starts.tolist(), strict=True)):
        rows = streams[slot].rows[start : start + 7]
        for t in range(8):
            np.testing.assert_array_equal(got.obs[t, column].numpy(), observation(streams[slot], start + t))
        for name in ("action", "terminated", "valid"):
            assert getattr(got, name)[:, column].tolist() == [getattr(row, name) for row in rows], name
        assert got.reward[:, column].tolist() == [-row.reward for row in rows]
        assert got.first[:, column].tolist() == [False, *(not row.valid for row in rows)]
        assert got.state0[0][column, 0] == start + 0.25 * slot
    assert got.first.any(), "the streams are to start an episode somewhere in the windows"


def test_unrolls_are_the_slabs_that_went_in() -> None:
    streams = [Stream(slot, 5) for slot in range(2)]
    stored = made(2, 4, 2 * 4 * 8)
    slabs = []
    for _ in range(5):
        slabs.append(slab(streams, 4))
        stored.append(slabs[-1])
    got = items.unrolls(stored, np.array([1, 0, 1]), np.array([8, 16, 0]), ("value",))
    for column, (slot, number) in enumerate(((1, 2), (0, 4), (1, 0))):
        for name in ("obs", "action", "log_prob", "reward", "terminated", "truncated", "valid", "version"):
            one, other = getattr(got, name)[:, column], getattr(slabs[number], name)[:, slot]
            assert torch.equal(one, other), name
        assert torch.equal(got.extras["value"][:4, column], slabs[number].extras["value"][:4, slot])
        assert torch.equal(got.state0[0][column], slabs[number].state0[0][slot])
    assert got.slot.tolist() == [1, 0, 1]
