"""The life of a collector process: its own environments, its own policy, the same collector as everywhere.

Commands and answers are lines of JSON on pipes; where slots are to be brought goes with them as safetensors. Rows,
weights, where slots stand after an unroll, and the state of affairs are in shared memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import cloudpickle
import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream import memory, process, slab, tree
from slipstream.collector import Assignment, Stands, Stopped
from slipstream.envs import EnvOptions, make_envs
from slipstream.envs.recorded import recorded
from slipstream.envs.rows import EnvError
from slipstream.history import History
from slipstream.jitter import Jitter, JitteredEnvs
from slipstream.local import Locals
from slipstream.nets.policy import Policy
from slipstream.nets.trunk import packed
from slipstream.ready import make_collector
from slipstream.standing import SlotState, Standing
from slipstream.tree import Tree
from slipstream.types import Envs, EnvSpec, EnvStep, Place, Trajectory
from slipstream.weights import Ring, RingReplica


@dataclass(frozen=True)
class Work:
    """What collector processes are to do: all of them, or one.

    Attributes:
        env: Id or callable, as for `make_envs`; callables travel by cloudpickle.
        options: As for `make_envs`.
        workers: Processes that step environments; 0 for none.
        threads: Native threads per lane.
        spec: Of all environments of the run, or of the process.
        policy: On the CPU; only its structure counts, weights come through the ring.
        rows: T.
        slabs: Number of slabs.
        seed: The run's seed.
        group: Lanes per forward.
        every_row: Whether to take over new weights before every row, rather than before every unroll.
        graphs: Whether forwards make graphs, as those that are kept do.
        delay: Longest random delay before a lane is stepped, in seconds.
        restarts: How often in a row a lane that has failed, or a process that has died, may be brought back.
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


@dataclass(frozen=True)
class Setup:
    """What a collector process is told once.

    Attributes:
        index: Its number.
        work: Its share of the work.
        layout: Of the shared memory, from `Shared.layout`.
    """

    index: int
    work: Work
    layout: Tree

    @property
    def columns(self) -> slice:
        """Its slots among the run's."""
        spec = self.work.spec
        return slice(spec.first_slot, spec.first_slot + spec.num_envs)


class Shared(NamedTuple):
    """What driver and collector processes both see.

    Attributes:
        slabs: As `Parts.slabs`.
        ring: Weights; the driver publishes.
        status: int64 `[P, 6]`, one row per process, see `Status`.
        slots: Where the run's slots stood at the end of the last unroll; each process writes its own.
        seen: int64 `[B]`, check sums of what they showed there.
    """

    slabs: list[Trajectory]
    ring: Ring
    status: NDArray[np.int64]
    slots: SlotState
    seen: Tensor

    @staticmethod
    def layout(spec: EnvSpec, policy: Policy, rows: int, slabs: int, processes: int) -> Tree:
        """Trees of tensors without memory for `memory.share`."""
        return {
            "slabs": (slab.layout(spec, policy, rows),) * slabs,
            "ring": Ring.layout(policy),
            "status": torch.empty(processes, len(Status.EMPTY), dtype=torch.int64, device="meta"),
            "slots": SlotState.layout(spec.num_envs, tree.leaves(policy.initial_state(1))),
            "seen": torch.empty(spec.num_envs, dtype=torch.int64, device="meta"),
        }

    @staticmethod
    def over(fd: int, layout: Tree) -> Shared:
        """Maps the file."""
        mapped = memory.share(fd, layout)
        status: Tensor = mapped["status"]
        slabs, ring = [Trajectory(**part) for part in mapped["slabs"]], Ring(mapped["ring"])
        return Shared(slabs, ring, status.numpy(), SlotState(*mapped["slots"]), mapped["seen"])


_STOP, _BEATS, _LANE, _ROW, _RESTARTS, _MENDING = range(6)


class Status:
    """A process's row of shared numbers: whether it should stop, that it lives, and what it is doing.

    Args:
        cells: int64 `[6]`, by the names `_STOP` (the driver's to set) to `_MENDING`.
    """

    EMPTY = (0, 0, -1, 0, 0, 0)

    def __init__(self, cells: NDArray[np.int64]) -> None:
        self._cells = cells

    def set(self, lane: int, row: int) -> None:
        """Notes what is being done; a lane below 0 is none."""
        self._cells[_LANE], self._cells[_ROW] = lane, row
        self.beat()

    def beat(self) -> None:
        """Gives a sign of life."""
        self._cells[_BEATS] += 1

    @property
    def beats(self) -> int:
        """Rises with everything that is done."""
        return int(self._cells[_BEATS])

    @property
    def place(self) -> tuple[int, int]:
        """Lane and row that it is busy with."""
        return int(self._cells[_LANE]), int(self._cells[_ROW])

    @property
    def restarted(self) -> int:
        """How often environments have been brought back after a failure."""
        return int(self._cells[_RESTARTS])

    @property
    def mending(self) -> bool:
        """Whether environments that failed are being brought back; whoever sees the end of it sees a beat, too."""
        return bool(self._cells[_MENDING])

    def mend(self, begun: bool) -> None:
        """Notes that this begins or is done."""
        self._cells[_RESTARTS] += begun
        self._cells[_BEATS] += 1
        self._cells[_MENDING] = begun

    def renew(self) -> None:
        """Forgets what the process did; beats, restarts and `stop` are kept for the one that takes its place."""
        for cell in (_LANE, _ROW, _MENDING):
            self._cells[cell] = self.EMPTY[cell]

    @property
    def stop(self) -> bool:
        """Whether it should stop at its next row."""
        return bool(self._cells[_STOP])

    @stop.setter
    def stop(self, value: bool) -> None:
        self._cells[_STOP] = value


class WatchedEnvs:
    """Environments that note in shared memory what they do, and stop when told to; `Envs` in everything else.

    Args:
        envs: The environments.
        status: Where to note it.
    """

    def __init__(self, envs: Envs, status: Status) -> None:
        self._envs, self._status = envs, status
        self.count_from(0)

    @property
    def spec(self) -> EnvSpec:
        """Spaces, slots and lanes."""
        return self._envs.spec

    def count_from(self, row: int) -> None:
        """Says how many rows every lane has had since the start."""
        self._counts, self._sent = [row] * self.spec.lanes, [False] * self.spec.lanes

    def reset(self, seed: int) -> None:
        """Starts every slot."""
        self.count_from(0)
        self._status.set(-1, 0)
        self._envs.reset(seed)

    def restore(self, lane: int, seed: int, history: History) -> None:
        """Brings a lane back."""
        self._counts[lane] -= self._sent[lane]  # it is sent again
        self._sent[lane] = False
        self._status.set(lane, self._counts[lane])
        self._envs.restore(lane, seed, history)

    def send(self, action: NDArray[Any], lane: int) -> None:
        """Steps a lane.

        Raises:
            Stopped: The driver wants no more rows.
        """
        if self._status.stop:
            raise Stopped
        self._counts[lane] += 1
        self._sent[lane] = True
        self._status.set(lane, self._counts[lane])
        self._envs.send(action, lane)

    def wait(self, lanes: Sequence[int]) -> list[int]:
        """Waits for any of several lanes."""
        return self._envs.wait(lanes)

    def recv(self, lane: int) -> EnvStep:
        """Waits for a lane."""
        self._status.set(lane, self._counts[lane])
        step = self._envs.recv(lane)
        self._sent[lane] = False
        return step

    def close(self) -> None:
        """Releases what the environments hold."""
        self._envs.close()


def main() -> None:
    """Entry point of the process."""
    fds = process.enter()
    torch.set_num_threads(1)
    actor = _Actor()
    answer = partial(process.answer, fds.answers[0])
    if answer(partial(actor.make, fds)):
        with open(fds.commands, "rb") as commands:
            for line in commands:
                answer(partial(actor.obey, json.loads(line), commands))
    actor.close()
    process.leave()


class _Actor:
    """What the process holds."""

    def __init__(self) -> None:
        self._envs: Envs | None = None

    def make(self, fds: process.Descriptors) -> None:
        """Makes environments and policy."""
        setup: Setup = cloudpickle.loads(process.read_file(fds.setup))
        work, spec = setup.work, setup.work.spec
        self._work, self._shared = work, Shared.over(fds.memory, setup.layout)
        self._status = Status(self._shared.status[setup.index])
        self._slots, self._seen = self._shared.slots.part(setup.columns), self._shared.seen.numpy()[setup.columns]
        self._replica = RingReplica(work.policy if work.graphs else packed(work.policy), self._shared.ring)
        envs = make_envs(
            work.env,
            spec.num_envs,
            spec.lanes,
            work.options,
            workers=work.workers,
            threads=work.threads,
            first_slot=spec.first_slot,
            played=self._status.beat,
        )
        self._envs = self._watched = WatchedEnvs(envs, self._status)
        if envs.spec != spec:
            raise EnvError(f"{spec.id}: in a collector process the environments are {envs.spec}, in the driver {spec}")
        if work.delay:
            self._envs = JitteredEnvs(self._envs, Jitter(work.delay))
        self._recorded = recorded(self._envs, work.restarts, self._status.mend)
        self._envs = self._recorded or self._envs
        self._locals = Locals(self._envs, self._recorded, [range(spec.lanes)], self._make_collector)

    def obey(self, command: dict[str, Any], more: BinaryIO) -> bytes | None:
        """Does what the driver says; `more` holds what comes with it."""
        if "begin" in command:
            self._locals.begin(**command["begin"])
            return None
        if "restore" in command:
            seed, row, size = (command["restore"][name] for name in ("seed", "row", "bytes"))
            return self._restore(seed, row, Standing.of(safetensors.torch.load(more.read(size))))
        return self._collect([Place(*place) for place in command["collect"]])

    def close(self) -> None:
        """Closes the environments."""
        if self._envs is not None:
            self._envs.close()

    def _restore(self, seed: int, row: int, standing: Standing) -> bytes:
        """Brings the slots to where they had `row` rows; answers which of them show something else than then."""
        self._watched.count_from(row)
        return json.dumps(self._locals.restore(seed, standing)).encode()

    def _make_collector(self, lanes: range, row: int) -> Stands:
        assert self._envs is not None
        given = Assignment(
            self._envs,
            lanes,
            self._replica.policy,
            self._shared.slabs,
            self._work.seed,
            self._replica.refresh,
            every_row=self._work.every_row,
            graphs=self._work.graphs,
            row=row,
        )
        return make_collector(given, self._work.group)

    def _collect(self, places: Sequence[Place]) -> bytes:
        (collector,) = self._locals.collectors
        try:
            collected = collector.collect(places)
        except Stopped:
            return b""
        if self._recorded is not None:
            self._slots.copy_(collector.state())
            self._seen[:] = self._recorded.seen()
        return json.dumps(asdict(collected)).encode()
