"""The synchronous schedule: collect a slab, learn from it, repeat. Lag 0.

    crew        | collect slab with version k | shards of update k+1 | collect slab with version k+1 | ...
    environments| steps of the lanes          | idle                 | steps of the lanes            | ...

One lane is PAAC, two are alternating sampling, more keep more environments busy while one lane is inferred.

Who waits: a lane for its own environments, the learner for all lanes, all lanes for the learner. One slab, owned by the
collectors while they collect and by the learner while it learns. If a lane fails, the others finish their unroll, then
the error of the first lane in order is raised here, and nothing is learned from the slab.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial

from slipstream.collector import Collector
from slipstream.crew import Crew
from slipstream.learner import Learner
from slipstream.types import Report, Trajectory


def sync(
    crew: Crew, collectors: Sequence[Collector], learner: Learner, slab: Trajectory, total_steps: int
) -> Iterator[Report]:
    """Trains until `learner.steps` reaches `total_steps`; yields once per update.

    Args:
        crew: Threads that run the collectors and then the shards.
        collectors: Between them they own every lane once; they fill slab 0.
        learner: Learns from `slab`.
        slab: The slab that the collectors know as number 0.
        total_steps: Agent decisions, counted over the whole run (a resumed run starts with what it had).
    """
    while learner.steps < total_steps:
        start = time.perf_counter()
        collected = crew.run([partial(collector.collect, 0, learner.version) for collector in collectors])
        middle = time.perf_counter()
        metrics = learner.step(slab)
        end = time.perf_counter()
        env, infer = sum(part.env_seconds for part in collected), sum(part.infer_seconds for part in collected)
        episodes = [episode for part in collected for episode in part.episodes]
        yield Report(
            update=learner.version,
            steps=learner.steps,
            metrics={**metrics, "lag/mean": 0.0, "lag/max": 0.0, "wait/env": env / (env + infer)},
            episodes=tuple(sorted(episodes, key=lambda episode: (episode.row, episode.slot))),
            seconds={
                "collect": middle - start,
                "learn": end - middle,
                "env": env,
                "infer": infer,
            },
        )
