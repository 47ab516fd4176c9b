"""The driver's end of a collector process, which lives on in another process if it dies.

    driver                                      process
    collect(places)                          -> fills rows 0 to T-1 of its columns
    answer: keeps where the slots stand now  <- notes where they stand, in shared memory

    or it dies, or does nothing for too long: what is left of it is killed, and another process starts
    where the slots stood at the last answer -> plays its environments to there
    the same places again                    -> fills rows 0 to T-1 with the same bits, if it finds the same weights

What takes a process there is read from the slabs, unroll by unroll, before the learner has them (`trail`).
"""

from __future__ import annotations

import json
import logging
import select
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from slipstream import process
from slipstream.collector import Collected, Stopped
from slipstream.envs.rows import EnvError, EnvFailure
from slipstream.patience import Patience
from slipstream.process import ChildDied, ChildFailed, Children
from slipstream.remote_process import Setup, Shared, Status
from slipstream.standing import Standing
from slipstream.trail import Trail
from slipstream.types import Place

_log = logging.getLogger(__name__)

_SLICE_SECONDS = 0.5
_PAUSE_SLICE_SECONDS = 0.05
_GRACE_SECONDS = 1.0  # for an answer after `stop`
_MENDING = 10  # times the time limit are allowed while the process brings back environments that failed
_ERRORS = {kind.__name__: kind for kind in (EnvError, EnvFailure, ImportError, ValueError)}


class Lost(EnvFailure):
    """A collector process died, hangs, or can't be started."""


class RemoteCollector:
    """The driver's end of a collector process; satisfies `Collects`.

    Args:
        children: To start it among.
        content: `setup`, pickled.
        setup: What the process is told.
        lanes: Its lanes, as the run numbers them.
        shared: What it shares with the process.
        fate: What it shares with the other processes.
    """

    def __init__(
        self, children: Children, content: bytes, setup: Setup, lanes: range, shared: Shared, fate: Fate
    ) -> None:
        self.lanes = tuple(lanes)
        self._children, self._content, self._setup, self._spec = children, content, setup, setup.work.spec
        self._shared, self._fate, self._status = shared, fate, fate.statuses[setup.index]
        self._limits = _Limits.of(setup)
        self._trail = Trail(setup, shared, 0, 0)
        self._patience = Patience[Lost](setup.work.restarts)
        self._replaced = 0
        self._used = threading.Lock()  # by whoever waits for the answer
        self._due = self._open = True
        self._child = children.start(content)

    @property
    def columns(self) -> slice:
        """Its slots."""
        return self._setup.columns

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._child.pid

    @property
    def restarted(self) -> int:
        """How often its environments, or it with them, have been brought back after a failure."""
        return self._status.restarted + self._replaced

    def ready(self) -> None:
        """Waits until the process has made its environments.

        Raises:
            EnvError: It could not, or died.
            ImportError: A package is missing.
            ValueError: As from `make_envs`.
        """
        with self._used:
            self._receive(self._limits.start)

    def begin(self, seed: int, row: int) -> None:
        """Has the process reset its environments and start afresh; returns at once, but for an answer still due.

        Raises:
            EnvError: The process is still busy with what it was told before.
        """
        with self._used:
            self._start(Trail(self._setup, self._shared, seed, row))

    def restore(self, seed: int, standing: Standing) -> None:
        """Has the process bring its slots back, as `begin`; returns at once."""
        with self._used:
            self._start(Trail(self._setup, self._shared, seed, 0, standing))

    def lost(self) -> list[int]:
        """Waits until the slots are back, after `restore`, and returns those that show something else.

        Raises:
            EnvError: An environment raised, or the process died or hangs.
        """
        with self._used:
            return json.loads(self._despite_death(self._arrive))

    def state(self) -> Standing:
        """Where its slots stand; to be called between two unrolls, if they can be brought back."""
        standing = self._trail.standing
        assert standing is not None, "nothing has been collected"
        return standing

    def collect(self, places: Sequence[Place]) -> Collected:
        """Fills one unroll of every lane, in the order of `lanes`, and waits until it is done.

        Raises:
            EnvError: An environment raised (with the traceback of the process), or this or another process died or
                hangs, and it could not be brought back.
            Stopped: After `stop`.
        """
        with self._used:
            answer = self._despite_death(partial(self._unroll, places))
            if not answer:
                raise self._fate.error or Stopped
            self._trail.add(places)
        return Collected.of(json.loads(answer))

    def stop(self) -> None:
        """Has a `collect` under way in another thread, and every later one until `begin`, raise `Stopped`."""
        self._status.stop = True

    def close(self) -> None:
        """Waits, for a few seconds at most, until nobody waits for the process; call after `stop`."""
        if self._used.acquire(timeout=_GRACE_SECONDS + 2 * _SLICE_SECONDS):
            self._open = False
            self._used.release()

    def _start(self, trail: Trail) -> None:
        """Has the process go where a trail begins, once it has answered what it was told before."""
        if self._due:
            try:
                self._receive(self._limits.step)
            except Stopped:
                raise EnvError(f"{self._spec.id}: {self._name()} is still {self._doing()}") from None
        self._status.stop = False
        self._trail, self._patience = trail, Patience(self._setup.work.restarts)
        with suppress(Lost):  # `collect` sees to it
            self._tell(*trail.command())

    def _unroll(self, places: Sequence[Place]) -> bytes:
        """The process's answer to `collect`; nothing if it was stopped."""
        self._require_going()
        if other := json.loads(self._arrive() or b"[]"):
            _log.warning("%s: slots %s are back, but show something else: bits will differ", self._spec.id, other)
        self._tell({"collect": [list(place) for place in places]})
        return self._receive(self._limits.step)

    def _arrive(self) -> bytes:
        """Waits until the process is where its trail ends, if it was told to go there, and returns its answer."""
        return self._receive(self._limits.step) if self._due else b""

    def _despite_death(self, task: Callable[[], bytes]) -> bytes:
        """What `task` returns; if the process dies or hangs meanwhile, another takes its place and begins it again."""
        anew = False
        while True:
            try:
                if anew:
                    self._replace()
                return task()
            except Lost as lost:
                self._rest(lost)
                anew = True

    def _rest(self, lost: Lost) -> None:
        """Waits a little before the process is replaced; raises what happened to it if there is no hope."""
        self._require_going()
        if not self._spec.seeded_every:
            raise self._fate.fail(lost)
        try:
            pause = self._patience.pause(lost, lost.kind, self._trail.rows)
        except Lost as final:
            raise self._fate.fail(final) from None
        deadline = time.monotonic() + pause
        while (left := deadline - time.monotonic()) > 0.0 and not self._status.stop:
            time.sleep(min(left, _PAUSE_SLICE_SECONDS))

    def _replace(self) -> None:
        """Has another process go to where the last unroll ended."""
        self._require_going()
        self._status.renew()
        try:
            self._child = self._children.start(self._content, instead=self._child)
        except ChildDied:
            raise Stopped from None  # closed meanwhile
        except OSError as error:
            raise Lost(f"{self._spec.id}: another process for {self._name()} can't be started: {error}", "") from error
        self._replaced += 1
        self._due = True
        self._receive(self._limits.start)
        self._tell(*self._trail.command())

    def _require_going(self) -> None:
        if not self._open:
            raise EnvError(f"{self._spec.id}: the collector processes are closed")
        if self._status.stop:
            raise self._fate.error or Stopped

    def _tell(self, command: dict[str, object], more: bytes = b"") -> None:
        self._due = True
        try:
            self._child.tell(json.dumps(command).encode() + b"\n" + more)
        except ChildDied:
            raise self._death() from None

    def _receive(self, timeout: float) -> bytes:
        """The answer that is due, or the error that it reports.

        Gives up when the process has done nothing for `timeout` seconds, or does not answer soon after `stop`.
        """
        child, status = self._child, self._status
        (fd,) = child.answers
        poll = select.poll()
        for source in (fd, child.pidfd):
            if source is not None:
                poll.register(source, select.POLLIN)
        beats, moved, stopped = status.beats, time.monotonic(), None
        while True:
            ready = [source for source, _ in poll.poll(_SLICE_SECONDS * 1000.0)]
            if fd in ready:
                return self._read(fd)
            if ready:
                raise self._death()
            limit = max(timeout, self._limits.mend if status.mending else 0.0)  # before the beats: its end is one
            now = time.monotonic()
            if status.beats != beats:
                beats, moved = status.beats, now
            elif now - moved > limit:
                raise self._hang(limit)
            if status.stop:
                stopped = stopped or now
                if now - stopped > _GRACE_SECONDS:
                    raise self._fate.error or Stopped

    def _read(self, fd: int) -> bytes:
        try:
            answer = self._child.read(fd)
        except ChildDied:
            raise self._death() from None
        except ChildFailed as error:
            self._due = False
            text = f"{error}\n\nin collector process {self.pid}:\n{error.traceback}"
            raise self._fate.fail(_ERRORS.get(error.kind, RuntimeError)(text)) from None
        self._due = False
        return answer

    def _death(self) -> Lost:
        how, stack = self._child.obituary()
        text = f"{self._spec.id}: {self._name()} {how} while {self._doing()}"
        return Lost(f"{text}\n\n{stack}" if stack else text, how)

    def _hang(self, seconds: float) -> Lost:
        how = f"has done nothing for {seconds:g} seconds"
        text = f"{self._spec.id}: {self._name()} {how}, while {self._doing()}\n\n{self._child.stack_now()}"
        self._child.kill_group()
        return Lost(text, how)

    def _name(self) -> str:
        first, size = self._spec.first_slot, self._spec.num_envs
        return f"collector process {self.pid} (slots {first} to {first + size - 1})"

    def _doing(self) -> str:
        lane, row = self._status.place
        if lane < 0:
            return "making or resetting its environments"
        slots = self._spec.slots(lane)
        return f"busy with slots {slots.start} to {slots.stop - 1}, row {row}"


class Fate:
    """What the processes of a run share: if one fails, all stop, and its error is everyone's.

    Args:
        statuses: Of all processes.
    """

    def __init__(self, statuses: Sequence[Status]) -> None:
        self.statuses = statuses
        self.error: Exception | None = None
        self._changing = threading.Lock()

    def begin(self) -> None:
        """Forgets what befell the run before."""
        self.error = None

    def fail(self, error: Exception) -> Exception:
        """Stops all processes, and returns the first error."""
        with self._changing:
            self.error = self.error or error
        for status in self.statuses:
            status.stop = True
        return self.error


class _Limits(NamedTuple):
    """Seconds without a sign of life after which a process is given up.

    Attributes:
        step: While it collects.
        start: While it starts and makes environments.
        mend: While it brings back environments that failed.
    """

    step: float
    start: float
    mend: float

    @staticmethod
    def of(setup: Setup) -> _Limits:
        """Those with which processes of environments are given up first, by the collector process that has them."""
        limit = setup.work.options.timeout_seconds
        if not setup.work.workers:
            return _Limits(limit, max(limit, process.START_SECONDS), _MENDING * limit)
        step = 1.5 * limit + setup.work.workers * process.CLOSE_SECONDS  # for their stacks
        start = max(step, 2 * process.START_SECONDS)  # one after the other
        return _Limits(step, start, _MENDING * start)
