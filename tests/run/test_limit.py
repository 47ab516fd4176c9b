from __future__ import annotations

from collections.abc import Callable

import pytest

from slipstream import learner
from slipstream.algos.algorithm import Evaluation, acted
from slipstream.replay_learner import ReplayLearner
from slipstream.run import limit
from slipstream.run.presets import configure
from slipstream.types import Trajectory

SMALL = {"num_envs": 4, "unroll": 32, "lanes": 2, "algo.batch_size": 32}


@pytest.mark.parametrize(("schedule", "evaluated"), [("sync", 0), ("concurrent", 1)])
def test_learning_costs_what_it_costs_under_the_schedule(
    monkeypatch: pytest.MonkeyPatch, schedule: str, evaluated: int
) -> None:
    """Under `sync` rows are of the newest policy and shown to no other; under `concurrent` they are one version old."""
    stored: list[bool] = []
    steps: list[float] = []

    def count(trajectory: Trajectory) -> Evaluation:
        stored.append(True)
        return acted(trajectory)

    def once(stage: Callable[[], float], seconds: float, gpu: bool) -> float:
        stored.clear()
        steps.append(stage())
        return 1.0

    monkeypatch.setattr(learner, "acted", count)
    monkeypatch.setattr(limit, "_cost", once)
    limit.measure(configure("ppo", "CartPole-v1", {**SMALL, "schedule": schedule}))
    assert len(stored) == 1 - evaluated
    assert len(steps) == 3


@pytest.mark.parametrize("algorithm", ["dqn", "r2d2"])
def test_learning_from_a_replay_is_measured_while_it_learns(monkeypatch: pytest.MonkeyPatch, algorithm: str) -> None:
    """Although learning starts after 500 steps only; gradient steps are as many as the ratio says."""
    taken: list[int] = []

    def once(stage: Callable[[], float], seconds: float, gpu: bool) -> float:
        before = len(taken)
        steps = sum(stage() for _ in range(8))
        shares.append((len(taken) - before) / steps)
        return 1.0

    shares: list[float] = []
    step = ReplayLearner._end_step
    monkeypatch.setattr(ReplayLearner, "_end_step", lambda *args: (taken.append(1), step(*args))[1])
    monkeypatch.setattr(limit, "_cost", once)
    changes = {"num_envs": 4, "unroll": 10, "algo.replay.ratio": 0.1, "algo.batch_size": 8}
    limit.measure(configure(algorithm, "toy:catch", changes))
    assert shares[:2] == [0.0, 0.0]
    assert shares[2] == pytest.approx(0.1, abs=1 / 100)


def test_all_stages_count_the_rows_that_are_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other row of the bandit ends an episode and is no step."""
    steps: list[float] = []

    def once(stage: Callable[[], float], seconds: float, gpu: bool) -> float:
        steps.append(stage())
        return 1.0

    monkeypatch.setattr(limit, "_cost", once)
    limit.measure(configure("ppo", "toy:bandit", SMALL))
    env, infer, learn = steps
    assert (env, infer, learn) == (2.0, 2 * 32 / 2, 4 * 32 / 2)
