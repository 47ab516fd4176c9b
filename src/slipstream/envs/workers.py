"""Gymnasium environments in worker processes: rows in shared memory, a few bytes on pipes, nothing left behind.

    driver thread of lane l            worker w (its slots of every lane)
    send: writes actions, command  ->  steps its slots of l, writes rows
    recv: waits for all workers    <-  five bytes on the answer pipe of (w, l)

Who waits for whom: `recv` waits for the answers of its own lane and, at the same time, for the death of any worker,
with a time limit (where the kernel refuses pidfds: only of those whose answers are due). Workers wait for commands
only. If the driver dies, the kernel kills the workers and what they started (`process`); if a worker dies, `recv`
raises at once; `close` takes seconds at most.
"""

from __future__ import annotations

import os
import select
import time
import weakref
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import cloudpickle
import numpy as np
from numpy.typing import NDArray

from slipstream import process
from slipstream.envs.gym import as_step, source_spec
from slipstream.envs.rows import EnvError, check_row
from slipstream.envs.shared import map_shared
from slipstream.envs.slot import Source
from slipstream.envs.spaces import Actions
from slipstream.envs.worker_process import COMMAND, RESET, RESTORE, STEP, Setup
from slipstream.history import History
from slipstream.process import Child, ChildDied, ChildFailed
from slipstream.types import EnvSpec, EnvStep

_ACTION_SECONDS = 1.0  # allowed for every action that is played again, beside the time limit


class WorkerEnvs:
    """`num_envs` Gymnasium environments in `workers` processes; bit-identical to `GymEnvs` for any number of them.

    Every lane's slots are spread over all workers, so that a lane steps as fast as the processes allow. Lanes may be
    used by different threads at the same time.

    Args:
        source: What to make. It travels by cloudpickle, so that callables may be lambdas or live in `__main__`.
        num_envs: Slots.
        lanes: Lanes; divides `num_envs`.
        workers: Processes; those that would have no slot are not started.
        timeout_seconds: How long resetting or stepping a lane may take before the run is given up.
        first_slot: Slot of column 0.

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
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        with closing(source.make(first_slot)) as env:
            self._spec = source_spec(source, env, num_envs, lanes, first_slot)
            self._actions = Actions(env.action_space, self._spec.lane_size, source.id)
        self._timeout = timeout_seconds
        self._counts = [0] * lanes
        self._patience = [timeout_seconds] * lanes
        self._due: list[_Due] = [{} for _ in range(lanes)]
        self._workers: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _stop, self._workers)
        members = [columns for columns in _spread(self._spec, workers) if any(columns)]
        memory = process.anonymous_file()
        try:
            like = np.zeros(self._actions.shape[1:], self._actions.dtype)
            self._shared = map_shared(memory, env.observation_space, like, num_envs, len(members))
            for index, columns in enumerate(members):
                setup = Setup(source, env.observation_space, like, num_envs, first_slot, len(members), index, columns)
                child = process.start("slipstream.envs.worker_process", cloudpickle.dumps(setup), memory, lanes)
                self._workers.append(_Worker(index, columns, child))
            due = {worker.child.answers[0]: worker for worker in self._workers}
            self._read([due], max(timeout_seconds, process.START_SECONDS))
        except BaseException:
            self.close()
            raise
        finally:
            os.close(memory)
        self._lane_workers = [[w for w in self._workers if w.columns[lane]] for lane in range(lanes)]
        scored = bool(source.score_key)
        parts = [self._shared.rows.part(self._spec.columns(lane)) for lane in range(lanes)]
        self._steps = [as_step(part, scored) for part in parts]

    @property
    def spec(self) -> EnvSpec:
        """Spaces, slots and lanes."""
        return self._spec

    def reset(self, seed: int) -> None:
        """Starts every slot at episode 0 of run `seed`, in `[0, 2**64)`; returns at once."""
        for lane in range(self._spec.lanes):
            self._settle(lane)
            self._counts[lane] = 0
            self._command(lane, RESET, seed)

    def restore(self, seed: int, history: History) -> None:
        """Has the workers play every slot's episode as far as it had come; returns at once."""
        history = replace(history, action=self._actions.encode_all(history.action))
        for lane in range(self._spec.lanes):
            self._settle(lane)
            self._counts[lane] = 0
            part = history.part(self._spec.columns(lane))
            self._command(lane, RESTORE, seed, part.dump())
            self._patience[lane] = self._timeout + _ACTION_SECONDS * float(part.count.sum())

    def send(self, action: NDArray[Any], lane: int) -> None:
        """Hands the actions to the workers and returns at once.

        Raises:
            EnvError: A worker is dead.
            ValueError: Actions of the wrong shape, dtype or range.
        """
        self._settle(lane)
        self._shared.action[self._spec.columns(lane)] = self._actions.encode(action)
        self._counts[lane] += 1
        self._command(lane, STEP)

    def wait(self, lanes: Sequence[int]) -> list[int]:
        """Waits until at least one of `lanes` has the answers of all its workers.

        Raises:
            EnvError: An environment of one of the lanes raised, or a worker died or hangs.
        """
        self._require_open()
        due = [self._due[lane] for lane in lanes]
        self._read(due, max(self._patience[lane] for lane in lanes))
        return [lane for lane, missing in zip(lanes, due, strict=True) if not missing]

    def recv(self, lane: int) -> EnvStep:
        """Waits for the workers' answers to the lane's last `reset` or `send`.

        Raises:
            EnvError: An environment raised (with the worker's traceback), a worker died or hangs, or a reward or
                observation is not finite.
        """
        self._settle(lane)
        step = self._steps[lane]
        check_row(step, self._actions, self._spec.slots(lane).start, self._counts[lane])
        return step

    def close(self) -> None:
        """Ends the workers: asks, then SIGTERM, then SIGKILL; the second call does nothing."""
        self._finalizer()

    def _command(self, lane: int, what: int, seed: int = 0, more: bytes = b"") -> None:
        self._patience[lane] = self._timeout
        message = COMMAND.pack(what, lane, seed, len(more)) + more
        self._due[lane] = {worker.child.answers[lane]: worker for worker in self._lane_workers[lane]}
        for worker in self._lane_workers[lane]:
            try:
                worker.child.tell(message)
            except ChildDied:
                raise self._death(worker) from None

    def _settle(self, lane: int) -> None:
        """Waits for the answers that are still due to `lane`."""
        self._require_open()
        self._read([self._due[lane]], self._patience[lane])

    def _require_open(self) -> None:
        if not self._workers:
            raise EnvError(f"{self._spec.id}: the environments are closed")

    def _read(self, due: list[_Due], timeout: float) -> None:
        """Reads answers until one of `due` is empty, or raises if any worker at all dies meanwhile."""
        if not all(due):
            return
        home = {fd: lane for lane in due for fd in lane}
        deadline = time.monotonic() + timeout
        poll = select.poll()
        for fd in home:
            poll.register(fd, select.POLLIN)
        for worker in self._workers:
            if worker.child.pidfd is not None:
                poll.register(worker.child.pidfd, select.POLLIN)
        while all(due):
            ready = [fd for fd, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000.0)]
            if not ready:
                late = {worker.index: worker for lane in due for worker in lane.values()}
                raise self._hang(list(late.values()), timeout)
            for fd in ready:
                if fd in home:
                    self._check(home[fd].pop(fd), fd)
                    poll.unregister(fd)
            for worker in self._workers:
                if worker.child.pidfd in ready:
                    raise self._death(worker)

    def _check(self, worker: _Worker, fd: int) -> None:
        """Reads one answer, and raises what it reports."""
        try:
            worker.child.read(fd)
        except ChildDied:
            raise self._death(worker) from None
        except ChildFailed as error:
            raise EnvError(f"{error}\n\nin worker process {worker.child.pid}:\n{error.traceback}") from None

    def _death(self, worker: _Worker) -> EnvError:
        """What to say about a worker that ended without being told to."""
        how, stack = worker.child.obituary()
        text = f"{self._spec.id}: worker process {worker.child.pid} {how} while busy with {self._place(worker)}"
        return EnvError(f"{text}\n\n{stack}" if stack else text)

    def _hang(self, workers: list[_Worker], timeout: float) -> EnvError:
        """What to say about workers that don't answer: where, and their Python stacks."""
        texts = [f"{self._spec.id}: no answer within {timeout:g} seconds"]
        for worker in workers:
            stack = worker.child.stack_now()
            texts.append(f"worker process {worker.child.pid}, busy with {self._place(worker)}:\n{stack}")
        return EnvError("\n\n".join(texts))

    def _place(self, worker: _Worker) -> str:
        column = int(self._shared.busy[worker.index])
        return f"slot {self._spec.first_slot + column}, step {self._counts[column // self._spec.lane_size]}"


@dataclass(frozen=True)
class _Worker:
    """A worker process and its columns, by lane."""

    index: int
    columns: tuple[tuple[int, ...], ...]
    child: Child


_Due = dict[int, _Worker]
"""Workers whose answers to a lane are due, by the descriptor that they come from."""


def _spread(spec: EnvSpec, workers: int) -> list[tuple[tuple[int, ...], ...]]:
    """The columns of each worker, by lane: a lane's columns in `workers` nearly equal runs, shifted by one per lane."""
    columns = np.arange(spec.num_envs)
    runs = [np.array_split(columns[spec.columns(lane)], workers) for lane in range(spec.lanes)]
    return [
        tuple(tuple(int(column) for column in runs[lane][(worker + lane) % workers]) for lane in range(spec.lanes))
        for worker in range(workers)
    ]


def _stop(workers: list[_Worker]) -> None:
    """Ends the processes within a bounded time."""
    process.stop([worker.child for worker in workers])
    workers.clear()
