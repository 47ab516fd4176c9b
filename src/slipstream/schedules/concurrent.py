"""Learning and collecting at the same time, with weights exactly one version old (HTS-RL, Liu et al., 2020).

    actors      | slab 0: v0 | slab 1: v0    | slab 2: v1    | ...  | slab n: v(n-1) |
    learner     |            | slab 0 -> v1  | slab 1 -> v2  | ...  |                | slab n -> v(n+1)

While the learner computes version k+1 from slab k, the actors fill slab k+1 with version k, the newest there is when
both begin. Slab 0 has lag 0, every later one lag 1; the last one is learned from as well. Nothing but the barrier at
the end of an interval orders the two sides, so the result depends on neither's speed.

Who waits: at the barrier the learner for all lanes, and all lanes for the learner. Two slabs: the actors own one, the
learner the other, and they swap at the barrier. If a collector fails, all stop at their next row; the update under way
is finished and reported, then the error is raised here.
"""

from __future__ import annotations

import time
from collections.abc import Generator

from slipstream.collector import Collected
from slipstream.crew import Pending
from slipstream.nets.policy import Policy
from slipstream.schedules.parts import (
    Parts,
    abandon,
    behaviour_of,
    behaviour_weights,
    collect,
    collected_by,
    publish,
    report,
    unrolls,
)
from slipstream.types import Report, Weights
from slipstream.weights import copy_into


def concurrent(parts: Parts) -> Generator[Report]:
    """Trains until the rows of all slabs reach the budget and the last slab is learned from; yields once per update."""
    learner, barrier = parts.learner, parts.barrier
    start = time.perf_counter()
    if barrier.ahead is None:
        publish(parts, 0)
        collected, index = collect(parts, 0), 0
        behaviour = behaviour_of(parts, 0)
    else:
        collected, index = barrier.collected, barrier.ahead
        behaviour = _behaviour_before(parts, index, barrier.behaviour)
    waited = time.perf_counter() - start
    while True:
        slab = parts.slabs[index]
        ahead = learner.steps + sum(part.steps for part in collected) < parts.total_steps
        barrier.at_rest, barrier.ahead = False, None
        publish(parts, 1 - index)
        pending = parts.actors.start(unrolls(parts, 1 - index) if ahead else [])
        try:
            start = time.perf_counter()
            metrics = learner.step(slab, behaviour)
            learned = time.perf_counter()
            pending.wait()
        except BaseException:
            abandon(parts, pending)
            raise
        waiting = time.perf_counter() - learned
        _stand(parts, 1 - index if ahead else None, pending)
        yield report(parts, slab, collected, metrics, collect=waited, learn=learned - start)
        following = collected_by(pending)  # raises only here, so that the update that was made is reported
        if not ahead:
            return
        collected, index, waited = following, 1 - index, waiting
        behaviour = behaviour_of(parts, index)


def _stand(parts: Parts, ahead: int | None, pending: Pending[Collected]) -> None:
    """Notes what there is at the barrier: slab `ahead`, if the actors have filled one meanwhile."""
    barrier = parts.barrier
    barrier.at_rest = not pending.errors()
    barrier.ahead = ahead if barrier.at_rest else None
    barrier.collected, barrier.behaviour = (), None
    if barrier.ahead is not None:
        barrier.collected, barrier.behaviour = pending.results(), behaviour_weights(parts, barrier.ahead)


def _behaviour_before(parts: Parts, index: int, weights: Weights | None) -> Policy | None:
    """Who filled slab `index`, that a run goes on with, as `behaviour_of`; graphs of its forwards are made again."""
    if weights is None:
        return None
    policy = parts.tapes[index].policy if parts.tapes else parts.behaviour
    assert policy is not None
    copy_into(policy, weights.tensors)
    return policy
