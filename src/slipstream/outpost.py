"""What a collector process holds, whatever ties it to the driver: environments, policy and collector of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from slipstream.collector import Assignment, Collected, Stands, Stopped
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
from slipstream.types import Envs, EnvSpec, EnvStep, Place, Trajectory


@dataclass(frozen=True)
class Work:
    """What collector processes are to do: all of them, or one.

    Attributes:
        env: Id or callable, as for `make_envs`; callables travel by cloudpickle.
        options: As for `make_envs`.
        workers: Processes that step environments; 0 for none.
        threads: Native threads per lane.
        spec: Of all environments of the run, or of the process.
        policy: On the CPU; only its structure counts, weights come as the run goes.
        rows: T.
        slabs: Number of slabs.
        seed: The run's seed.
        group: Lanes per forward.
        every_row: Whether to take over new weights before every row, rather than before every unroll.
        graphs: Whether forwards make graphs, as those that are kept do.
        delay: Longest random delay before a lane is stepped, in seconds.
        restarts: How often in a row a lane that has failed, or a process that has died, may be brought back.
        ahead: Unrolls that a process may be told of before the one under way is done.
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
    ahead: int = 0


class Unroll(NamedTuple):
    """What `Outpost.collect` brought, beside the rows.

    Attributes:
        collected: What is told of it.
        slots: Where the slots stand now; None where they can't be brought back.
        seen: int64 `[B]`, check sums of what they show there; empty where they can't be brought back.
    """

    collected: Collected
    slots: SlotState | None
    seen: NDArray[np.int64]


class Outpost:
    """Environments, policy and collector of a process that is not the driver's.

    Args:
        work: Its share of the work.
        slabs: What its collector fills.
        policy: Acts, as of `acting_policy`.
        refresh: Brings the policy up to date, and returns its version.
        status: Where it notes what it is doing.

    Raises:
        EnvError: The environments are not those that the driver knows.
    """

    def __init__(
        self,
        work: Work,
        slabs: Sequence[Trajectory],
        policy: Policy,
        refresh: Callable[[], int],
        status: Status,
    ) -> None:
        self._envs: Envs
        self._work, self._slabs, self._policy, self._refresh = work, slabs, policy, refresh
        spec = work.spec
        envs = make_envs(
            work.env,
            spec.num_envs,
            spec.lanes,
            work.options,
            workers=work.workers,
            threads=work.threads,
            first_slot=spec.first_slot,
            played=status.beat,
        )
        if envs.spec != spec:
            envs.close()
            raise EnvError(f"{spec.id}: in a collector process the environments are {envs.spec}, in the driver {spec}")
        self._envs = self._watched = WatchedEnvs(envs, status)
        if work.delay:
            self._envs = JitteredEnvs(self._envs, Jitter(work.delay))
        self._recorded = recorded(self._envs, work.restarts, status.mend)
        self._envs = self._recorded or self._envs
        self._locals = Locals(self._envs, self._recorded, [range(spec.lanes)], self._make_collector)

    def begin(self, seed: int, row: int) -> None:
        """Resets the environments and starts collecting afresh, at row `row`."""
        self._locals.begin(seed, row)

    def restore(self, seed: int, row: int, standing: Standing) -> list[int]:
        """Brings the slots to where they had `row` rows; returns those that show something else than then."""
        self._watched.count_from(row)
        return self._locals.restore(seed, standing)

    def collect(self, places: Sequence[Place]) -> Unroll | None:
        """Fills one unroll of every lane, in their order; None if it was stopped."""
        (collector,) = self._locals.collectors
        try:
            collected = collector.collect(places)
        except Stopped:
            return None
        if self._recorded is None:
            return Unroll(collected, None, np.empty(0, np.int64))
        return Unroll(collected, collector.state(), self._recorded.seen())

    def close(self) -> None:
        """Closes the environments."""
        self._envs.close()

    def _make_collector(self, lanes: range, row: int) -> Stands:
        given = Assignment(
            self._envs,
            lanes,
            self._policy,
            self._slabs,
            self._work.seed,
            self._refresh,
            every_row=self._work.every_row,
            graphs=self._work.graphs,
            row=row,
        )
        return make_collector(given, self._work.group)


def acting_policy(work: Work) -> Policy:
    """The policy of the work, in the form that acts fastest."""
    return work.policy if work.graphs else packed(work.policy)


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

    def take(self, cells: NDArray[np.int64], restarts: int) -> None:
        """Takes over what is told from elsewhere, but for `stop`; `restarts` came before what it tells of."""
        self._cells[_BEATS:_RESTARTS] = cells[_BEATS:_RESTARTS]
        self._cells[_RESTARTS] = cells[_RESTARTS] + restarts
        self._cells[_MENDING] = cells[_MENDING]

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
