"""How schedules end: by an error of the learner, by an error of a collector, by the consumer; and what they report."""

from __future__ import annotations

import collections
import threading

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from numpy.typing import NDArray

from slipstream import crew
from slipstream.collector import Collector
from slipstream.envs import EnvError
from slipstream.run import limit
from slipstream.run.presets import configure
from slipstream.run.training import Training
from slipstream.types import Report


class Gate(gymnasium.Env[NDArray[np.float32], np.int64]):
    """Counts the steps that come after it was closed; fails at step `fails` of slot 0."""

    fails = 10**9
    late = 0

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.action_space = spaces.Discrete(2)
        self._closed, self._steps = False, 0

    def reset(self, *, seed: int | None = None, options: dict[str, object] | None = None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action: np.int64):
        type(self).late += self._closed
        self._steps += 1
        if self._steps == self.fails:
            raise RuntimeError("the gate is shut")
        return np.zeros(2, np.float32), 1.0, self._steps % 3 == 0, False, {}

    def close(self) -> None:
        self._closed = True


class Shut(Gate):
    fails = 20


def training(schedule: str, env: type[Gate] = Gate, **settings: object) -> Training:
    algo = "appo" if schedule == "async" else "ppo"
    size = {"num_envs": 4, "lanes": 2, "unroll": 8, "schedule": schedule, "algo.batch_size": 16, "algo.epochs": 1}
    size |= {"placement.restarts": 0}
    return Training(configure(algo, "callable:gate", {**size, "total_steps": 10_000, **settings}), env)


@pytest.mark.parametrize("schedule", ["sync", "concurrent", "async"])
def test_no_environment_is_stepped_after_it_was_closed(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learner fails in its second update while the collectors may be busy."""
    run = training(schedule)
    calls = 0
    step = run.learner.step

    def failing(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise FloatingPointError("planted")
        return step(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(run.learner, "step", failing)
    Gate.late = 0
    with pytest.raises(FloatingPointError, match="planted"):
        list(run)
    run.close()
    assert Gate.late == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("slipstream-")]


@pytest.mark.parametrize("schedule", ["sync", "concurrent", "async"])
def test_an_error_of_an_environment_comes_after_the_updates_that_were_made(schedule: str) -> None:
    run = training(schedule, Shut)
    reports: list[Report] = []
    with pytest.raises((EnvError, RuntimeError), match="the gate is shut"):
        collections.deque(map(reports.append, run), maxlen=0)
    run.close()
    assert run.learner.version == len(reports)
    if reports:
        assert reports[-1].steps == run.learner.steps


def test_the_limit_of_an_async_run_is_measured_in_turn() -> None:
    config = configure("impala", "toy:catch", {"num_envs": 4, "lanes": 2, "unroll": 4})
    assert limit.measure(config, 0.05).limit > 0


@pytest.mark.parametrize("schedule", ["sync", "concurrent"])
def test_a_slab_of_dead_rows_alone_is_an_update_like_any_other(schedule: str) -> None:
    """One slot and unrolls of one row: whenever an episode has ended, nothing in the slab is valid."""
    sizes = {"num_envs": 1, "lanes": 1, "unroll": 1, "schedule": schedule, "total_steps": 20}
    run = Training(configure("a2c", "toy:catch", sizes))
    reports = [(report.steps, float(report.metrics["lag/mean"]), bool(report.trajectory.valid.any())) for report in run]
    run.close()
    assert not all(valid for _, _, valid in reports)
    assert all(mean >= 0.0 for _, mean, _ in reports)
    assert reports[-1][0] == 20


class Uneven(Gate):
    """The first to come to its third step fails; the other waits there until collectors are being stopped."""

    failed = threading.Lock()
    stopping = threading.Event()

    def step(self, action: np.int64):
        if self._steps == 2:
            if self.failed.acquire(blocking=False):
                raise RuntimeError("the gate is shut")
            assert self.stopping.wait(20)
        type(self).late = max(self.late, self._steps)
        return super().step(action)


@pytest.mark.parametrize("schedule", ["sync", "concurrent", "async"])
def test_an_error_of_one_collector_stops_the_others_at_their_next_row(
    schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(collector: Collector) -> None:
        former(collector)
        Uneven.stopping.set()

    former = Collector.stop
    monkeypatch.setattr(Collector, "stop", stop)
    Uneven.late = 0
    Uneven.failed = threading.Lock()
    Uneven.stopping.clear()
    run = training(schedule, Uneven, num_envs=2, unroll=256, **{"algo.batch_size": 512, "placement.workers": 2})
    with pytest.raises((EnvError, RuntimeError), match="the gate is shut"):
        list(run)
    run.close()
    assert Uneven.late <= 4


class Late(Gate):
    """Fails once the learner computes, after `most` steps."""

    most, learning = 10, threading.Event()

    def step(self, action: np.int64):
        if self._steps >= self.most:
            assert self.learning.wait(20)
            raise RuntimeError("the gate is shut")
        return super().step(action)


@pytest.mark.parametrize(("schedule", "most"), [("concurrent", 10), ("async", 30)])
def test_an_error_stops_the_other_collectors_while_the_learner_computes(
    schedule: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten steps come in the second slab; thirty, under `async`, after any lane has filled its part of the first."""
    run, stopping = training(schedule, Late, max_lag=8, **{"placement.workers": 2}), threading.Event()
    former, step = Collector.stop, run.learner.step

    def stop(collector: Collector) -> None:
        former(collector)
        stopping.set()

    def slow(*arguments: object, **options: object) -> object:
        Late.learning.set()
        assert stopping.wait(20), "nobody was stopped during the update"
        return step(*arguments, **options)  # type: ignore[arg-type]

    Late.learning.clear()
    monkeypatch.setattr(Late, "most", most)
    monkeypatch.setattr(Collector, "stop", stop)
    monkeypatch.setattr(run.learner, "step", slow)
    with pytest.raises(EnvError, match="the gate is shut"):
        list(run)
    run.close()
    assert Late.learning.is_set()


@pytest.mark.parametrize("schedule", ["sync", "concurrent", "async"])
def test_closing_ends_an_iteration_that_is_under_way(schedule: str) -> None:
    run = training(schedule, total_steps=10**9)
    reports = iter(run)
    next(reports)
    Gate.late = 0
    run.close()
    assert Gate.late == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("slipstream-")]
    with pytest.raises(StopIteration):
        next(reports)


class Hanging(Gate):
    """Does not answer at its fourteenth step, which is in the third slab."""

    hangs, release = threading.Event(), threading.Event()

    def step(self, action: np.int64):
        if self._steps == 13:
            self.hangs.set()
            self.release.wait(60)
            self.hangs.clear()
        return super().step(action)


def test_a_finished_run_does_not_wait_for_an_environment_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "_GRACE_SECONDS", 0.1)
    run = training("async", Hanging, num_envs=2, lanes=1, total_steps=16, **{"placement.workers": 1})
    updates: list[int] = []
    for report in run:
        updates.append(report.update)
        assert len(updates) < 2 or Hanging.hangs.wait(20)
    assert updates == [1, 2]
    assert Hanging.hangs.is_set()
    Hanging.release.set()
    run.close()


@pytest.mark.parametrize("schedule", ["sync", "concurrent"])
def test_an_interrupt_stops_the_collectors_before_it_waits_for_them(
    schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(Collector, "stop", lambda _: order.append("stop"))
    monkeypatch.setattr(crew.Pending, "cancel", lambda _: order.append("cancel"))
    run = training(schedule, **{"placement.workers": 2})
    reports = iter(run)
    next(reports)

    wait = crew.wait

    def interrupted(*arguments: object, **options: object) -> object:
        if run.learner.version == 1 + (schedule == "concurrent"):  # collectors are under way
            raise KeyboardInterrupt
        return wait(*arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(crew, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(reports)
    monkeypatch.undo()
    run.close()
    assert order == ["stop", "stop", "cancel"]
