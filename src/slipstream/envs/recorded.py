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
from slipstream.history import History, Past
from slipstream.patience import Patience
from slipstream.standing import UNKNOWN
from slipstream.types import BoolArray, Envs, EnvSpec, EnvStep

Sums = NDArray[np.int64]

_LOOKED_AT = 1024  # numbers of an array, about

_log = logging.getLogger(__name__)


def recorded(envs: Envs, restarts: int, mending: Callable[[bool], object] = bool) -> RecordedEnvs | None:
    """`envs` with a memory, as of `RecordedEnvs`; None where they can't be brought back."""
    return RecordedEnvs(envs, restarts, mending) if envs.spec.seeded_every else None


class RecordedEnvs:
    """Environments whose actions are kept, slot by slot, since the slot's last keyed start; `Envs` in everything else.

    Where an environment raises, or its process dies or hangs, its lane is played back to where it was and the step is
    tried again, so that nothing is lost and no bit changes, as long as there is `Patience` with the lane. That is done
    in `recv`, where the lane is waited for anyway, whatever has failed. A line in the log says so if the lane shows
    something else there, as environments do that are not theirs to seed alone.

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
        self._lanes = [_Lane(envs.spec, restarts) for _ in range(envs.spec.lanes)]
        self.restarted = 0

    @property
    def spec(self) -> EnvSpec:
        """Spaces, slots and lanes."""
        return self._envs.spec

    def reset(self, seed: int) -> None:
        """Starts every slot, its history empty."""
        self._seed = seed
        self._lanes = [_Lane(self.spec, self._restarts) for _ in range(self.spec.lanes)]
        try:
            self._envs.reset(seed)
        except EnvFailure as failure:
            for record in self._lanes:  # one slot of one of them has failed, and which others were reset is not known
                record.failure = failure

    def restore(self, lane: int, seed: int, history: History) -> None:
        """Brings a lane to where its histories lead."""
        self._seed = seed
        record = self._lanes[lane]
        record.load(history)
        try:
            self._envs.restore(lane, seed, history)
        except EnvFailure as failure:
            record.failure = failure

    def send(self, action: NDArray[Any], lane: int) -> None:
        """Steps a lane."""
        record = self._lanes[lane]
        record.sent(action)
        try:
            self._envs.send(action, lane)
        except EnvFailure as failure:
            record.failure = failure

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
                self._rest(record, failure)
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
        return History.join([lane.past.history() for lane in self._lanes])

    def seen(self, lanes: Sequence[int] | None = None) -> Sums:
        """Check sums of the rows received last, int64 `[B]`, or those of some lanes one after the other."""
        chosen = self._lanes if lanes is None else [self._lanes[lane] for lane in lanes]
        return np.concatenate([lane.seen() for lane in chosen])

    def _rest(self, record: _Lane, failure: EnvFailure) -> None:
        """Waits a little before the lane is tried again, or raises what it failed of if there is no hope."""
        pause = record.patience.pause(failure, failure.kind, record.rows)
        self._mending(True)
        self.restarted += 1
        time.sleep(pause)

    def _try_again(self, lane: int) -> None:
        """Brings a lane to where it was, and sends what it was sent last."""
        record = self._lanes[lane]
        history, action = record.before()
        self._envs.restore(lane, self._seed, history)
        if action is None:
            return
        if not record.looks_like(self._envs.recv(lane)):
            slots = self.spec.slots(lane)
            _log.warning(
                "%s: slots %d to %d are back, but show something else than before: bits will differ, and a transition "
                "is learned from that never was; what does an environment keep beyond its reset?",
                self.spec.id,
                slots.start,
                slots.stop - 1,
            )
        self._envs.send(action, lane)


def bring_back(envs: RecordedEnvs, seed: int, history: History, seen: Sums) -> list[int]:
    """Brings all slots to where their histories lead, and returns those that show something else there than `seen`."""
    for lane in range(envs.spec.lanes):
        envs.restore(lane, seed, history.part(envs.spec.columns(lane)))
    for lane in range(envs.spec.lanes):
        envs.recv(lane)
    other = (envs.seen() != seen) & (seen != UNKNOWN)
    return [envs.spec.first_slot + int(column) for column in np.flatnonzero(other)]


class _Lane:
    """How a lane came to where it is, what it showed last, and what it failed of."""

    def __init__(self, spec: EnvSpec, restarts: int) -> None:
        self._size = spec.lane_size
        self.past = Past(spec.lane_size, spec.action_space, spec.seeded_every)
        self._dead: BoolArray = np.zeros(spec.lane_size, np.bool_)
        self._step: EnvStep | None = None  # the one that was received last
        self._due = False  # whether that of the actions sent last is yet to come
        self._look = 0  # of the row before it, if the lane may be brought back there
        self._keeps = restarts > 0
        self.failure: EnvFailure | None = None
        self.patience = Patience[EnvFailure](restarts)
        self.rows = 0

    def sent(self, action: NDArray[Any]) -> None:
        self.past.sent(action)
        self.rows += 1
        if self._keeps and self._step is not None:
            self._look = _look(self._step)  # its memory is about to be written to
        self._due, self._step = True, None

    def received(self, step: EnvStep) -> None:
        if self._step is not None:
            return  # once more
        self.past.reset(self._dead)
        self._dead = step.ended.copy()
        self._due, self._step = False, step

    def before(self) -> tuple[History, NDArray[Any] | None]:
        """The history before what was sent last, and that; all of it and None if its answer has come."""
        if not self._due:
            return self.past.history(), None
        return self.past.history(but=1), self.past.last

    def looks_like(self, step: EnvStep) -> bool:
        """Whether a row may be the one before what was sent last."""
        return _look(step) == self._look

    def load(self, history: History) -> None:
        self.past.load(history)
        self._dead[:] = False
        self._due, self._step = False, None

    def seen(self) -> Sums:
        assert self._step is not None, "nothing has been received"
        leaves = _leaves(self._step)
        return np.array([_sum([leaf[column] for leaf in leaves]) for column in range(self._size)], np.int64)


def _leaves(step: EnvStep) -> list[NDArray[Any]]:
    return [*tree.leaves(step.obs), step.reward, step.terminated, step.truncated]


def _look(step: EnvStep) -> int:
    """A check sum of some of a lane's row, which costs microseconds whatever its size."""
    return _sum([leaf.reshape(-1)[:: leaf.size // _LOOKED_AT + 1] for leaf in _leaves(step)])


def _sum(leaves: Sequence[NDArray[Any]]) -> int:
    value = 0
    for leaf in leaves:
        value = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), value)
    return value
