"""Collectors in other processes, as the driver sees them: the same bits, on cores of their own.

    driver thread of collector p            process p (`remote_process`): its lanes, environments and policy
    begin                                ->  resets its environments
    publish: weights into the ring          takes the newest weights before an unroll (or before every row)
    collect(places)                      ->  fills the places of its lanes in the shared slabs
    waits for the answer or its end      <-  steps, episodes and seconds; or an error

Who waits for whom: `collect` waits for its own process only, and notices at once if that dies; another takes its place
and does the unroll again (`remote_collector`). An error of one process stops the others at their next row and is raised
in all of them. Processes wait for commands. If the driver dies, the kernel ends them (`process`). Slabs, weights and
status share one mapping without a name, which goes with the last of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace

from slipstream import process
from slipstream.remote_collector import Fate, RemoteCollector
from slipstream.remote_process import Setup, Shared, Status, Work
from slipstream.standing import Standing
from slipstream.types import EnvSpec, Trajectory
from slipstream.weights import Ring


class Remotes:
    """Collector processes, started and ended together.

    Args:
        work: What they are to do; its `workers` are shared out among them, one each at least.
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
        memory = process.anonymous_file()
        children = process.Children("slipstream.remote_process", memory)
        self._finalizer = weakref.finalize(self, children.close)
        self.collectors: list[RemoteCollector] = []
        try:
            shared = Shared.over(memory, layout)
            shared.status[:] = Status.EMPTY
            self.slabs: list[Trajectory] = shared.slabs
            self.ring: Ring = shared.ring
            self._fate = Fate([Status(cells) for cells in shared.status])
            for index, lanes in enumerate(shares):
                workers = max(work.workers // len(shares), 1) if work.workers else 0
                setup = Setup(index, replace(work, spec=_share(work.spec, lanes), workers=workers), layout)
                content = process.pickled(
                    setup,
                    f"{work.spec.id}: collector processes need an environment and a policy",
                    "--placement.collectors thread",
                )
                self.collectors.append(RemoteCollector(children, content, setup, lanes, shared, self._fate))
            for collector in self.collectors:
                collector.ready()
        except BaseException:
            self.close()
            raise

    def begin(self, seed: int, row: int) -> None:
        """Has all processes reset their environments and start collecting afresh; returns at once.

        Args:
            seed: For the environments.
            row: Number of the first row.
        """
        self._fate.begin()
        for collector in self.collectors:
            collector.begin(seed, row)

    def restore(self, seed: int, standing: Standing) -> list[int]:
        """Has all processes bring their slots back in place of `begin`; returns those that show something else."""
        self._fate.begin()
        parts = [standing.part(collector.columns) for collector in self.collectors]
        for collector, part in zip(self.collectors, parts, strict=True):
            collector.restore(seed, part)
        return [slot for collector in self.collectors for slot in collector.lost()]

    def state(self) -> Standing:
        """Where all slots stand; to be called between two unrolls, if they can be brought back."""
        return Standing.join([collector.state() for collector in self.collectors])

    @property
    def restarted(self) -> int:
        """How often environments or processes have been brought back after a failure."""
        return sum(collector.restarted for collector in self.collectors)

    def close(self) -> None:
        """Ends the processes within a few seconds; the second call does nothing."""
        for collector in self.collectors:
            collector.stop()
        for collector in self.collectors:
            collector.close()
        self._finalizer()


def _share(spec: EnvSpec, lanes: range) -> EnvSpec:
    """The part of a run's environments that owns some of its lanes."""
    first = spec.first_slot + lanes.start * spec.lane_size
    return replace(spec, num_envs=len(lanes) * spec.lane_size, lanes=len(lanes), first_slot=first)
