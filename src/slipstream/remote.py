"""Collectors in other processes, as the driver sees them: the same bits, on cores of their own.

    driver thread of collector p            outpost p: its lanes, environments and policy
    begin                                ->  resets its environments
    publish                                  takes the newest weights before an unroll (or before every row)
    collect(places)                      ->  fills the places of its lanes in the slabs
    waits for the answer or its end      <-  steps, episodes and seconds; or an error

Who waits for whom: `collect` waits for its own outpost only, and notices at once if that dies; another takes its place
and does the unroll again (`remote_collector`). An error of one stops the others at their next row and is raised in all
of them. Outposts wait for commands. What carries all this is a `link.Medium`: processes of this machine
(`process_link`), which the kernel ends if the driver dies, or actors of a Ray cluster (`ray_link`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from slipstream.link import Medium
from slipstream.outpost import Work
from slipstream.process_link import Processes
from slipstream.remote_collector import Fate, RemoteCollector
from slipstream.standing import Mark, Standing
from slipstream.types import EnvSpec, Trajectory, Weights


class Remotes:
    """Collectors in other processes, started and ended together.

    Args:
        work: What they are to do; its `workers` are shared out among them, one each at least.
        shares: The lanes of each, without gaps.
        medium: What carries it.
        elastic: Whether those that are there collect while others are not, under `async` in a cluster that may grow
            and shrink; all have as many lanes.

    Attributes:
        collectors: One per outpost, in the order of `shares`.
        slabs: What they fill.

    Raises:
        EnvError: A process could not make its environments, or died.
        ImportError: A package is missing.
        NotPortable: Environment or policy can't be sent to another process.
        ValueError: As from `make_envs`.
    """

    def __init__(
        self,
        work: Work,
        shares: Sequence[range],
        medium: Callable[[Work, Sequence[Work]], Medium] = Processes,
        elastic: bool = False,
    ) -> None:
        workers = max(work.workers // len(shares), 1) if work.workers else 0
        parts = [replace(work, spec=_share(work.spec, lanes), workers=workers) for lanes in shares]
        self._medium = medium(work, parts)
        self.slabs: Sequence[Trajectory] = self._medium.slabs
        self._fate = Fate(self._medium.links)
        self.collectors: list[RemoteCollector] = []
        try:
            for link, part, lanes in zip(self._medium.links, parts, shares, strict=True):
                self.collectors.append(RemoteCollector(link, part, lanes, self.slabs, self._fate, elastic))
            for collector in () if elastic else self.collectors:
                collector.ready()
        except BaseException:
            self.close()
            raise

    def publish(self, weights: Weights) -> None:
        """Makes `weights` the newest, which collectors take before their next unroll or row."""
        self._medium.publish(weights)

    def begin(self, seed: int, row: int) -> None:
        """Has all outposts reset their environments and start collecting afresh; returns at once.

        Args:
            seed: For the environments.
            row: Number of the first row.
        """
        self._fate.begin()
        for collector in self.collectors:
            collector.begin(seed, row)

    def restore(self, seed: int, standing: Standing) -> list[int]:
        """Has all outposts bring their slots back in place of `begin`; returns those that show something else."""
        self._fate.begin()
        parts = [standing.part(collector.columns) for collector in self.collectors]
        for collector, part in zip(self.collectors, parts, strict=True):
            collector.restore(seed, part)
        return [slot for collector in self.collectors for slot in collector.lost()]

    def state(self) -> Standing:
        """Where all slots stand; to be called between two unrolls, if they can be brought back."""
        return Standing.join([collector.state() for collector in self.collectors])

    def marks(self, number: int) -> list[Mark]:
        """Where the lanes of a collector stand; to be called in its thread, between two unrolls."""
        return self.collectors[number].marks()

    @property
    def restarted(self) -> int:
        """How often environments or outposts have been brought back after a failure."""
        return sum(collector.restarted for collector in self.collectors)

    def metrics(self) -> dict[str, float]:
        """How often environments or outposts have been brought back, and numbers of the medium, by name."""
        return {"faults/restarts": float(self.restarted), **self._medium.metrics()}

    def awaited(self) -> list[str]:
        """Outposts whose answers are due, and what they are doing; called by any thread."""
        return [line for collector in self.collectors for line in collector.awaited()]

    def close(self) -> None:
        """Ends the outposts within a few seconds; the second call does nothing."""
        for collector in self.collectors:
            collector.stop()
        for collector in self.collectors:
            collector.close()
        self._medium.close()


def _share(spec: EnvSpec, lanes: range) -> EnvSpec:
    """The part of a run's environments that owns some of its lanes."""
    first = spec.first_slot + lanes.start * spec.lane_size
    return replace(spec, num_envs=len(lanes) * spec.lane_size, lanes=len(lanes), first_slot=first)
