"""Asynchronous collecting and learning (IMPALA, Espeholt et al., 2018): collectors never wait for each other.

    collector 0 | unroll: v0 | unroll: v0 | unroll: v2 | ...        each takes the newest weights before an unroll
    collector 1 | unroll: v0      | unroll: v1      | ...
    learner     |            | slab 0 -> v1  | slab 1 -> v2  | ...

A slab has one place per lane. Places are handed out in order, slab after slab, to whichever collector asks first; the
learner takes a slab when all its places are filled. A fast lane may so have two columns of one slab, and a slow one
none (`Trajectory.slot` tells).

Both sides are bounded. Unless it is dropped, slab s becomes version s+1, and its places are handed out only once the
learner is at version s - ahead, so collectors run at most that far ahead; the learner uses every row once. With
`stale="wait"` ahead = max_lag: collectors wait instead of collecting what would be too old. With `stale="drop"` they
may run twice as far ahead, and unrolls that are too old when their turn comes are not learned from, and counted since
the start or resume (`lag/dropped_steps`).

Who waits: the learner for the oldest slab that is not full, a collector for a free place. What the learner owns is the
slab that it took; all others belong to the collectors that hold places in them. A collector that is lost with its
node, and for which the cluster has no room, gives its places back for others to fill; when it is there, again or for
the first time, it claims new ones. One that can be told of unrolls ahead claims their places too, as long as that
needs no waiting. If a collector fails, all stop at their next row; the update under way is finished
and reported, then the error is raised here. At the end the collectors have a few seconds for their row; one that needs
more (an environment that hangs, or very slow ones) is left to the closing of the run.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import partial
from threading import Condition

import torch
from torch import Tensor

from slipstream.collector import Away, Collected, Stopped
from slipstream.schedules.parts import Parts, abandon, publish, report, stop
from slipstream.standing import Mark
from slipstream.types import Place, Report

_SLICE_SECONDS = 0.5


def slabs_needed(max_lag: int, drops: bool) -> int:
    """Slabs that `asynchronous` wants, so that memory never bounds what the lag allows.

    Two at least, since `max_lag` is 1 at least: in one, collectors of several lanes could leave a place that none can
    claim.
    """
    return _ahead(max_lag, drops) + 1


def asynchronous(parts: Parts) -> Generator[Report]:
    """Trains until the rows that were learned from or dropped reach the budget; yields once per update."""
    learner, drops = parts.learner, parts.stale == "drop"
    publish(parts)
    lanes = sum(len(collector.lanes) for collector in parts.collectors)
    places = _Places(len(parts.slabs), lanes, parts.lane_size)
    collectors = range(len(parts.collectors))
    lives = [] if parts.actors.inline else [partial(_keep_collecting, parts, number, places) for number in collectors]
    pending = parts.actors.start(lives)
    dropped, waited = 0, 0.0
    collected: list[Collected] = []
    try:
        while learner.steps < parts.total_steps or collected:  # what a dropped slab brought is reported with the next
            start = time.perf_counter()
            if parts.actors.inline:  # whoever comes first: one after the other, for a debugger
                for number in collectors:
                    mine = places.claim(len(parts.collectors[number].lanes))
                    assert mine is not None, "the run is over"
                    _fill(parts, number, places, [mine])
            index, brought, marks = places.take()
            slab = parts.slabs[index]
            waited += time.perf_counter() - start
            collected += brought
            lag = learner.version - slab.version
            fresh = lag.max(dim=0).values <= parts.max_lag if drops else None
            valid = slab.valid if fresh is None else slab.valid & fresh
            dropped += int(slab.valid.sum() - valid.sum())
            if parts.wake is not None:
                parts.wake.follow(index, marks)
            if valid.any():
                start = time.perf_counter()
                metrics = learner.step(slab, fresh=fresh)
                publish(parts)
                learned = time.perf_counter() - start
                more = {"lag/dropped_steps": float(dropped), **_shares(lag[valid], parts.max_lag), **places.metrics()}
                parts.barrier.at_rest = parts.wake is not None and parts.wake.whole
                yield report(parts, slab, collected, {**metrics, **more}, lag=lag[valid], collect=waited, learn=learned)
                collected, waited = [], 0.0
            else:
                learner.skip(slab)
            places.give_back()
    finally:  # the collectors stop at their next row, or where they wait
        places.close()
        abandon(parts, pending)


class _Places:
    """Hands out the places of a ring of slabs, and the slabs whose places are all filled; both in order.

    Args:
        slabs: Slabs in the ring.
        lanes: Places per slab.
        lane_size: Columns per place.
    """

    def __init__(self, slabs: int, lanes: int, lane_size: int) -> None:
        self._slabs, self._lanes, self._lane_size = slabs, lanes, lane_size
        self._changed = Condition()
        self._claimed = 0  # places handed out since the start
        self._released: list[list[Place]] = []  # by collectors that were lost
        self._filled = [0] * slabs
        self._collected: list[list[Collected]] = [[] for _ in range(slabs)]
        self._marks: list[dict[int, Mark]] = [{} for _ in range(slabs)]  # by first column
        self._oldest = 0  # number of the slab that the learner takes next, or has taken
        self._open = True
        self._error: BaseException | None = None
        self._waiting = 0.0  # seconds that collectors have waited since `metrics` was last asked for

    def claim(self, count: int, *, wait: bool = True) -> list[Place] | None:
        """The next `count` places once their slabs are free, or None: the run is over, or it was not to `wait`."""
        start = time.perf_counter()
        with self._changed:
            while self._open and not self._released and not self._room(count):
                if not wait:
                    return None
                self._changed.wait(_SLICE_SECONDS)
            if not self._open:
                return None
            self._waiting += time.perf_counter() - start
            if self._released:
                return self._released.pop(0)
            numbers = range(self._claimed, self._claimed + count)
            self._claimed += count
            return [self._place(number) for number in numbers]

    def release(self, places: list[Place]) -> None:
        """Gives places back, for the next to claim; all collectors are to have as many lanes."""
        with self._changed:
            self._released.append(places)
            self._changed.notify_all()

    def fill(self, lanes: Sequence[int], places: list[Place], collected: Collected, marks: Sequence[Mark]) -> None:
        """Says that the unrolls of some lanes are written, and where they ended, if that is asked for.

        Episodes are reported with the slab that has their last rows, so that none is counted again by a run that goes
        on from between two slabs; seconds and the like with the first.
        """
        slabs = dict(zip(lanes, (place.slab for place in places), strict=True))
        with self._changed:
            for slab in set(slabs.values()):
                ended = tuple(e for e in collected.episodes if slabs[e.slot // self._lane_size] == slab)
                first = collected if slab == places[0].slab else Collected(0, (), 0.0, 0.0)
                self._collected[slab].append(replace(first, episodes=ended))
            for place, mark in zip(places, marks, strict=False):  # all or none
                self._marks[place.slab][place.column] = mark
            for place in places:
                self._filled[place.slab] += 1
            self._changed.notify_all()

    def take(self) -> tuple[int, list[Collected], dict[int, Mark]]:
        """The oldest slab, waiting until it is full, and what came with it; where its unrolls ended, by first column.

        Raises:
            BaseException: The error of the first collector that failed.
        """
        index = self._oldest % self._slabs
        with self._changed:
            while self._error is None and self._filled[index] < self._lanes:
                self._changed.wait(_SLICE_SECONDS)
            if self._error is not None:
                raise self._error
            self._filled[index] = 0
            collected, self._collected[index] = self._collected[index], []
            marks, self._marks[index] = self._marks[index], {}
            return index, collected, marks

    def give_back(self) -> None:
        """Says that the slab that was taken may be written to again."""
        with self._changed:
            self._oldest += 1
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Ends the run with an error of a collector."""
        with self._changed:
            self._error = self._error or error
            self._open = False
            self._changed.notify_all()

    def close(self) -> None:
        """Tells the collectors to stop."""
        with self._changed:
            self._open = False
            self._changed.notify_all()

    def metrics(self) -> dict[str, float]:
        """Slabs that are full and wait for the learner, and seconds that collectors waited for places."""
        with self._changed:
            waiting, self._waiting = self._waiting, 0.0
            depth = sum(filled == self._lanes for filled in self._filled)
        return {"queue/depth": float(depth), "wait/collectors_seconds": waiting}

    def _room(self, count: int) -> bool:
        """Whether so many new places are in slabs that are free."""
        return (self._claimed + count - 1) // self._lanes < self._oldest + self._slabs

    def _place(self, number: int) -> Place:
        slab, place = divmod(number, self._lanes)
        return Place(slab % self._slabs, place * self._lane_size)


def _fill(parts: Parts, number: int, places: _Places, mine: Sequence[list[Place]]) -> None:
    """One unroll of a collector, in the first of the places that it holds."""
    collector = parts.collectors[number]
    collected = collector.collect(mine[0], mine[1:])
    places.fill(collector.lanes, mine[0], collected, () if parts.wake is None else parts.wake.marks(number))


def _keep_collecting(parts: Parts, number: int, places: _Places) -> None:
    """The life of a collector."""
    collector = parts.collectors[number]
    mine: deque[list[Place]] = deque()  # of the unroll under way, and of those after it
    try:
        while True:
            if not mine:
                collector.arrive()  # before it holds places
            while len(mine) <= collector.ahead:
                claimed = places.claim(len(collector.lanes), wait=not mine)
                if claimed is None:
                    break
                mine.append(claimed)
            if not mine:
                break
            try:
                _fill(parts, number, places, list(mine))
                mine.popleft()
            except Away:
                while mine:
                    places.release(mine.popleft())
    except Stopped:
        pass
    except BaseException as error:  # noqa: BLE001 - it is raised again in the learner's thread
        places.fail(error)
        stop(parts)


def _shares(lag: Tensor, max_lag: int) -> dict[str, float]:
    """Share of the rows by lag; int, one per row."""
    counts = torch.bincount(lag.long(), minlength=max_lag + 1)
    return {f"lag/share_{number}": float(count) / len(lag) for number, count in enumerate(counts)}


def _ahead(max_lag: int, drops: bool) -> int:
    """Slabs by which collectors may be ahead of the learner."""
    return 2 * max_lag + 1 if drops else max_lag
