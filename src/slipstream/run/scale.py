"""How a configuration would do on other numbers of cores: a model of one machine, from what the stages cost alone.

    collecting  C = (env + infer) ceil(L / c) / L           L groups of lanes on c cores
    learning    G = learn ceil(S / c) / S                   S shards of the gradient
    a step      C + G                                       under `sync`
                max(C, G, (env + infer + learn) / c)        where collecting and learning overlap

What it takes for granted: environments compute and don't wait; cores don't compete for the memory; the optimiser and
the draws of a replay share out as gradients do; nothing else runs. A run that is slower lacks one of these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from slipstream.run.config import Config
from slipstream.run.limit import Stages

CORES = (1, 2, 4, 8, 16, 32)


def predicted(config: Config, stages: Stages, cores: int) -> float:
    """Steps per second.

    Args:
        config: Its lanes, groups, shards and schedule count.
        stages: CPU-seconds of a step, measured on any number of cores.
        cores: c.
    """
    collect = stages.env + stages.infer
    groups = config.lanes // config.group
    collecting = collect * _busiest(groups, cores)
    learning = stages.learn * _busiest(config.shards or groups, cores)
    if config.schedule == "sync":
        return 1.0 / (collecting + learning)
    return 1.0 / max(collecting, learning, (collect + stages.learn) / cores)


def table(config: Config, stages: Stages) -> Iterator[str]:
    """Lines that say how fast `config` would be on more and fewer cores, as it is and with work for all of them."""
    yield "\ncores, predicted   as configured   with a lane and a shard for each (changes the result)"
    for cores in sorted({*CORES, stages.cores}):
        here = "   <- here" if cores == stages.cores else ""
        limit = replace(stages, cores=cores).limit
        yield f"{cores:16}   {predicted(config, stages, cores):13,.0f}   {limit:13,.0f}{here}"


def _busiest(parts: int, cores: int) -> float:
    """Share of the work that the busiest core has, of work in equal parts."""
    return math.ceil(parts / cores) / parts
