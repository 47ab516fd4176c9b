"""Replays under `async`: the ratio of gradient steps to steps holds, since either side waits for the other."""

from __future__ import annotations

from contextlib import closing
from threading import Lock
from typing import Any

import numpy as np
import pytest
import torch

from slipstream.run.presets import configure
from slipstream.run.training import Training
from tests.schedules.test_ends import Gate

STARTS = 300
PACE = 10
"""Steps per gradient step."""
SMALL: dict[str, Any] = {
    "schedule": "async",
    "net.hidden": [8],
    "algo.batch_size": 16,
    "algo.replay.capacity": 2_000,
    "algo.replay.learning_starts": STARTS,
    "algo.replay.ratio": 1 / PACE,
    "placement.workers": 2,
}


class Stepped(Gate):
    """Counts the steps of all its kind. Every third ends an episode."""

    taken = 0
    counting = Lock()

    def step(self, action: np.int64):
        with self.counting:
            type(self).taken += 1
        return super().step(action)


def optimizer_steps(run: Training) -> float:
    """Gradient steps by the optimiser's own count."""
    return float(run.state()[0]["optimizer.policy.0.step"])


def test_the_ratio_holds_within_one_per_cent_on_both_sides() -> None:
    """Of the steps that were learned from, and of those that environments took: one more slab, 12 steps, at most."""
    size = {"num_envs": 8, "lanes": 2, "unroll": 2, "max_lag": 1, "total_steps": 3_000}
    Stepped.taken = taken = 0
    with closing(Training(configure("dqn", "callable:stepped", {**SMALL, **size}), Stepped)) as run:
        for _ in run:
            taken = Stepped.taken
        learned, gradients = run.learner.steps, optimizer_steps(run)
    assert 3_000 <= learned <= taken
    for steps in (learned, taken):
        assert gradients / (steps - STARTS) == pytest.approx(1 / PACE, rel=0.01)


@pytest.mark.parametrize(
    ("algo", "env", "settings"),
    [
        ("rainbow", "toy:catch", {"algo.replay.alpha": 0.5}),
        ("r2d2", "toy:catch", {"algo.burn_in": 2, "algo.length": 6, "net.core_size": 8}),
        ("sac", "toy:lqr", {}),
    ],
)
def test_every_kind_of_replay_runs(algo: str, env: str, settings: dict[str, Any]) -> None:
    """Transitions by priority with noise, sequences with stored state, and actors beside critics."""
    size = {"num_envs": 4, "lanes": 4, "unroll": 4, "max_lag": 2, "total_steps": 500}
    with closing(Training(configure(algo, env, {**SMALL, **size, **settings}))) as run:
        before = [parameter.detach().clone() for parameter in run.policy.parameters()]
        reports = [(report.steps, report.metrics) for report in run]
        gradients = optimizer_steps(run)
        after = list(run.policy.parameters())
    steps, metrics = reports[-1]
    assert steps >= 500
    assert metrics["train/gradient_steps"] == gradients == (steps - STARTS) // PACE
    assert max(float(each["lag/max"]) for _, each in reports) <= 2
    assert all(bool(torch.isfinite(parameter).all()) for parameter in after)
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
