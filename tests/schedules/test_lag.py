"""How old the rows are that are learned from: exactly one version, or at most so many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from threading import Condition
from typing import Any

import numpy as np
import pytest

from slipstream.run.presets import configure
from slipstream.run.training import Training
from tests.schedules.test_ends import Gate

ROWS = 8
SIZE = {"num_envs": 2, "lanes": 1, "unroll": ROWS, "algo.batch_size": 16, "algo.epochs": 1}


class Counted(Gate):
    """Counts the rows of all its kind: steps, and resets after the first. Every third step ends an episode."""

    rows = 0
    moved = Condition()

    def reset(self, *, seed: int | None = None, options: dict[str, object] | None = None):
        self._count(int(self._steps > 0))
        return super().reset(seed=seed, options=options)

    def step(self, action: np.int64):
        self._count(1)
        return super().step(action)

    def _count(self, rows: int) -> None:
        with self.moved:
            type(self).rows += rows
            self.moved.notify_all()


def slowed(run: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learner waits, before it is done with a slab, until the collectors have run as far ahead as they may."""
    Counted.rows = taken = 0

    def after_the_collectors(do: Callable[..., Any]) -> Callable[..., Any]:
        def wait(*arguments: Any, **options: Any) -> Any:
            nonlocal taken
            taken += 1
            rows = (taken - 1 + len(run.slabs)) * ROWS * 2
            with Counted.moved:
                assert Counted.moved.wait_for(lambda: Counted.rows >= rows, timeout=20)
            return do(*arguments, **options)

        return wait

    for name in ("step", "skip"):
        monkeypatch.setattr(run.learner, name, after_the_collectors(getattr(run.learner, name)))


@pytest.mark.parametrize("collectors", ["inline", "thread", "process"])
def test_concurrent_rows_are_one_version_old_from_the_second_slab_to_the_last(collectors: str) -> None:
    settings = {**SIZE, "num_envs": 4, "lanes": 2, "schedule": "concurrent", "total_steps": 300}
    place = {"placement.collectors": collectors, "placement.workers": 1 if collectors == "inline" else 2}
    run = Training(configure("ppo", "toy:catch", {**settings, **place}))
    found = []
    for report in run:
        assert (report.trajectory.version == max(report.update - 2, 0)).all()
        found.append((report.update, float(report.metrics["lag/mean"]), float(report.metrics["lag/max"])))
    run.close()
    assert found == [(update, float(update > 1), float(update > 1)) for update in range(1, len(found) + 1)]
    assert len(found) > 10


@pytest.mark.parametrize("max_lag", [1, 2, 4])
def test_async_rows_are_at_most_max_lag_old(max_lag: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**SIZE, "schedule": "async", "max_lag": max_lag, "total_steps": 200}
    run = Training(configure("appo", "callable:counted", settings), Counted)
    slowed(run, monkeypatch)
    lags = [(float(report.metrics["lag/max"]), report.update - 1) for report in run]
    run.close()
    assert lags == [(float(min(version, max_lag)), version) for _, version in lags]
    assert len(lags) > max_lag


def test_async_drops_what_is_older_and_loses_no_episode_and_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """One lane, so that slabs are dropped whole: every third step ends an episode of length 3."""
    settings = {**SIZE, "schedule": "async", "stale": "drop", "max_lag": 1, "total_steps": 2_000}
    run = Training(configure("appo", "callable:counted", settings), Counted)
    slowed(run, monkeypatch)
    steps = episodes = 0
    dropped = 0.0
    for report in run:
        steps, episodes = report.steps, episodes + len(report.episodes)
        dropped = float(report.metrics["lag/dropped_steps"])
        assert float(report.metrics["lag/max"]) <= 1
    run.close()
    assert 0.0 < dropped < steps
    assert abs(3 * episodes - steps) <= 2 * 3 + run.slabs[0].reward.numel() * len(run.slabs)


def test_a_resumed_async_run_draws_no_number_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that were dropped are not counted in versions; what they drew is used up nevertheless."""
    settings = {**SIZE, "schedule": "async", "stale": "drop", "max_lag": 1, "total_steps": 400}
    config = configure("appo", "callable:counted", settings)
    run = Training(config, Counted)
    slowed(run, monkeypatch)
    last = max(episode.row for report in run for episode in report.episodes)
    run.close()
    assert last >= run.learner.version * ROWS
    resumed = Training(replace(config, total_steps=800), Counted)
    resumed.load(*run.state())
    first = min(episode.row for report in resumed for episode in report.episodes)
    resumed.close()
    assert first > last
