"""How much of everything a configuration has: threads, slabs, collectors and their lanes."""

from __future__ import annotations

from collections.abc import Sequence

from slipstream.run.config import Config
from slipstream.run.machine import cores
from slipstream.schedules.asynchronous import slabs_needed


def threads(config: Config) -> tuple[int, int]:
    """Threads of a learner that differentiate, and threads that act or wait for who does; at most so many have work."""
    place = config.placement
    if place.collectors == "inline":
        return 1, 1
    if place.collectors == "ray":
        here = 1 if place.address else place.learners  # learners on this machine
        return max(cores() // here, 1), place.workers or config.lanes // config.group
    workers = place.workers or cores()
    return max(workers // place.learners, 1), workers


def every_row(config: Config) -> bool:
    """Whether collectors take over new weights before every row, rather than before every unroll."""
    return config.schedule == "async" and config.refresh == "row"


def slabs(config: Config) -> int:
    """Slabs in turn: one side's, or one for each side, or as many as the lag allows."""
    if config.schedule == "async":
        return slabs_needed(config.max_lag, config.stale == "drop")
    return 1 if config.schedule == "sync" else 2


def shares(config: Config, collectors: int) -> list[range]:
    """Lanes of each of so many collectors: neighbours in whole groups, shared out as evenly as possible."""
    size = config.group
    groups = config.lanes // size
    count = min(collectors, groups)
    return [range(groups * n // count * size, groups * (n + 1) // count * size) for n in range(count)]


def grows(config: Config, lanes: Sequence[range]) -> bool:
    """Whether collectors may join and leave: of a cluster that nodes may join, where all have as many lanes."""
    may = config.schedule == "async" and config.placement.collectors == "ray" and bool(config.placement.address)
    return may and len({len(each) for each in lanes}) == 1


def ahead(config: Config) -> int:
    """Unrolls that collectors are told of before the one under way is done."""
    return config.placement.ahead if config.schedule == "async" and config.placement.collectors == "ray" else 0
