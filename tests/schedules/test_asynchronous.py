"""`async`: which columns are learned from, and what is told of lag and waiting."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from threading import Condition, Event, get_ident
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from slipstream import slab, tree
from slipstream.algos import IMPALA
from slipstream.collector import Away, Collected, Collector, Collects, Stopped
from slipstream.crew import Crew
from slipstream.run.presets import configure
from slipstream.run.training import Training
from slipstream.schedules import Parts, asynchronous
from slipstream.schedules.asynchronous import slabs_needed
from slipstream.schedules.parts import Stale
from slipstream.types import Place, Trajectory
from tests.algos import rows

SECONDS = 20.0  # a limit for what nothing delays
LANES, SIZE = 2, rows.COLUMNS // 2

Made = Callable[..., Parts]


class Script:
    """What is collected, whoever fills which of its places.

    Args:
        ring: The slabs of a run.
        told: What they are to hold, one after the other.
    """

    def __init__(self, ring: Sequence[Trajectory], told: Sequence[Trajectory]) -> None:
        self._ring, self._told = ring, told
        self._rounds: Counter[Place] = Counter()

    def number(self, place: Place) -> int:
        """Of the slab that the place is in, counted on round after round.

        Raises:
            Stopped: The script has ended.
        """
        number = place.slab + len(self._ring) * self._rounds[place]
        if number >= len(self._told):
            raise Stopped
        return number

    def fill(self, place: Place) -> int:
        """Writes the columns of a lane; returns their valid rows."""
        columns = slice(place.column, place.column + SIZE)
        told, to = (slab.columns(each, columns) for each in (self._told[self.number(place)], self._ring[place.slab]))
        self._rounds[place] += 1
        for here, leaf in zip(tree.leaves(vars(to)), tree.leaves(vars(told)), strict=True):
            here.copy_(leaf)
        return int(told.valid.sum())


class Scripted:
    """A collector that brings what the script says; satisfies `Collects`.

    Args:
        lanes: Its lanes.
        script: What it brings.
        before: Called before every unroll with the number of its first slab.
        after: Called after every unroll.
    """

    def __init__(
        self, lanes: Sequence[int], script: Script, before: Callable[[int], None], after: Callable[[], None]
    ) -> None:
        self.lanes, self.ahead = tuple(lanes), 0
        self._script, self._before, self._after, self._stopped = script, before, after, False

    def arrive(self) -> None:
        pass

    def collect(self, places: Sequence[Place], after: Sequence[Sequence[Place]] = ()) -> Collected:
        self._before(self._script.number(places[0]))
        if self._stopped:
            raise Stopped
        steps = sum(self._script.fill(place) for place in places)
        self._after()
        return Collected(steps, (), 0.0, 0.0)

    def stop(self) -> None:
        self._stopped = True


@pytest.fixture
def parts() -> Iterator[Made]:
    """Makes the parts of a run whose collectors bring what a script says to a learner of its own."""
    crews: list[Crew] = []

    def make(
        told: Sequence[Trajectory],
        shares: Sequence[Sequence[int]],
        total_steps: int,
        max_lag: int,
        stale: Stale,
        before: Callable[[int], None] = lambda number: None,
        after: Callable[[], None] = lambda: None,
    ) -> Parts:
        policy = rows.policy()
        count = slabs_needed(max_lag, stale == "drop")
        slabs = [slab.allocate(rows.spec(), policy, rows.ROWS) for _ in range(count)]
        script = Script(slabs, told)
        crews.extend([Crew(1), Crew(len(shares), inline=False)])
        return Parts(
            actors=crews[-1],
            collectors=[Scripted(lanes, script, before, after) for lanes in shares],
            learner=rows.learner(IMPALA(), policy, crews[-2]),
            slabs=slabs,
            bulletin=None,
            behaviour=None,
            lane_size=SIZE,
            total_steps=total_steps,
            max_lag=max_lag,
            stale=stale,
        )

    yield make
    for crew in crews:
        crew.close()


def written(seed: int, versions: Sequence[int | list[int]]) -> Trajectory:
    """A slab with rows of all kinds, each lane's of the version given, or of one for each row."""
    told = rows.trajectory(rows.policy(), seed=seed)
    for lane, version in enumerate(versions):
        told.version[:, lane * SIZE : (lane + 1) * SIZE] = torch.tensor(version).reshape(-1, 1)
    return told


def steps_of(told: Sequence[Trajectory]) -> int:
    return sum(int(trajectory.valid.sum()) for trajectory in told)


# Version of either lane's rows, slab by slab; version of the learner when its turn comes; which lanes it learns from.
STALE: list[tuple[Sequence[int | list[int]], int, tuple[bool, bool]]] = [
    ((0, 0), 0, (True, True)),
    ((1, 0), 1, (True, True)),
    ((1, 0), 2, (True, False)),
    ((1, 1), 3, (False, False)),
    ((3, 2), 3, (True, True)),
    (([2, 2, 3, 3, 4, 4, 4], 4), 4, (False, True)),
]


def columns_of(lanes: Sequence[bool]) -> Tensor:
    """bool `[B]` from one for each lane."""
    return torch.tensor(lanes).repeat_interleave(SIZE)


class Dropped(NamedTuple):
    """What became of a run over `STALE`.

    Attributes:
        learned: Version of the learner and columns it was to learn from, update by update.
        metrics: What was reported.
        parameters: The last ones.
    """

    learned: list[tuple[int, Tensor | None]]
    metrics: list[dict[str, float]]
    parameters: Tensor


def dropping(parts: Made, monkeypatch: pytest.MonkeyPatch, told: Sequence[Trajectory]) -> Dropped:
    """Two collectors of a lane each bring `told`; rows may be one update old."""
    run = parts(told, [[0], [1]], steps_of(told), 1, "drop")
    step, learned = run.learner.step, list[tuple[int, Tensor | None]]()

    def noted(trajectory: Trajectory, behaviour: Any = None, fresh: Tensor | None = None) -> dict[str, Tensor | float]:
        learned.append((run.learner.version, fresh))
        return step(trajectory, behaviour, fresh)

    monkeypatch.setattr(run.learner, "step", noted)
    metrics = [{name: float(value) for name, value in report.metrics.items()} for report in asynchronous(run)]
    assert run.learner.steps == steps_of(told)
    parameters = [parameter.detach().flatten() for parameter in run.learner.policy.parameters()]
    return Dropped(learned, metrics, torch.cat(parameters))


def script(change: Callable[[Tensor], Tensor] | None = None) -> list[Trajectory]:
    """The slabs of `STALE`; the columns that `change` makes of those to learn from were paid more, and are likelier."""
    told = [written(number, versions) for number, (versions, _, _) in enumerate(STALE)]
    for trajectory, (_, _, lanes) in zip(told, STALE, strict=True):
        if change is not None:
            columns = change(columns_of(lanes))
            trajectory.reward[:, columns] += 10.0
            trajectory.log_prob[:, columns] += 0.1
    return told


def test_no_column_is_learned_from_that_has_a_row_older_than_max_lag(
    parts: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One lane of two is too old, then both, then one by the first of its rows."""
    told = script()
    found = dropping(parts, monkeypatch, told)
    updates = zip(found.learned, found.metrics, strict=True)
    dropped = 0.0
    for trajectory, (_, version, lanes) in zip(told, STALE, strict=True):
        fresh = columns_of(lanes)
        dropped += float(trajectory.valid[:, ~fresh].sum())
        if not fresh.any():
            continue
        (at, columns), metrics = next(updates)
        assert at == version
        assert columns is not None
        assert torch.equal(columns, fresh)
        lag = (version - trajectory.version)[trajectory.valid & fresh]
        shares = [float((lag == number).float().mean()) for number in range(2)]
        assert [metrics[f"lag/share_{number}"] for number in range(2)] == pytest.approx(shares)
        assert metrics["lag/max"] == float(lag.max())
        assert metrics["lag/dropped_steps"] == dropped
    assert next(updates, None) is None
    assert torch.equal(dropping(parts, monkeypatch, script(torch.logical_not)).parameters, found.parameters)
    assert not torch.equal(dropping(parts, monkeypatch, script(lambda fresh: fresh)).parameters, found.parameters)


class Leaving:
    """A collector that is lost in its first unroll until `back` is set; satisfies `Collects`."""

    def __init__(self, own: Collects) -> None:
        self.lanes, self.ahead, self.stop = own.lanes, own.ahead, own.stop
        self.back, self._lost, self._own = Event(), False, own

    def arrive(self) -> None:
        assert not self._lost or self.back.wait(SECONDS)

    def collect(self, places: Sequence[Place], after: Sequence[Sequence[Place]] = ()) -> Collected:
        if not self._lost:
            self._lost = True
            raise Away
        return self._own.collect(places)


def test_others_fill_the_places_of_a_collector_that_is_lost_until_it_is_back(parts: Made) -> None:
    told = [written(number, (number, number)) for number in range(9)]

    def parameters(leaves: bool) -> Tensor:
        made = parts(told, [[0], [1]], steps_of(told), 2, "wait")
        first, second = made.collectors
        leaving = Leaving(second)
        run = replace(made, collectors=[first, leaving]) if leaves else made
        for report in asynchronous(run):
            assert report.metrics["lag/max"] == 0
            if report.update == 5:  # five slabs of two places, all by one collector of one lane
                leaving.back.set()
        assert run.learner.version == 9
        return torch.cat([parameter.detach().flatten() for parameter in run.learner.policy.parameters()])

    assert torch.equal(parameters(leaves=True), parameters(leaves=False))


class Told:
    """A collector that must be told of unrolls ahead, and then be asked for them in turn; satisfies `Collects`."""

    def __init__(self, own: Collects, ahead: int) -> None:
        self.lanes, self.ahead, self.stop, self.arrive = own.lanes, ahead, own.stop, own.arrive
        self.most, self._told, self._own = 0, list[Sequence[Place]](), own

    def collect(self, places: Sequence[Place], after: Sequence[Sequence[Place]] = ()) -> Collected:
        told = [places, *after]
        assert told[: len(self._told)] == self._told
        assert len(after) <= self.ahead
        self._told, self.most = told[1:], max(self.most, len(after))
        return self._own.collect(places)


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_a_collector_is_told_of_the_unrolls_for_which_there_are_places(parts: Made, ahead: int) -> None:
    """It has both lanes, and there are three slabs, of which it fills the first."""
    told = [written(number, (number, number)) for number in range(9)]
    run = parts(told, [[0, 1]], steps_of(told), 2, "wait")
    (own,) = run.collectors
    collector = Told(own, ahead)
    assert [report.metrics["lag/max"] for report in asynchronous(replace(run, collectors=[collector]))] == [0.0] * 9
    assert collector.most == min(ahead, 2)
    plain = parts(told, [[0, 1]], steps_of(told), 2, "wait")
    for _ in asynchronous(plain):
        pass
    for one, other in zip(run.learner.policy.parameters(), plain.learner.policy.parameters(), strict=True):
        assert torch.equal(one, other)


class Clock:
    """Time that passes only when it is told to, and knows whether the collector has looked at it since its last unroll.

    It does so before it waits for a place.
    """

    def __init__(self) -> None:
        self.changed = Condition()
        self.now, self.unrolls, self.updates = 0.0, 0, 0
        self._collector, self._asked = 0, False

    def __call__(self) -> float:
        with self.changed:
            self._asked = self._asked or get_ident() == self._collector
            self.changed.notify_all()
            return self.now

    def collected(self) -> None:
        """The end of an unroll."""
        with self.changed:
            self._collector, self._asked = get_ident(), False
            self.unrolls += 1
            self.changed.notify_all()

    def updated(self) -> None:
        """The end of an update."""
        with self.changed:
            self.updates += 1
            self.changed.notify_all()

    def wait_for_unrolls(self, number: int) -> None:
        """Waits until the collector has made so many, and asks for a place for the next."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.unrolls == number and self._asked, SECONDS)

    def wait_for_updates(self, number: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.updates >= number, SECONDS)


UPDATES, MAX_LAG = 5, 2


def told_of(metrics: Any) -> tuple[list[float], float, float]:
    shares = [float(metrics[f"lag/share_{lag}"]) for lag in range(MAX_LAG + 1)]
    return shares, float(metrics["queue/depth"]), float(metrics["wait/collectors_seconds"])


def test_of_a_slow_learner_the_full_slabs_and_the_seconds_that_collectors_waited_are_told(
    parts: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every update takes ten seconds, which begin when all slabs are full and the collector waits for a place."""
    clock = Clock()
    told = [written(number, [max(number - MAX_LAG, 0)] * LANES) for number in range(UPDATES + MAX_LAG)]
    run = parts(told, [[0, 1]], steps_of(told[:UPDATES]), MAX_LAG, "wait", after=clock.collected)
    step = run.learner.step

    def slow(*arguments: Any, **options: Any) -> Any:
        clock.wait_for_unrolls(run.learner.version + len(run.slabs))
        clock.now += 10.0
        return step(*arguments, **options)

    monkeypatch.setattr(run.learner, "step", slow)
    monkeypatch.setattr(time, "perf_counter", clock)
    found = [told_of(report.metrics) for report in asynchronous(run)]
    waited = [0.0, 10.0, 10.0, 10.0, 10.0]  # the first update is still under way when it is told of
    lags = [0, 1, 2, 2, 2]
    assert found == [([float(lag == n) for n in range(3)], 2.0, w) for lag, w in zip(lags, waited, strict=True)]


def test_of_a_slow_collector_nothing_waits(parts: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every unroll begins after the update from the one before, and time stands still."""
    clock = Clock()
    told = [written(number, [number] * LANES) for number in range(UPDATES)]
    run = parts(told, [[0, 1]], steps_of(told), MAX_LAG, "wait", before=clock.wait_for_updates)
    monkeypatch.setattr(time, "perf_counter", clock)
    found: list[Any] = []
    for report in asynchronous(run):
        found.append(told_of(report.metrics))
        clock.updated()
    assert found == [([1.0, 0.0, 0.0], 0.0, 0.0)] * UPDATES


@pytest.mark.parametrize(("stale", "refresh"), [("wait", "unroll"), ("drop", "unroll"), ("wait", "row")])
def test_what_is_told_of_lag_adds_up(stale: str, refresh: str) -> None:
    settings = {"num_envs": 4, "lanes": 2, "unroll": 5, "schedule": "async", "max_lag": MAX_LAG, "total_steps": 600}
    more = {"stale": stale, "refresh": refresh, "placement.workers": 2}
    with closing(Training(configure("impala", "toy:catch", {**settings, **more}))) as run:
        for report in run:
            shares, depth, waited = told_of(report.metrics)
            assert f"lag/share_{MAX_LAG + 1}" not in report.metrics
            assert sum(shares) == pytest.approx(1.0)
            assert sum(lag * share for lag, share in enumerate(shares)) == pytest.approx(report.metrics["lag/mean"])
            assert max(lag for lag, share in enumerate(shares) if share) == report.metrics["lag/max"]
            assert depth in range(len(run.slabs))  # the one that was learned from does not wait
            assert waited >= 0.0


def test_episodes_are_reported_with_the_slab_that_has_their_last_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the lanes of a collector lie in two slabs, as when lanes are shared out unevenly."""
    settings = {"num_envs": 6, "lanes": 3, "unroll": 20, "schedule": "async", "max_lag": MAX_LAG, "total_steps": 900}
    second, split, collect = Event(), Event(), Collector.collect

    def arrive(collector: Collector) -> None:
        """That of two lanes claims its first places when the other one has the first two of three."""
        assert len(collector.lanes) == 1 or second.wait(SECONDS)

    def collect_and_tell(collector: Collector, places: Sequence[Place], *more: Any) -> Collected:
        if places[0].slab != places[-1].slab:
            split.set()
        if len(collector.lanes) == 1 and places[0].column > 0:
            second.set()
            assert split.wait(SECONDS)
        return collect(collector, places, *more)

    monkeypatch.setattr(Collector, "arrive", arrive)
    monkeypatch.setattr(Collector, "collect", collect_and_tell)
    with closing(Training(configure("impala", "toy:catch", {**settings, "placement.workers": 2}))) as run:
        for report in run:
            told = report.trajectory
            _, columns = torch.nonzero((told.terminated | told.truncated) & told.valid, as_tuple=True)
            assert Counter(episode.slot for episode in report.episodes) == Counter(told.slot[columns].tolist())
    assert split.is_set()
