"""Gymnasium environments in worker processes: rows in shared memory, a few bytes on pipes, nothing left behind.

    driver thread of lane l            worker w (its slots of every lane)
    send: writes actions, command  ->  steps its slots of l, writes rows
    recv: waits for all workers    <-  one byte on the answer pipe of (w, l)

Who waits for whom: `recv` waits for the answers of its own lane and, at the same time, for the death of any worker,
with a time limit (where the kernel refuses pidfds: only of those whose answers are due). Workers wait for commands
only. If the driver dies, the kernel kills the workers and what they started (`worker_process`); if a worker dies,
`recv` raises at once; `close` takes seconds at most.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import cloudpickle
import numpy as np
from numpy.typing import NDArray

from slipstream.envs.gym import as_step, source_spec
from slipstream.envs.rows import EnvError, check_finite
from slipstream.envs.shared import anonymous_file, map_shared, read_file
from slipstream.envs.slot import Source
from slipstream.envs.spaces import Actions
from slipstream.envs.worker_process import COMMAND, FAILED, RESET, Setup
from slipstream.types import EnvSpec, EnvStep

_START_SECONDS = 120.0  # at least this long for starting interpreters and making environments
_CLOSE_SECONDS = 1.5  # for workers to end by themselves, and again after SIGTERM
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_PROGRAM = "from slipstream.envs.worker_process import main; main()"


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

    Raises:
        EnvError: An environment could not be made, here (one is made first, for the spec) or in a worker.
        ValueError: As for `GymEnvs`, or fewer than one worker.
    """

    def __init__(
        self, source: Source, num_envs: int, lanes: int = 1, workers: int = 1, timeout_seconds: float = 300.0
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        with closing(source.make(0)) as env:
            self._spec = source_spec(source, env, num_envs, lanes)
            self._actions = Actions(env.action_space, self._spec.lane_size, source.id)
        self._timeout = timeout_seconds
        self._counts = [0] * lanes
        self._due: list[_Due] = [{} for _ in range(lanes)]
        self._workers: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _stop, self._workers)
        members = [slots for slots in _spread(self._spec, workers) if any(slots)]
        memory = anonymous_file()
        try:
            like = np.zeros(self._actions.shape[1:], self._actions.dtype)
            self._shared = map_shared(memory, env.observation_space, like, num_envs, len(members))
            for index, slots in enumerate(members):
                setup = Setup(source, env.observation_space, like, num_envs, len(members), index, slots)
                self._workers.append(_start(setup, memory))
            self._read([{w.answers[0]: w for w in self._workers}], max(timeout_seconds, _START_SECONDS))
        except BaseException:
            self.close()
            raise
        finally:
            os.close(memory)
        self._lane_workers = [[w for w in self._workers if w.slots[lane]] for lane in range(lanes)]
        self._steps = [as_step(self._shared.rows.part(self._spec.slots(lane))) for lane in range(lanes)]

    @property
    def spec(self) -> EnvSpec:
        """Spaces, slots and lanes."""
        return self._spec

    def reset(self, seed: int) -> None:
        """Starts every slot at episode 0 of run `seed`, in `[0, 2**64)`; returns at once."""
        for lane in range(self._spec.lanes):
            self._settle(lane)
            self._counts[lane] = 0
            self._command(lane, RESET - lane, seed)

    def send(self, action: NDArray[Any], lane: int) -> None:
        """Hands the actions to the workers and returns at once.

        Raises:
            EnvError: A worker is dead.
            ValueError: Actions of the wrong shape, dtype or range.
        """
        self._settle(lane)
        self._shared.action[self._spec.slots(lane)] = self._actions.encode(action)
        self._counts[lane] += 1
        self._command(lane, lane, 0)

    def wait(self, lanes: Sequence[int]) -> list[int]:
        """Waits until at least one of `lanes` has the answers of all its workers.

        Raises:
            EnvError: An environment of one of the lanes raised, or a worker died or hangs.
        """
        self._require_open()
        due = [self._due[lane] for lane in lanes]
        self._read(due, self._timeout)
        return [lane for lane, missing in zip(lanes, due, strict=True) if not missing]

    def recv(self, lane: int) -> EnvStep:
        """Waits for the workers' answers to the lane's last `reset` or `send`.

        Raises:
            EnvError: An environment raised (with the worker's traceback), a worker died or hangs, or a reward or
                observation is not finite.
        """
        self._settle(lane)
        step = self._steps[lane]
        check_finite(step, self._spec.id, self._spec.slots(lane).start, self._counts[lane])
        return step

    def close(self) -> None:
        """Ends the workers: asks, then SIGTERM, then SIGKILL; the second call does nothing."""
        self._finalizer()

    def _command(self, lane: int, number: int, seed: int) -> None:
        message = COMMAND.pack(number, seed)
        self._due[lane] = {worker.answers[lane]: worker for worker in self._lane_workers[lane]}
        for worker in self._lane_workers[lane]:
            try:
                os.write(worker.commands, message)
            except BrokenPipeError:
                raise self._death(worker) from None

    def _settle(self, lane: int) -> None:
        """Waits for the answers that are still due to `lane`."""
        self._require_open()
        self._read([self._due[lane]], self._timeout)

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
            if worker.pidfd is not None:
                poll.register(worker.pidfd, select.POLLIN)
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
                if worker.pidfd in ready:
                    raise self._death(worker)

    def _check(self, worker: _Worker, fd: int) -> None:
        """Reads one answer, and raises what it reports."""
        if self._bytes(worker, fd, 1) != FAILED:
            return
        told = json.loads(self._bytes(worker, fd, int.from_bytes(self._bytes(worker, fd, 4), "little")))
        raise EnvError(f"{told['message']}\n\nin worker process {worker.process.pid}:\n{told['traceback']}")

    def _bytes(self, worker: _Worker, fd: int, count: int) -> bytes:
        """Reads `count` bytes of the worker's answer, or raises if it dies before it has written them."""
        found = b""
        while len(found) < count:
            part = os.read(fd, count - len(found))
            if not part:
                raise self._death(worker)
            found += part
        return found

    def _death(self, worker: _Worker) -> EnvError:
        """What to say about a worker that ended without being told to."""
        if not _ended(worker, _CLOSE_SECONDS):
            return EnvError(f"{self._spec.id}: worker process {worker.process.pid} closed its pipes but lives on")
        _kill_group(worker)  # while its process id is still taken by what is left of it
        code = worker.process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        stack = read_file(worker.stack).decode(errors="replace")
        return EnvError(
            f"{self._spec.id}: worker process {worker.process.pid} {how} while busy with {self._place(worker)}"
            + (f"\n\n{stack}" if stack else "")
        )

    def _hang(self, workers: list[_Worker], timeout: float) -> EnvError:
        """What to say about workers that don't answer: where, and their Python stacks."""
        texts = [f"{self._spec.id}: no answer within {timeout:g} seconds"]
        for worker in workers:
            before = len(read_file(worker.stack))
            worker.process.send_signal(signal.SIGUSR1)
            deadline = time.monotonic() + _CLOSE_SECONDS
            while len(read_file(worker.stack)) == before and time.monotonic() < deadline:
                time.sleep(0.01)  # a signal handler writes the stack; nothing tells when it is done
            stack = read_file(worker.stack)[before:].decode(errors="replace")
            texts.append(f"worker process {worker.process.pid}, busy with {self._place(worker)}:\n{stack}")
        return EnvError("\n\n".join(texts))

    def _place(self, worker: _Worker) -> str:
        slot = int(self._shared.busy[worker.index])
        lane = slot // self._spec.lane_size
        return f"slot {slot}, step {self._counts[lane]}"


@dataclass(frozen=True)
class _Worker:
    """The driver's ends of one worker."""

    index: int
    process: subprocess.Popen[bytes]
    pidfd: int | None
    commands: int
    answers: tuple[int, ...]
    lifeline: int
    stack: int
    slots: tuple[tuple[int, ...], ...]


_Due = dict[int, _Worker]
"""Workers whose answers to a lane are due, by the descriptor that they come from."""


def _spread(spec: EnvSpec, workers: int) -> list[tuple[tuple[int, ...], ...]]:
    """The slots of each worker, by lane: a lane's slots in `workers` nearly equal runs, shifted by one per lane."""
    runs = [
        np.array_split(np.arange(spec.slots(lane).start, spec.slots(lane).stop), workers) for lane in range(spec.lanes)
    ]
    return [
        tuple(tuple(int(slot) for slot in runs[lane][(worker + lane) % workers]) for lane in range(spec.lanes))
        for worker in range(workers)
    ]


def _start(setup: Setup, memory: int) -> _Worker:
    """Starts a fresh interpreter (no fork: threads, locks and CUDA stay out of it) in its own process group."""
    setup_file, stack = anonymous_file(cloudpickle.dumps(setup)), anonymous_file()
    commands, lifeline = os.pipe(), os.pipe()
    answers = [os.pipe() for _ in setup.slots]
    numbers = [setup_file, memory, stack, lifeline[0], commands[0], *(write for _, write in answers)]
    environment = {**os.environ, **dict.fromkeys(_ONE_THREAD, "1"), "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *map(str, numbers)],
            stdin=subprocess.DEVNULL,
            env=environment,
            pass_fds=numbers,
            process_group=0,
        )
    except BaseException:
        for fd in (commands[1], lifeline[1], stack, *(read for read, _ in answers)):
            os.close(fd)
        raise
    finally:
        for fd in set(numbers) - {memory, stack}:
            os.close(fd)
    reads = tuple(read for read, _ in answers)
    return _Worker(setup.index, process, _pidfd(process.pid), commands[1], reads, lifeline[1], stack, setup.slots)


def _pidfd(pid: int) -> int | None:
    """A descriptor that tells of the death of a process, where there is such a thing; pipes tell it otherwise."""
    if sys.platform != "linux":
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:  # older kernels and strict containers (ENOSYS, EPERM)
        return None


def _stop(workers: list[_Worker]) -> None:
    """Ends the processes and what they started, within a bounded time, and closes the driver's ends."""
    for worker in workers:
        os.close(worker.commands)
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _CLOSE_SECONDS
        for worker in workers:
            if not _ended(worker, max(0.0, deadline - time.monotonic())):
                os.killpg(worker.process.pid, number)
    for worker in workers:
        if worker.process.returncode is None:
            _kill_group(worker)  # processes that an environment started and forgot
            worker.process.wait()
        for fd in (worker.lifeline, worker.stack, *worker.answers):
            os.close(fd)
        if worker.pidfd is not None:
            os.close(worker.pidfd)
    workers.clear()


def _ended(worker: _Worker, seconds: float) -> bool:
    """Whether the process ends within `seconds`; where the system allows it, its process id stays taken."""
    if worker.pidfd is None:
        try:
            worker.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        return True
    poll = select.poll()
    poll.register(worker.pidfd, select.POLLIN)
    return bool(poll.poll(seconds * 1000.0))


def _kill_group(worker: _Worker) -> None:
    """Kills every process of the worker's group that is left."""
    try:
        os.killpg(worker.process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return  # nobody left (macOS says the latter of zombies)
