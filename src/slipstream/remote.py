"""Collectors in other processes, as the driver sees them: the same bits, on cores of their own.

    driver thread of collector p            process p (`remote_process`): its lanes, environments and policy
    begin                                ->  resets its environments
    publish: weights into the ring          takes the newest weights before an unroll (or before every row)
    collect(places)                      ->  fills the places of its lanes in the shared slabs
    waits for the answer or its end      <-  steps, episodes and seconds; or an error

Who waits for whom: `collect` waits for its own process only, and notices at once if that dies; an error of one process
stops the others at their next row and is raised in all of them. Processes wait for commands. If the driver dies, the
kernel ends them (`process`). Slabs, weights and status share one mapping without a name, which goes with the last of
them.
"""

from __future__ import annotations

import json
import os
import select
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cloudpickle
import safetensors.torch

from slipstream import process
from slipstream.collector import Collected, Stopped
from slipstream.envs import EnvOptions
from slipstream.envs.rows import EnvError, EnvFailure
from slipstream.nets.policy import Policy
from slipstream.process import Child, ChildDied, ChildFailed
from slipstream.remote_process import Setup, Shared, Status
from slipstream.standing import Standing
from slipstream.types import EnvSpec, Place, Trajectory
from slipstream.weights import Ring

_SLICE_SECONDS = 0.5
_GRACE_SECONDS = 1.0  # for an answer after `stop`
_MENDING = 10  # times the time limit are allowed while environments that failed are brought back
_ACTION_SECONDS = 1.0  # allowed for every action that is played again, beside the time limit
_ERRORS = {kind.__name__: kind for kind in (EnvError, EnvFailure, ImportError, ValueError)}


@dataclass(frozen=True)
class Work:
    """What collector processes are to do.

    Attributes:
        env: Id or callable, as for `make_envs`; callables travel by cloudpickle.
        options: As for `make_envs`.
        workers: Processes that step environments, shared out among the collectors, one each at least; 0 for none.
        threads: Native threads per lane.
        spec: Of all environments of the run.
        policy: On the CPU; only its structure counts.
        rows: T.
        slabs: Number of slabs.
        seed: The run's seed.
        group: Lanes per forward.
        every_row: Whether to take over new weights before every row, rather than before every unroll.
        graphs: Whether forwards make graphs, as those that are kept do.
        delay: Longest random delay before a lane is stepped, in seconds.
        restarts: How often in a row a lane that has failed may be brought back.
    """

    env: str | Callable[[], Any]
    options: EnvOptions
    workers: int
    threads: int
    spec: EnvSpec
    policy: Policy
    rows: int
    slabs: int
    seed: int
    group: int = 1
    every_row: bool = False
    graphs: bool = False
    delay: float = 0.0
    restarts: int = 0


class Remotes:
    """Collector processes, started and ended together.

    Args:
        work: What they are to do.
        shares: The lanes of each, without gaps.

    Attributes:
        collectors: One per process, in the order of `shares`.
        slabs: What they fill.
        ring: Where they find new weights.

    Raises:
        EnvError: A process could not make its environments, or died.
        ImportError: A package is missing.
        ValueError: As from `make_envs`.
    """

    def __init__(self, work: Work, shares: Sequence[range]) -> None:
        layout = Shared.layout(work.spec, work.policy, work.rows, work.slabs, len(shares))
        children: list[Child] = []
        self._finalizer = weakref.finalize(self, process.stop, children)
        self.collectors: list[RemoteCollector] = []
        memory = process.anonymous_file()
        try:
            shared = Shared.over(memory, layout)
            shared.status[:] = Status.EMPTY
            self.slabs: list[Trajectory] = shared.slabs
            self.ring: Ring = shared.ring
            self._statuses = [Status(cells) for cells in shared.status]
            fate = _Fate(self._statuses)
            for index, lanes in enumerate(shares):
                setup = Setup(
                    index=index,
                    env=work.env,
                    options=work.options,
                    workers=max(work.workers // len(shares), 1) if work.workers else 0,
                    threads=work.threads,
                    spec=_share(work.spec, lanes),
                    policy=work.policy,
                    seed=work.seed,
                    group=work.group,
                    every_row=work.every_row,
                    graphs=work.graphs,
                    layout=layout,
                    delay=work.delay,
                    restarts=work.restarts,
                )
                children.append(process.start("slipstream.remote_process", _pickled(setup), memory))
                # Environments in processes of their own have this limit already, and may be brought back.
                timeout = work.options.timeout_seconds * (1.5 if work.workers else 1.0)
                self.collectors.append(RemoteCollector(children[-1], fate, index, setup.spec, lanes, timeout))
            for collector in self.collectors:
                collector.ready()
        except BaseException:
            self.close()
            raise
        finally:
            os.close(memory)

    def begin(self, seed: int, row: int) -> None:
        """Has all processes reset their environments and start collecting afresh; returns at once.

        Args:
            seed: For the environments.
            row: Number of the first row.
        """
        for collector in self.collectors:
            collector.begin(seed, row)

    def restore(self, seed: int, standing: Standing) -> list[int]:
        """Has all processes bring their slots back in place of `begin`; returns those that show something else."""
        parts = [standing.part(collector.columns) for collector in self.collectors]
        for collector, part in zip(self.collectors, parts, strict=True):
            collector.restore(seed, part)
        return [slot for collector, part in zip(self.collectors, parts, strict=True) for slot in collector.lost(part)]

    def state(self) -> Standing:
        """Where all slots stand; to be called between two unrolls, if they can be brought back."""
        return Standing.join([collector.state() for collector in self.collectors])

    @property
    def restarted(self) -> int:
        """How often environments have been brought back after a failure."""
        return sum(status.restarted for status in self._statuses)

    def close(self) -> None:
        """Ends the processes within a few seconds; the second call does nothing."""
        for collector in self.collectors:
            collector.stop()
        for collector in self.collectors:
            collector.close()
        self._finalizer()


class RemoteCollector:
    """The driver's end of a collector process; satisfies `Collects`.

    Args:
        child: The process.
        fate: What it shares with the other processes.
        index: Its number.
        spec: Its environments.
        lanes: Its lanes, as the run numbers them.
        timeout: Seconds that resetting or stepping may take before the run is given up.
    """

    def __init__(self, child: Child, fate: _Fate, index: int, spec: EnvSpec, lanes: range, timeout: float) -> None:
        self.lanes = tuple(lanes)
        self._child, self._fate, self._spec, self._timeout = child, fate, spec, timeout
        self._status = fate.statuses[index]
        self._used = threading.Lock()  # by whoever waits for the answer
        self._due = self._open = True

    @property
    def columns(self) -> slice:
        """Its slots."""
        return slice(self._spec.first_slot, self._spec.first_slot + self._spec.num_envs)

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._child.pid

    def ready(self) -> None:
        """Waits until the process has made its environments.

        Raises:
            EnvError: It could not, or died.
            ImportError: A package is missing.
            ValueError: As from `make_envs`.
        """
        with self._used:
            self._receive(max(self._timeout, process.START_SECONDS))

    def begin(self, seed: int, row: int) -> None:
        """Has the process reset its environments and start afresh; returns at once, but for an answer still due.

        Raises:
            EnvError: The process is dead, or still busy with what it was told before.
        """
        with self._used:
            self._start({"begin": {"seed": seed, "row": row}})

    def restore(self, seed: int, standing: Standing) -> None:
        """Has the process bring its slots back, as `begin`; returns at once."""
        content = safetensors.torch.save(standing.tensors())
        with self._used:
            self._start({"restore": {"seed": seed, "bytes": len(content)}}, content)

    def lost(self, standing: Standing) -> list[int]:
        """Waits until the slots are back, after `restore`, and returns those that show something else.

        Raises:
            EnvError: An environment raised, or the process died or hangs.
        """
        seconds = self._timeout + _ACTION_SECONDS * float(standing.history.count.sum())
        with self._used:
            return json.loads(self._receive(seconds))

    def state(self) -> Standing:
        """Where its slots stand; to be called between two unrolls.

        Raises:
            EnvError: The process died or hangs.
        """
        with self._used:
            self._tell({"state": {}})
            return Standing.of(safetensors.torch.load(self._receive(self._timeout)))

    def collect(self, places: Sequence[Place]) -> Collected:
        """Fills one unroll of every lane, in the order of `lanes`, and waits until it is done.

        Raises:
            EnvError: An environment raised (with the traceback of the process), or this or another process died or
                hangs.
            Stopped: After `stop`.
        """
        with self._used:
            if not self._open:
                raise EnvError(f"{self._spec.id}: the collector processes are closed")
            if self._due:
                self._receive(self._timeout)
            self._tell({"collect": [list(place) for place in places]})
            answer = self._receive(self._timeout)
        if not answer:
            raise self._fate.error or Stopped
        return Collected.of(json.loads(answer))

    def stop(self) -> None:
        """Has a `collect` under way in another thread, and every later one until `begin`, raise `Stopped`."""
        self._status.stop = True

    def close(self) -> None:
        """Waits, for a few seconds at most, until nobody waits for the process; call after `stop`."""
        if self._used.acquire(timeout=_GRACE_SECONDS + 2 * _SLICE_SECONDS):
            self._open = False
            self._used.release()

    def _start(self, command: dict[str, object], more: bytes = b"") -> None:
        """Tells a command that begins a run, once the process has answered the one before."""
        if self._due:
            try:
                self._receive(self._timeout)
            except Stopped:
                raise EnvError(f"{self._spec.id}: {self._name()} is still {self._doing()}") from None
        self._status.stop = False
        self._tell(command, more)

    def _tell(self, command: dict[str, object], more: bytes = b"") -> None:
        try:
            self._child.tell(json.dumps(command).encode() + b"\n" + more)
        except ChildDied:
            raise self._fate.fail(self._death()) from None
        self._due = True

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
                raise self._fate.fail(self._death())
            now = time.monotonic()
            if status.beats != beats:
                beats, moved = status.beats, now
            elif now - moved > timeout * (_MENDING if status.mending else 1):
                raise self._fate.fail(self._hang(timeout))
            if status.stop:
                stopped = stopped or now
                if now - stopped > _GRACE_SECONDS:
                    raise self._fate.error or Stopped

    def _read(self, fd: int) -> bytes:
        self._due = False
        try:
            return self._child.read(fd)
        except ChildDied:
            raise self._fate.fail(self._death()) from None
        except ChildFailed as error:
            text = f"{error}\n\nin collector process {self.pid}:\n{error.traceback}"
            raise self._fate.fail(_ERRORS.get(error.kind, RuntimeError)(text)) from None

    def _death(self) -> EnvError:
        how, stack = self._child.obituary()
        text = f"{self._spec.id}: {self._name()} {how} while {self._doing()}"
        return EnvError(f"{text}\n\n{stack}" if stack else text)

    def _hang(self, timeout: float) -> EnvError:
        text = f"{self._spec.id}: {self._name()} has done nothing for {timeout:g} seconds, while {self._doing()}"
        return EnvError(f"{text}\n\n{self._child.stack_now()}")

    def _name(self) -> str:
        first, size = self._spec.first_slot, self._spec.num_envs
        return f"collector process {self.pid} (slots {first} to {first + size - 1})"

    def _doing(self) -> str:
        lane, step = self._status.place
        if lane < 0:
            return "making or resetting its environments"
        slots = self._spec.slots(lane)
        return f"busy with slots {slots.start} to {slots.stop - 1}, step {step}"


class _Fate:
    """What the processes of a run share: if one fails, all stop, and its error is everyone's.

    Args:
        statuses: Of all processes.
    """

    def __init__(self, statuses: Sequence[Status]) -> None:
        self.statuses = statuses
        self.error: Exception | None = None
        self._changing = threading.Lock()

    def fail(self, error: Exception) -> Exception:
        """Stops all processes, and returns the first error."""
        with self._changing:
            self.error = self.error or error
        for status in self.statuses:
            status.stop = True
        return self.error


def _pickled(setup: Setup) -> bytes:
    try:
        return cloudpickle.dumps(setup)
    except Exception as error:
        raise ValueError(
            f"{setup.spec.id}: collector processes need an environment and a policy that cloudpickle can carry; "
            f"{type(error).__name__}: {error}. Pass functions that make what can't be carried, or use "
            "--placement.collectors thread"
        ) from error


def _share(spec: EnvSpec, lanes: range) -> EnvSpec:
    """The part of a run's environments that owns some of its lanes."""
    first = spec.first_slot + lanes.start * spec.lane_size
    return replace(spec, num_envs=len(lanes) * spec.lane_size, lanes=len(lanes), first_slot=first)
