"""The synchronous schedule: collect a slab, learn from it, repeat. Lag 0.

    crew        | collect slab with version k | shards of update k+1 | collect slab with version k+1 | ...
    environments| steps of the lanes          | idle                 | steps of the lanes            | ...

One lane is PAAC, two are alternating sampling, more keep more environments busy while one lane is inferred.

Who waits: a lane for its own environments, the learner for all lanes, all lanes for the learner. One slab, owned by the
collectors while they collect and by the learner while it learns. If a collector fails, all stop at their next row, its
error is raised here, and nothing is learned from the slab.
"""

from __future__ import annotations

import time
from collections.abc import Generator

from slipstream.schedules.parts import Parts, behaviour_of, collect, publish, report
from slipstream.types import Report


def sync(parts: Parts) -> Generator[Report]:
    """Trains until the budget is spent; yields once per update."""
    learner, slab = parts.learner, parts.slabs[0]
    while learner.steps < parts.total_steps:
        start = time.perf_counter()
        parts.barrier.at_rest = False
        publish(parts)
        collected = collect(parts, 0)
        middle = time.perf_counter()
        metrics = learner.step(slab, behaviour_of(parts, 0))
        parts.barrier.at_rest = True
        yield report(parts, slab, collected, metrics, collect=middle - start, learn=time.perf_counter() - middle)
