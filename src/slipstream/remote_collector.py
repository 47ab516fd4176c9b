"""The driver's end of an outpost: a collector that lives on in another process if its own dies.

    driver                                      outpost
    collect(places)                          -> fills rows 0 to T-1 of its columns
    answer: keeps where the slots stand now  <- tells where they stand
    (with `ahead`, it has been told of the next unrolls before: it need not wait for the driver between two)

    or it dies, or does nothing for too long: what is left of it is killed, and another outpost starts
    where the slots stood at the last answer -> plays its environments to there
    the same places again                    -> fills rows 0 to T-1 with the same bits, if it finds the same weights

    or there is no room for another, under `async`: `collect` is `Away`, others fill the places, and `arrive` waits

What takes a process there is read from the slabs, unroll by unroll, before the learner has them (`trail`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from operator import methodcaller
from typing import NamedTuple

from slipstream import process
from slipstream.collector import Away, Collected, Stopped
from slipstream.envs.rows import EnvError, EnvFailure
from slipstream.link import Answer, Link
from slipstream.outpost import Work
from slipstream.patience import Patience
from slipstream.process import ChildDied, ChildFailed
from slipstream.standing import Mark, Standing
from slipstream.trail import Trail
from slipstream.types import Place, Trajectory

_log = logging.getLogger(__name__)

_SLICE_SECONDS = 0.5
_PAUSE_SLICE_SECONDS = 0.05
_GRACE_SECONDS = 1.0  # for an answer after `stop`
_AWAY_SECONDS = 5.0  # for another outpost to have room, before others fill its places
_MENDING = 10  # times the time limit are allowed while the outpost brings back environments that failed
_ERRORS = {kind.__name__: kind for kind in (EnvError, EnvFailure, ImportError, ValueError)}


class Lost(EnvFailure):
    """A collector process died, hangs, or can't be started."""


class RemoteCollector:
    """The driver's end of an outpost; satisfies `Collects`.

    Args:
        link: To the outpost; it is started.
        work: What the outpost is told.
        lanes: Its lanes, as the run numbers them.
        slabs: What it fills.
        fate: What it shares with the others.
        elastic: Whether others go on without it while there is no room for it.
    """

    def __init__(
        self,
        link: Link,
        work: Work,
        lanes: range,
        slabs: Sequence[Trajectory],
        fate: Fate,
        elastic: bool = False,
    ) -> None:
        self.lanes, self.ahead = tuple(lanes), work.ahead
        self._link, self._work, self._spec, self._slabs, self._fate = link, work, work.spec, slabs, fate
        self._limits = _Limits.of(work)
        self._trail = Trail(self._spec, slabs, 0, 0)
        self._patience = Patience[Lost](work.restarts)
        self._replaced = 0
        self._used = threading.Lock()  # by whoever waits for the answer
        self._open = self._starting = True
        self._due = 1  # answers: it is to say when its environments are made
        self._collecting = False
        self._elastic = elastic
        link.start()

    @property
    def columns(self) -> slice:
        """Its slots."""
        return slice(self._spec.first_slot, self._spec.first_slot + self._spec.num_envs)

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._link.pid

    @property
    def restarted(self) -> int:
        """How often its environments, or it with them, have been brought back after a failure."""
        return self._link.status.restarted + self._replaced

    def ready(self) -> None:
        """Waits until the outpost has made its environments.

        Raises:
            EnvError: It could not, or died.
            ImportError: A package is missing.
            ValueError: As from `make_envs`.
        """
        with self._used:
            self._started()

    def begin(self, seed: int, row: int) -> None:
        """Has the outpost reset its environments and start afresh; returns at once, but for an answer still due.

        Raises:
            EnvError: The outpost is still busy with what it was told before.
        """
        with self._used:
            self._start(Trail(self._spec, self._slabs, seed, row))

    def restore(self, seed: int, standing: Standing) -> None:
        """Has the outpost bring its slots back, as `begin`; returns at once."""
        with self._used:
            self._start(Trail(self._spec, self._slabs, seed, 0, standing))

    def lost(self) -> Sequence[int]:
        """Waits until the slots are back, after `restore`, and returns those that show something else.

        Raises:
            EnvError: An environment raised, or the outpost died or hangs.
        """
        with self._used:
            return self._despite_death(self._arrive).lost

    def state(self) -> Standing:
        """Where its slots stand; to be called between two unrolls, if they can be brought back."""
        standing = self._trail.standing
        assert standing is not None, "nothing has been collected"
        return standing

    def marks(self) -> list[Mark]:
        """Where its lanes stand; to be called in the thread that collects, between two unrolls."""
        return self._trail.marks(self.lanes)

    def arrive(self) -> None:
        """Waits until the outpost is where it is to go on, however long the cluster has no room for it.

        Raises:
            EnvError: As `collect`; so `Stopped`.
        """
        with self._used:
            self._warn_of(self._despite_death(self._arrive).lost)

    def collect(self, places: Sequence[Place], after: Sequence[Sequence[Place]] = ()) -> Collected:
        """Fills one unroll of every lane, in the order of `lanes`, and waits until it is done.

        Args:
            places: Where each lane's unroll goes.
            after: Places of the unrolls after it, of which the outpost is told at once.

        Raises:
            Away: The outpost died, and there is no room for another.
            EnvError: An environment raised (with the traceback of the process), or this or another process died or
                hangs, and it could not be brought back.
            Stopped: After `stop`.
        """
        with self._used:
            unroll = self._despite_death(partial(self._collect, [places, *after])).unroll
            if unroll is None:
                raise self._fate.error or Stopped
            self._trail.add(places, unroll)
        return unroll.collected

    def awaited(self) -> list[str]:
        """The outpost, if its answer is due, and what it is doing; called by any thread."""
        return [f"{self._name()}, {self._doing()}"] if self._due else []

    def stop(self) -> None:
        """Has a `collect` under way in another thread, and every later one until `begin`, raise `Stopped`."""
        self._link.stop(True)

    def close(self) -> None:
        """Waits, for a few seconds at most, until nobody waits for the process; call after `stop`."""
        if self._used.acquire(timeout=_GRACE_SECONDS + 2 * _SLICE_SECONDS):
            self._open = False
            self._used.release()

    def _start(self, trail: Trail) -> None:
        """Has the outpost go where a trail begins, once it has answered what it was told before."""
        if self._due and not (self._starting and self._elastic):  # an elastic one is told when it is there
            try:
                self._started()
                self._arrived()
            except Stopped:
                raise EnvError(f"{self._spec.id}: {self._name()} is still {self._doing()}") from None
        self._link.stop(False)
        self._trail, self._patience = trail, Patience(self._work.restarts)
        if not self._starting:
            with suppress(Lost):  # `collect` sees to it
                self._tell(trail.tell)

    def _collect(self, unrolls: Sequence[Sequence[Place]]) -> Answer:
        """The answer to `collect` of the first; the outpost is told of those that it does not know yet."""
        self._require_going()
        known = self._due if self._collecting else 0
        if not known:
            self._warn_of(self._arrive(_AWAY_SECONDS if self._elastic else None).lost)
        for places in unrolls[known:]:
            self._tell(methodcaller("collect", places), collecting=True)
        return self._receive(self._limits.step)

    def _started(self, away_after: float | None = None) -> None:
        """Waits until the outpost has made its environments, if it is about to."""
        if self._starting:
            self._receive(self._limits.start, away_after)
            self._starting = False

    def _arrive(self, away_after: float | None = None) -> Answer:
        """Waits until the outpost is where its trail ends, and returns its answer.

        Raises:
            Away: There has been no room for it for so many seconds.
        """
        if self._starting:
            self._started(away_after)
            self._tell(self._trail.tell)
        return self._arrived()

    def _arrived(self) -> Answer:
        """The last of the answers that are due, if any are."""
        answer = Answer()
        while self._due:
            answer = self._receive(self._limits.step)
        return answer

    def _warn_of(self, slots: Sequence[int]) -> None:
        if slots:
            _log.warning("%s: slots %s are back, but show something else: bits will differ", self._spec.id, slots)

    def _despite_death(self, task: Callable[[], Answer]) -> Answer:
        """What `task` returns; if the outpost dies or hangs meanwhile, another takes its place and begins it again."""
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
        """Waits a little before the outpost is replaced; raises what happened to it if there is no hope."""
        self._require_going()
        if not self._spec.seeded_every:
            raise self._fate.fail(lost)
        try:
            pause = self._patience.pause(lost, lost.kind, self._trail.rows)
        except Lost as final:
            raise self._fate.fail(final) from None
        deadline = time.monotonic() + pause
        while (left := deadline - time.monotonic()) > 0.0 and not self._link.status.stop:
            time.sleep(min(left, _PAUSE_SLICE_SECONDS))

    def _replace(self) -> None:
        """Has another process start."""
        self._require_going()
        self._link.status.renew()
        name = self._name()
        try:
            self._link.start()
        except ChildDied:
            if not self._open or self._link.status.stop:
                raise Stopped from None  # closed meanwhile
            raise self._death() from None
        except OSError as error:
            raise Lost(f"{self._spec.id}: another process for {name} can't be started: {error}", "") from error
        self._replaced += 1
        self._due, self._starting, self._collecting = 1, True, False

    def _require_going(self) -> None:
        if not self._open:
            raise EnvError(f"{self._spec.id}: the collector processes are closed")
        if self._link.status.stop:
            raise self._fate.error or Stopped

    def _tell(self, what: Callable[[Link], None], *, collecting: bool = False) -> None:
        self._due, self._collecting = self._due + 1, collecting
        try:
            what(self._link)
        except ChildDied:
            raise self._death() from None

    def _receive(self, timeout: float, away_after: float | None = None) -> Answer:
        """The answer that is due, or the error that it reports.

        Gives up when the outpost has done nothing for `timeout` seconds, or does not answer soon after `stop`.
        """
        link, status = self._link, self._link.status
        beats, moved, stopped = status.beats, time.monotonic(), None
        begun = moved
        while True:
            try:
                if link.wait(_SLICE_SECONDS):
                    return self._read()
            except ChildDied:
                raise self._death() from None
            limit = max(timeout, self._limits.mend if status.mending else 0.0)  # before the beats: its end is one
            now = time.monotonic()
            if status.beats != beats or not link.placed:
                beats, moved = status.beats, now
            elif now - moved > limit:
                raise self._hang(limit)
            if away_after is not None and not link.placed and now - begun > away_after:
                _log.warning("%s: there is no room for %s; its places are free for others", self._spec.id, self._name())
                raise Away
            if status.stop:
                stopped = stopped or now
                if now - stopped > _GRACE_SECONDS:
                    raise self._fate.error or Stopped

    def _read(self) -> Answer:
        try:
            answer = self._link.read()
        except ChildFailed as error:
            self._due -= 1
            text = f"{error}\n\nin {self._link.name}:\n{error.traceback}"
            raise self._fate.fail(_ERRORS.get(error.kind, RuntimeError)(text)) from None
        self._due -= 1
        return answer

    def _death(self) -> Lost:
        how, stack = self._link.obituary()
        text = f"{self._spec.id}: {self._name()} {how} while {self._doing()}"
        return Lost(f"{text}\n\n{stack}" if stack else text, "" if how == process.KILLED else how)

    def _hang(self, seconds: float) -> Lost:
        how = f"has done nothing for {seconds:g} seconds"
        text = f"{self._spec.id}: {self._name()} {how}, while {self._doing()}\n\n{self._link.stack()}"
        self._link.kill()
        return Lost(text, how)

    def _name(self) -> str:
        first, size = self._spec.first_slot, self._spec.num_envs
        return f"{self._link.name} (slots {first} to {first + size - 1})"

    def _doing(self) -> str:
        lane, row = self._link.status.place
        if lane < 0 and self._collecting:  # it has not told how far it is
            return f"busy with the {self._slabs[0].rows} rows after row {self._trail.rows}"
        if lane < 0:
            return "making or resetting its environments"
        slots = self._spec.slots(lane)
        return f"busy with slots {slots.start} to {slots.stop - 1}, row {row}"


class Fate:
    """What the outposts of a run share: if one fails, all stop, and its error is everyone's.

    Args:
        links: To all of them.
    """

    def __init__(self, links: Sequence[Link]) -> None:
        self._links = links
        self.error: Exception | None = None
        self._changing = threading.Lock()

    def begin(self) -> None:
        """Forgets what befell the run before."""
        self.error = None

    def fail(self, error: Exception) -> Exception:
        """Stops all, and returns the first error."""
        with self._changing:
            self.error = self.error or error
        for link in self._links:
            link.stop(True)
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
    def of(work: Work) -> _Limits:
        """Those with which processes of environments are given up first, by the collector process that has them."""
        limit = work.options.timeout_seconds
        if not work.workers:
            return _Limits(limit, max(limit, process.START_SECONDS), _MENDING * limit)
        step = 1.5 * limit + work.workers * process.CLOSE_SECONDS  # for their stacks
        start = max(step, 2 * process.START_SECONDS)  # one after the other
        return _Limits(step, start, _MENDING * start)
