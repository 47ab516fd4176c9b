"""Environments that remember how they came to where they are, so that a run that was killed can bring them back."""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream import tree
from slipstream.envs.rows import EnvFailure
from slipstream.history import History
from slipstream.types import Envs, EnvSpec, EnvStep

_log = logging.getLogger(__name__)

_ROWS = 256  # room at first
_PROGRESS = 100  # rows without a failure after which the count begins anew
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds before a lane is brought back

Sums = NDArray[np.int64]


class RecordedEnvs:
    """Environments whose actions are kept, slot by slot, since the slot's last keyed start; `Envs` in everything else.

    Where an environment raises, or its process dies or hangs, its lane is played back to where it was and the step is
    tried again, so that nothing is lost and no bit changes. It ends where the same error comes again at the same place,
    or once a lane has failed so often in a row, with less than 100 rows between, as it may.

    Args:
        envs: The environments; their `spec.seeded_every` is positive.
        restarts: How often in a row a lane may be brought back; 0 for never.
        mending: Told when that begins, and when it is done.

    Attributes:
        restarted: How often lanes have been brought back.
    """

    def __init__(self, envs: Envs, restarts: int = 0, mending: Callable[[bool], object] = bool) -> None:
        self._envs, self._restarts, self._mending = envs, restarts, mending
        self._seed = 0
        self._lanes = [_Lane(envs.spec) for _ in range(envs.spec.lanes)]
        self.restarted = 0

    @property
    def spec(self) -> EnvSpec:
        """Spaces, slots and lanes."""
        return self._envs.spec

    def reset(self, seed: int) -> None:
        """Starts every slot, its history empty."""
        self._seed = seed
        self._lanes = [_Lane(self.spec) for _ in range(self.spec.lanes)]
        self._envs.reset(seed)

    def restore(self, lane: int, seed: int, history: History) -> None:
        """Brings a lane to where its histories lead."""
        self._seed = seed
        self._lanes[lane].restore(history)
        self._envs.restore(lane, seed, history)

    def send(self, action: NDArray[Any], lane: int) -> None:
        """Steps a lane."""
        record = self._lanes[lane]
        record.sent(action)
        try:
            self._envs.send(action, lane)
        except EnvFailure as failure:
            record.failure = failure  # for `recv` to mend, where the lane is waited for anyway

    def wait(self, lanes: Sequence[int]) -> list[int]:
        """Waits for any of several lanes."""
        return [lane for lane in lanes if self._lanes[lane].failure] or self._envs.wait(lanes)

    def recv(self, lane: int) -> EnvStep:
        """Waits for a lane.

        Raises:
            EnvError: As of the environments, if it does not help to try again.
        """
        record = self._lanes[lane]
        while True:
            failure, record.failure = record.failure, None
            if failure is not None:
                self._require_hope(lane, failure)
            try:
                if failure is not None:
                    self._try_again(lane)
                step = self._envs.recv(lane)
                if failure is not None:
                    self._mending(False)
            except EnvFailure as again:
                record.failure = again
                continue
            record.received(step)
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

    def _require_hope(self, lane: int, failure: EnvFailure) -> None:
        """Raises the failure again if the lane has failed there before, or too often; waits a little otherwise."""
        attempt = self._lanes[lane].fail(failure)
        if attempt is None or attempt > self._restarts:
            raise failure
        self._mending(True)
        self.restarted += 1
        said = str(failure).partition("\n")[0]
        _log.warning("%s; it is brought back to where it was (%d of %d)", said, attempt, self._restarts)
        time.sleep(min(_FIRST_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE))

    def _try_again(self, lane: int) -> None:
        """Brings a lane to where it was, and sends what it was sent last."""
        history, action = self._lanes[lane].before()
        self._envs.restore(lane, self._seed, history)
        if action is not None:
            self._envs.recv(lane)
            self._envs.send(action, lane)


def bring_back(envs: RecordedEnvs, seed: int, history: History, seen: Sums) -> list[int]:
    """Brings all slots to where their histories lead, and returns those that show something else there than `seen`."""
    for lane in range(envs.spec.lanes):
        envs.restore(lane, seed, history.part(envs.spec.columns(lane)))
    for lane in range(envs.spec.lanes):
        envs.recv(lane)
    return [envs.spec.first_slot + int(column) for column in np.flatnonzero(envs.seen() != seen)]


class _Lane:
    """The history of a lane's slots, which have all been sent as many rows."""

    def __init__(self, spec: EnvSpec) -> None:
        self._size, self._every = spec.lane_size, spec.seeded_every
        space = spec.action_space
        self._action: NDArray[Any] = np.zeros((_ROWS, self._size, *(space.shape or ())), space.dtype)
        self._sent = 0  # rows kept
        self._first = np.zeros(self._size, np.int64)  # of each slot
        self._start = np.zeros(self._size, np.int64)
        self._dead = np.zeros(self._size, np.bool_)
        self._step: EnvStep | None = None
        self.failure: EnvFailure | None = None
        self._rows, self._failed_at, self._in_a_row, self._said = 0, -_PROGRESS, 0, set[str]()

    def sent(self, action: NDArray[Any]) -> None:
        if self._sent == len(self._action):
            self._make_room()
        self._action[self._sent] = action
        self._sent += 1
        self._rows += 1
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

    def history(self, last: int = 0) -> History:
        """That of all rows but the `last`."""
        stop = self._sent - last
        kept = [self._action[first:stop, column] for column, first in enumerate(self._first)]
        return History(self._start.copy(), stop - self._first, np.concatenate(kept))

    def before(self) -> tuple[History, NDArray[Any] | None]:
        """The history before what was sent last, and that; all of it and None if its answer has come."""
        if self._step is not None or not self._sent:
            return self.history(), None
        return self.history(last=1), self._action[self._sent - 1]

    def fail(self, failure: EnvFailure) -> int | None:
        """Notes a failure; returns how many there have been in a row, None if it is the same at the same place."""
        said = str(failure).partition("\n")[0]
        if self._rows != self._failed_at:
            self._in_a_row = 0 if self._rows - self._failed_at >= _PROGRESS else self._in_a_row
            self._failed_at, self._said = self._rows, set()
        self._in_a_row += 1
        same = said in self._said
        self._said.add(said)
        return None if same else self._in_a_row

    def restore(self, history: History) -> None:
        self._start, self._sent = history.start.copy(), int(history.count.max())
        self._first = self._sent - history.count
        room = max(_ROWS, 2 * self._sent)
        self._action = np.zeros((room, *self._action.shape[1:]), self._action.dtype)
        for column, first in enumerate(self._first):
            self._action[first : self._sent, column] = history.of(column)
        self._dead[:] = False
        self._step = None

    def seen(self) -> Sums:
        assert self._step is not None, "nothing has been received"
        leaves = tree.leaves(self._step.obs)
        return np.array([_sum([leaf[column] for leaf in leaves]) for column in range(self._size)], np.int64)

    def _make_room(self) -> None:
        """Drops what no slot needs any more, or doubles the memory if that is little."""
        action, gone = self._action, int(self._first.min())
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
