"""What every schedule is given, and what it yields."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from torch import Tensor

from slipstream.collector import Collected, Collects, Stopped, home
from slipstream.crew import Crew, Pending
from slipstream.learner import Learns
from slipstream.nets.policy import Policy
from slipstream.schedules.wake import Wake
from slipstream.tape import Tape
from slipstream.types import Report, Trajectory, Weights
from slipstream.weights import Bulletin, copy_into

Stale = Literal["wait", "drop"]


@dataclass
class Barrier:
    """What there is between two updates, when a report is yielded: what a checkpoint is made of, and goes on from.

    Attributes:
        at_rest: Whether all collectors are at the end of an unroll, none of them failed; under `async`, whether
            something of every lane has been learned from.
        ahead: Number of the slab that is filled and will be learned from next; None if there is none.
        collected: What filling it brought, by collector.
        behaviour: The weights that filled it, if the gradient will be evaluated there.
    """

    at_rest: bool = False
    ahead: int | None = None
    collected: Sequence[Collected] = ()
    behaviour: Weights | None = None


@dataclass(frozen=True)
class Parts:
    """The pieces of a run that a schedule moves.

    Attributes:
        actors: Threads for the collectors; where collecting and learning overlap, others than the learner's.
        collectors: Between them they own every lane once.
        learner: Learns from the slabs.
        slabs: Those that the collectors know by their place in this sequence.
        bulletin: Where the collectors find new weights; None if they act with the learner's own policy.
        behaviour: Memory for the policy that acted, if the algorithm evaluates its gradient there.
        lane_size: Slots per lane.
        total_steps: Agent decisions, counted over the whole run (a resumed run starts with what it had).
        max_lag: Updates by which rows may be older than the learner (`async`).
        stale: What happens to rows that would be older (`async`).
        tapes: For each slab, who acts there and what is kept of it, if the algorithm reuses the forwards of acting.
        barrier: Set before every report; what a run that goes on begins with.
        wake: Follows what has been learned from, if a run is to go on from there (`async`).
        staff: What those who collect tell of themselves, as metrics.
    """

    actors: Crew
    collectors: Sequence[Collects]
    learner: Learns
    slabs: Sequence[Trajectory]
    bulletin: Bulletin | None
    behaviour: Policy | None
    lane_size: int
    total_steps: int
    max_lag: int = 1
    stale: Stale = "wait"
    tapes: Sequence[Tape] = ()
    barrier: Barrier = field(default_factory=Barrier)
    wake: Wake | None = None
    staff: Callable[[], Mapping[str, float]] = dict


def publish(parts: Parts, index: int = 0) -> None:
    """Makes the learner's weights known to the collectors, which will fill slab `index`, if they need to be told."""
    if parts.tapes:
        tape = parts.tapes[index]
        tape.version = parts.learner.version
        if tape.policy is not parts.learner.policy:
            copy_into(tape.policy, parts.learner.policy.state_dict())
    if parts.bulletin is not None:
        parts.bulletin.publish(parts.learner.weights())


def unrolls(parts: Parts, index: int) -> list[Callable[[], Collected]]:
    """One task per collector that fills its columns of slab `index`, column b being slot b."""
    return [partial(_fill, parts, collector, index) for collector in parts.collectors]


def _fill(parts: Parts, collector: Collects, index: int) -> Collected:
    try:
        return collector.collect(home(collector.lanes, parts.lane_size, index))
    except Stopped:
        raise
    except BaseException:
        stop(parts)
        raise


def collect(parts: Parts, index: int) -> list[Collected]:
    """Fills slab `index` and waits for it; errors as in `collected_by`."""
    pending = parts.actors.start(unrolls(parts, index))
    try:
        return collected_by(pending)
    except BaseException:
        abandon(parts, pending)
        raise


def collected_by(pending: Pending[Collected]) -> list[Collected]:
    """Waits for `unrolls`. The error of the first collector that failed is raised; it has stopped the others."""
    if errors := pending.errors():
        raise next((error for error in errors if not isinstance(error, Stopped)), errors[0])
    return pending.results()


def stop(parts: Parts) -> None:
    """Has all collectors stop at their next row: the run is about to end."""
    for collector in parts.collectors:
        collector.stop()


def abandon(parts: Parts, pending: Pending[Any]) -> None:
    """Stops the collectors and waits for them, a few seconds at most."""
    stop(parts)
    pending.cancel()


def behaviour_of(parts: Parts, index: int) -> Policy | Tape | None:
    """Who filled slab `index`, if the gradient is to be evaluated there and it is not just the learner's own policy."""
    if parts.tapes:
        return parts.tapes[index]
    weights = behaviour_weights(parts, index)
    if parts.behaviour is None or weights is None:
        return None
    copy_into(parts.behaviour, weights.tensors)
    return parts.behaviour


def behaviour_weights(parts: Parts, index: int) -> Weights | None:
    """The weights that filled slab `index`, if the gradient is to be evaluated there and the learner's are others."""
    version = int(parts.slabs[index].version[0, 0])
    if version == parts.learner.version:
        return None
    if parts.tapes:
        return Weights(version, parts.tapes[index].policy.state_dict())
    if parts.behaviour is None or parts.bulletin is None:
        return None
    weights = parts.bulletin.latest()
    assert weights.version == version, "the slab was filled with what was published before the update"
    return weights


def report(
    parts: Parts,
    slab: Trajectory,
    collected: Sequence[Collected],
    metrics: Mapping[str, Tensor | float],
    *,
    lag: Tensor | None = None,
    collect: float,
    learn: float,
) -> Report:
    """The report of the update that has just been made.

    Args:
        parts: The run.
        slab: What was learned from.
        collected: What filling it brought, by collector.
        metrics: Of the update.
        lag: Updates by which the rows that were learned from were old; None if these are all valid ones.
        collect: Seconds that the learner waited for rows.
        learn: Seconds that it learned.
    """
    env, infer = sum(part.env_seconds for part in collected), sum(part.infer_seconds for part in collected)
    episodes = [episode for part in collected for episode in part.episodes]
    if lag is None:
        lag = (parts.learner.version - 1 - slab.version)[slab.valid]
    return Report(
        update=parts.learner.version,
        steps=parts.learner.steps,
        metrics={
            **metrics,
            "lag/mean": float(lag.sum()) / max(len(lag), 1),  # a slab may hold nothing but dead rows
            "lag/max": float(lag.max()) if len(lag) else 0.0,
            "wait/env": env / max(env + infer, 1e-9),
            "wait/learner": collect / max(collect + learn, 1e-9),
            "wait/loader": float(metrics.get("wait/loader_seconds", 0.0)) / max(learn, 1e-9),
            **parts.staff(),
            "faults/mended_rows": float(sum(part.mended for part in collected)),
        },
        episodes=tuple(sorted(episodes, key=lambda episode: (episode.row, episode.slot))),
        seconds={"collect": collect, "learn": learn, "env": env, "infer": infer},
        trajectory=slab,
    )
