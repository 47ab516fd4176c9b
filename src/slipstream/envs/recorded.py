"""Environments that remember how they came to where they are, so that a run that was killed can bring them back."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream import tree
from slipstream.history import History
from slipstream.types import Envs, EnvSpec, EnvStep

_ROWS = 256  # room at first

Sums = NDArray[np.int64]


class RecordedEnvs:
    """Environments whose actions are kept, slot by slot, since the slot's last keyed start; `Envs` in everything else.

    Args:
        envs: The environments; their `spec.seeded_every` is positive.
    """

    def __init__(self, envs: Envs) -> None:
        self._envs = envs
        self._lanes = [_Lane(envs.spec) for _ in range(envs.spec.lanes)]

    @property
    def spec(self) -> EnvSpec:
        """Spaces, slots and lanes."""
        return self._envs.spec

    def reset(self, seed: int) -> None:
        """Starts every slot, its history empty."""
        self._lanes = [_Lane(self.spec) for _ in range(self.spec.lanes)]
        self._envs.reset(seed)

    def restore(self, seed: int, history: History) -> None:
        """Brings every slot to where its history leads."""
        self._envs.restore(seed, history)
        for number, lane in enumerate(self._lanes):
            lane.restore(history.part(self.spec.columns(number)))

    def send(self, action: NDArray[Any], lane: int) -> None:
        """Steps a lane."""
        self._lanes[lane].sent(action)
        self._envs.send(action, lane)

    def wait(self, lanes: Sequence[int]) -> list[int]:
        """Waits for any of several lanes."""
        return self._envs.wait(lanes)

    def recv(self, lane: int) -> EnvStep:
        """Waits for a lane."""
        step = self._envs.recv(lane)
        self._lanes[lane].received(step)
        return step

    def close(self) -> None:
        """Releases what the environments hold."""
        self._envs.close()

    def history(self) -> History:
        """What brings all slots to the rows that were received last; to be called while no lane is under way."""
        return History.join([lane.history() for lane in self._lanes])

    def seen(self) -> Sums:
        """Check sums of the observations received last, int64 `[B]`."""
        return np.concatenate([lane.seen() for lane in self._lanes])


def bring_back(envs: RecordedEnvs, seed: int, history: History, seen: Sums) -> list[int]:
    """Brings all slots to where their histories lead, and returns those that show something else there than `seen`."""
    envs.restore(seed, history)
    for lane in range(envs.spec.lanes):
        envs.recv(lane)
    return [envs.spec.first_slot + int(column) for column in np.flatnonzero(envs.seen() != seen)]


class _Lane:
    """The history of a lane's slots, which have all been sent as many rows."""

    def __init__(self, spec: EnvSpec) -> None:
        self._size, self._every = spec.lane_size, spec.seeded_every
        self._action: NDArray[Any] | None = None
        self._sent = 0  # rows kept
        self._first = np.zeros(self._size, np.int64)  # of each slot
        self._start = np.zeros(self._size, np.int64)
        self._dead = np.zeros(self._size, np.bool_)
        self._step: EnvStep | None = None

    def sent(self, action: NDArray[Any]) -> None:
        if self._action is None:
            self._action = np.zeros((_ROWS, *action.shape), action.dtype)
        if self._sent == len(self._action):
            self._make_room(self._action)
        self._action[self._sent] = action
        self._sent += 1
        self._step = None

    def received(self, step: EnvStep) -> None:
        if self._step is not None:
            return  # once more
        if self._dead.any():
            begun = self._dead & (self._sent - self._first >= self._every)
            self._start += begun
            self._first[begun] = self._sent
        self._dead = step.ended.copy()
        self._step = step

    def history(self) -> History:
        count = self._sent - self._first
        if self._action is None:
            return History(self._start.copy(), count, np.zeros((0,), np.int64))
        kept = [self._action[first : self._sent, column] for column, first in enumerate(self._first)]
        return History(self._start.copy(), count, np.concatenate(kept))

    def restore(self, history: History) -> None:
        self._start, self._sent = history.start.copy(), int(history.count.max())
        self._first = self._sent - history.count
        room = max(_ROWS, 2 * self._sent)
        self._action = np.zeros((room, self._size, *history.action.shape[1:]), history.action.dtype)
        for column, first in enumerate(self._first):
            self._action[first : self._sent, column] = history.of(column)
        self._dead[:] = False
        self._step = None

    def seen(self) -> Sums:
        assert self._step is not None, "nothing has been received"
        leaves = tree.leaves(self._step.obs)
        return np.array([_sum([leaf[column] for leaf in leaves]) for column in range(self._size)], np.int64)

    def _make_room(self, action: NDArray[Any]) -> None:
        """Drops what no slot needs any more, or doubles the memory if that is little."""
        gone = int(self._first.min())
        if gone < len(action) // 2:
            self._action = np.concatenate([action, np.zeros_like(action)])
            return
        action[: self._sent - gone] = action[gone : self._sent].copy()
        self._sent -= gone
        self._first -= gone


def _sum(leaves: Sequence[NDArray[Any]]) -> int:
    value = 0
    for leaf in leaves:
        value = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), value)
    return value
