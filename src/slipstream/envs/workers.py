"""Gymnasium environments in worker processes: rows in shared memory, a few bytes on pipes, nothing left behind.

    driver thread of lane l            worker w (its slots of every lane)
    send: writes actions, command  ->  steps its slots of l, writes rows
    recv: waits for all workers    <-  five bytes on the answer pipe of (w, l)

Who waits for whom: `recv` waits for the answers of its own lane and, at the same time, for the death of any worker,
with a time limit (where the kernel refuses pidfds: only of those whose answers are due). Workers wait for commands
only. If the driver dies, the kernel kills the workers and what they started (`process`); if a worker dies, `recv`
raises at once; `close` takes seconds at most.

A worker that has died or hung has failed in all lanes, whoever noticed; each lane raises that until it is restored. The
first that is starts the worker anew.
"""

from __future__ import annotations

import os
import select
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from threading import RLock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from slipstream import process
from slipstream.envs.gym import as_step, row_checks, source_spec
from slipstream.envs.rows import EnvError, EnvFailure
from slipstream.envs.shared import map_shared
from slipstream.envs.slot import Source, close_all
from slipstream.envs.spaces import Actions
from slipstream.envs.worker_process import COMMAND, RESET, RESTORE, STEP, Setup
from slipstream.history import History
from slipstream.process import Child, ChildDied, ChildFailed
from slipstream.types import EnvSpec, EnvStep


class WorkerEnvs:
    """`num_envs` Gymnasium environments in `workers` processes; bit-identical to `GymEnvs` for any number of them.

    Every lane's slots are spread over all workers, so that a lane steps as fast as the processes allow. Lanes may be
    used by different threads at the same time.

    Args:
        source: What to make. It travels by cloudpickle, so that callables may be lambdas or live in `__main__`.
        num_envs: Slots.
        lanes: Lanes; divides `num_envs`.
        workers: Processes; those that would have no slot are not started.
        timeout_seconds: How long resetting or stepping a lane may take, with what its workers do for other lanes
            before, until those that do not answer are given up; they may take longer for bringing slots back, as long
            as no single action does.
        first_slot: Slot of column 0.
        played: Called now and then while slots are brought back, as a sign of life.

    Raises:
        EnvError: An environment could not be made, here (one is made first, for the spec) or in a worker.
        ValueError: As for `GymEnvs`, or fewer than one worker.
    """

    def __init__(
        self,
        source: Source,
        num_envs: int,
        lanes: int = 1,
        workers: int = 1,
        timeout_seconds: float = 300.0,
        first_slot: int = 0,
        played: Callable[[], object] = bool,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        env = source.make(first_slot)
        try:
            self._spec = source_spec(source, env, num_envs, lanes, first_slot)
            self._actions = Actions(env.action_space, self._spec.lane_size, source.id)
        finally:
            close_all(source.id, {first_slot: env})
        self._timeout, self._played = timeout_seconds, played
        self._due: list[_Due] = [{} for _ in range(lanes)]
        self._failed: list[EnvFailure | None] = [None] * lanes
        self._workers: list[_Worker] = []
        self._changing = RLock()  # of workers: their children, and what has failed
        self._graves: list[_Grave] = []
        members = [columns for columns in _spread(self._spec, workers) if any(columns)]
        files: list[int] = []
        self._finalizer = weakref.finalize(self, _stop, self._workers, self._graves, files)
        try:
            files.extend(process.anonymous_file() for _ in range(1 + lanes))  # where one fails, those before are there
            self._memory, *histories = files
            self._histories = tuple(histories)  # of lanes that are to be brought back
            like = np.zeros(self._actions.shape[1:], self._actions.dtype)
            self._shared = map_shared(self._memory, env.observation_space, like, num_envs, len(members))
            for index, columns in enumerate(members):
                setup = Setup(
                    source=source,
                    observation_space=env.observation_space,
                    action_like=like,
                    num_envs=num_envs,
                    first_slot=first_slot,
                    workers=len(members),
                    index=index,
                    columns=columns,
                    histories=self._histories,
                )
                content = process.pickled(
                    setup, f"{source.id}: worker processes need an environment", "--placement.env-workers 0"
                )
                self._workers.append(_Worker(index, columns, content, self._start(content)))
            for worker in self._workers:
                self._await_made(worker)
        except BaseException:
            self.close()
            raise
        self._lane_workers = [[w for w in self._workers if w.columns[lane]] for lane in range(lanes)]
        scored = bool(source.score_key)
        parts = [self._shared.rows.part(self._spec.columns(lane)) for lane in range(lanes)]
        self._steps = [as_step(part, scored) for part in parts]
        self._checks = row_checks(source, self._spec, self._actions, parts)

    @property
    def spec(self) -> EnvSpec:
        """Spaces, slots and lanes."""
        return self._spec

    def reset(self, seed: int) -> None:
        """Starts every slot at episode 0 of run `seed`, in `[0, 2**64)`; returns at once."""
        for lane in range(self._spec.lanes):
            self._settle(lane)
            self._command(lane, RESET, seed)

    def restore(self, lane: int, seed: int, history: History) -> None:
        """Has the workers play the episodes of the lane's slots as far as they had come.

        Waits for answers that are still due, and for workers that have to be started anew.

        Raises:
            EnvError: A worker could not make its environments, or one of those that are not broken has died.
        """
        self._require_open()
        while self._due[lane]:
            try:
                self._read([lane])
            except EnvFailure:
                continue  # restored as well
        with self._changing:
            for worker in self._lane_workers[lane]:
                if worker.failure is not None:
                    self._renew(worker)
            self._failed[lane] = None
            _leave(self._graves, lane)
        history = replace(history, action=self._actions.encode_all(history.action))
        process.write_file(self._histories[lane], history.dump())
        self._command(lane, RESTORE, seed)

    def send(self, action: NDArray[Any], lane: int) -> None:
        """Hands the actions to the workers and returns at once.

        Raises:
            EnvError: A worker is dead.
            ValueError: Actions of the wrong shape, dtype or range.
        """
        self._settle(lane)
        self._shared.action[self._spec.columns(lane)] = self._actions.encode(action)
        self._command(lane, STEP)

    def wait(self, lanes: Sequence[int]) -> list[int]:
        """Waits until at least one of `lanes` has the answers of all its workers, or has failed."""
        self._require_open()
        if not any(self._failed[lane] for lane in lanes):
            with suppress(EnvFailure):  # `recv` raises it again
                self._read(lanes)
        return [lane for lane in lanes if not self._due[lane] or self._failed[lane]]

    def recv(self, lane: int) -> EnvStep:
        """Waits for the workers' answers to the lane's last `reset`, `restore` or `send`.

        Raises:
            EnvError: An environment raised (with the worker's traceback), a worker died or hangs, or a reward or
                observation is not finite, and not to be mended.
        """
        self._settle(lane)
        return self._checks[lane](self._steps[lane])

    def awaited(self) -> list[str]:
        """The workers whose answers are due, and where they are; called by any thread."""
        due = {worker.index: (worker, child) for lane in self._due for worker, child in list(lane.values())}
        pairs = (due[index] for index in sorted(due))
        return [f"worker process {child.pid}, busy with {self._place(worker)}" for worker, child in pairs]

    def close(self) -> None:
        """Ends the workers: asks, then SIGTERM, then SIGKILL; the second call does nothing."""
        self._finalizer()

    def _start(self, setup: bytes) -> Child:
        module = "slipstream.envs.worker_process"
        return process.start(module, setup, self._memory, self._spec.lanes, self._histories)

    def _renew(self, worker: _Worker) -> None:
        """Starts a worker anew in place of one that has died."""
        try:
            child = self._start(worker.setup)
        except OSError as error:
            text = f"{self._spec.id}: another process for worker process {worker.child.pid} can't be started: {error}"
            raise EnvFailure(text, "") from error
        # Threads of other lanes may still wait for the old one: its descriptors are closed when all have turned away.
        lanes = {lane for lane, columns in enumerate(worker.columns) if columns}
        self._graves.append(_Grave(worker.child, lanes))
        for lane in lanes:
            self._failed[lane] = worker.failure
        worker.child, worker.failure = child, None
        self._await_made(worker)

    def _await_made(self, worker: _Worker) -> None:
        """Waits until a worker that has been started has made its environments."""
        child, timeout = worker.child, max(self._timeout, process.START_SECONDS)
        poll = select.poll()
        for fd in (child.answers[0], child.pidfd):
            if fd is not None:
                poll.register(fd, select.POLLIN)
        ready = [fd for fd, _ in poll.poll(timeout * 1000.0)]
        if not ready:
            raise self._hang([(worker, child)], timeout)
        if child.answers[0] not in ready:
            raise self._death(worker, child)
        self._check(worker, child, child.answers[0])

    def _command(self, lane: int, what: int, seed: int = 0) -> None:
        """Tells all workers of a lane; the answers of those that were told before one that is dead are due."""
        command, due = COMMAND.pack(what, lane, seed), self._due[lane]
        for worker in self._lane_workers[lane]:
            child = worker.child
            try:
                child.tell(command)
            except ChildDied:
                raise self._death(worker, child) from None
            due[child.answers[lane]] = (worker, child)

    def _settle(self, lane: int) -> None:
        """Waits for the answers that are still due to `lane`."""
        self._require_open()
        failure = self._failed[lane]
        if failure is not None:
            raise failure
        self._read([lane])

    def _require_open(self) -> None:
        if not self._workers:
            raise EnvError(f"{self._spec.id}: the environments are closed")

    def _read(self, lanes: Sequence[int]) -> None:
        """Reads answers until one of `lanes` has none due, or raises if one of their workers dies meanwhile.

        An answer that is an error, and those of workers that died or were given up, are due no more.
        """
        due = [self._due[lane] for lane in lanes]
        if not all(due):
            return
        home = {fd: lane for lane in lanes for fd in self._due[lane]}
        timeout, played = self._timeout, self._shared.busy[:, 1].copy()
        deadline = time.monotonic() + timeout
        workers = [worker for lane in lanes for worker in self._lane_workers[lane] if worker.failure is None]
        watched = [(worker, worker.child) for worker in workers]
        watched += [pair for lane in due for pair in lane.values()]  # some may have been replaced
        deaths = {child.pidfd: (worker, child) for worker, child in watched if child.pidfd is not None}
        poll = select.poll()
        for fd in (*home, *deaths):
            poll.register(fd, select.POLLIN)
        while all(due):
            ready = [fd for fd, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000.0)]
            if not ready:
                late = {worker.index: (worker, child) for missing in due for worker, child in missing.values()}
                now = self._shared.busy[:, 1].copy()
                if any(now[index] != played[index] for index in late):  # of whatever lane
                    played, deadline = now, time.monotonic() + timeout
                    self._played()
                    continue
                for missing in due:
                    missing.clear()
                raise self._hang(list(late.values()), timeout)
            for fd in ready:
                if fd in home:
                    lane = home[fd]
                    worker, child = self._due[lane].pop(fd)
                    poll.unregister(fd)
                    try:
                        self._check(worker, child, fd)
                    except EnvFailure as failure:
                        self._failed[lane] = failure
                        raise
            for fd in ready:
                if fd in deaths:
                    worker, child = deaths[fd]
                    for missing in due:
                        for answer in [answer for answer, (_, whose) in missing.items() if whose is child]:
                            del missing[answer]
                    raise self._death(worker, child)

    def _check(self, worker: _Worker, child: Child, fd: int) -> None:
        """Reads one answer, and raises what it reports."""
        try:
            child.read(fd)
        except ChildDied:
            raise self._death(worker, child) from None
        except ChildFailed as error:
            kind = EnvFailure if error.kind == EnvFailure.__name__ else EnvError
            raise kind(f"{error}\n\nin worker process {child.pid}:\n{error.traceback}") from None

    def _death(self, worker: _Worker, child: Child) -> EnvFailure:
        """What to say about a worker that ended without being told to."""
        with self._changing:
            return self._fail(worker, child, None)

    def _hang(self, late: Sequence[tuple[_Worker, Child]], timeout: float) -> EnvFailure:
        """Gives workers up that don't answer; says where they are, and their Python stacks."""
        how = f"no answer within {timeout:g} seconds"
        places, stacks = list[str](), list[str]()
        with self._changing:
            for worker, child in late:
                if child is not worker.child or worker.failure is not None:
                    return self._fail(worker, child, None)  # another lane was faster
                places.append(self._place(worker))
                stacks.append(f"worker process {child.pid}, busy with {places[-1]}:\n{child.stack_now()}")
            kind = f"{how}: {'; '.join(places)}"
            failure = EnvFailure("\n\n".join([f"{self._spec.id}: {kind}", *stacks]), kind)
            for worker, child in late:
                child.kill_group()
                self._fail(worker, child, failure)
        return failure

    def _fail(self, worker: _Worker, child: Child, failure: EnvFailure | None) -> EnvFailure:
        """Notes that a worker has died, of what if that is known, and returns what to say of it in any lane."""
        if child is not worker.child:  # and has been started anew since
            lanes = [failed for failed in self._failed if failed is not None]
            return lanes[0] if lanes else EnvFailure(f"{self._spec.id}: worker process {child.pid} was replaced")
        if worker.failure is None:
            if failure is None:
                how, stack = child.obituary()
                kind = f"{how} while busy with {self._place(worker)}"
                text = f"{self._spec.id}: worker process {child.pid} {kind}"
                failure = EnvFailure(f"{text}\n\n{stack}" if stack else text, "" if how == process.KILLED else kind)
            worker.failure = failure
            for lane, columns in enumerate(worker.columns):
                if columns:
                    self._failed[lane] = failure
        return worker.failure

    def _place(self, worker: _Worker) -> str:
        column = int(self._shared.busy[worker.index, 0])
        return f"slot {self._spec.first_slot + column}, {self._shared.rows.place(column)}"


@dataclass
class _Worker:
    """A worker process and its columns, by lane.

    Attributes:
        index: Its number.
        columns: Its columns, by lane.
        setup: What it is told once.
        child: The process.
        failure: Why it is no more, until it is started anew.
    """

    index: int
    columns: tuple[tuple[int, ...], ...]
    setup: bytes
    child: Child
    failure: EnvFailure | None = None


class _Grave(NamedTuple):
    """A process that has died, and the lanes whose threads may still wait for it."""

    child: Child
    lanes: set[int]


_Due = dict[int, tuple[_Worker, Child]]
"""Whose answers to a lane are due, by the descriptor that they come from."""


def _leave(graves: list[_Grave], lane: int) -> None:
    """Says that `lane` waits for none of the dead any more; closes the descriptors of those for whom nobody does."""
    for grave in list(graves):
        grave.lanes.discard(lane)
        if not grave.lanes:
            graves.remove(grave)
            process.stop([grave.child])


def _spread(spec: EnvSpec, workers: int) -> list[tuple[tuple[int, ...], ...]]:
    """The columns of each worker, by lane: a lane's columns in `workers` nearly equal runs, shifted by one per lane."""
    columns = np.arange(spec.num_envs)
    runs = [np.array_split(columns[spec.columns(lane)], workers) for lane in range(spec.lanes)]
    return [
        tuple(tuple(int(column) for column in runs[lane][(worker + lane) % workers]) for lane in range(spec.lanes))
        for worker in range(workers)
    ]


def _stop(workers: list[_Worker], graves: list[_Grave], files: list[int]) -> None:
    """Ends the processes within a bounded time."""
    process.stop([worker.child for worker in workers] + [grave.child for grave in graves])
    workers.clear()
    graves.clear()
    for file in files:
        os.close(file)
