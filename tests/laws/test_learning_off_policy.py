"""Toys with known optima, learned from rows of older policies: each correction under the schedules that it allows.

Under `sync` and `concurrent` a seed gives one result. Under `async` it does not (that is what the schedule gives up);
the thresholds leave room for chance.
"""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from slipstream.run.presets import configure
from slipstream.run.training import Training

SMALL = {"num_envs": 16, "unroll": 16, "lanes": 4, "net.hidden": (32,), "placement.workers": 1, "seed": 1}
APPO = {**SMALL, "algo.lr": 3e-3, "algo.batch_size": 64, "algo.ent_coef": 0.01, "max_lag": 2}
IMPALA = {
    **SMALL,
    "num_envs": 4,
    "unroll": 18,
    "net.activation": "relu",
    "algo.lr": 1e-2,
    "algo.gae_lambda": 0.95,
    "max_lag": 2,
}
PPO = {**SMALL, "algo.lr": 3e-3, "algo.batch_size": 64, "algo.ent_coef": 0.01}
A2C = {**IMPALA, "algo.optimizer": "adam", "algo.normalize_advantage": True, "algo.max_grad_norm": 10.0}
ALGORITHMS = {"appo": APPO, "impala": IMPALA, "ppo": PPO, "a2c": A2C}
TASKS = {"toy:bandit": (4_000, 0.9), "toy:catch": (30_000, 0.8), "toy:chain": (6_000, 0.9)}


def learned(algo: str, env: str, steps: int, settings: dict[str, Any]) -> tuple[float, float]:
    """Mean return of the last 100 training episodes, and mean lag of all updates."""
    training = Training(configure(algo, env, {**settings, "total_steps": steps}))
    returns: list[float] = []
    lags: list[float] = []
    try:
        for report in training:
            returns += [episode.reward for episode in report.episodes]
            lags.append(float(report.metrics["lag/mean"]))
    finally:
        training.close()
    assert len(returns) >= 100
    return statistics.fmean(returns[-100:]), statistics.fmean(lags)


@pytest.mark.parametrize(
    ("algo", "env", "schedule"),
    [
        ("impala", "toy:catch", "async"),
        ("a2c", "toy:chain", "concurrent"),
        pytest.param("a2c", "toy:catch", "concurrent", marks=pytest.mark.slow),
        pytest.param("ppo", "toy:catch", "concurrent", marks=pytest.mark.slow),
        pytest.param("impala", "toy:catch", "concurrent", marks=pytest.mark.slow),
        pytest.param("appo", "toy:catch", "concurrent", marks=pytest.mark.slow),
        pytest.param("appo", "toy:catch", "async", marks=pytest.mark.slow),
        *((algo, "toy:chain", "concurrent") for algo in ("appo", "impala")),
        *((algo, "toy:bandit", "sync") for algo in ("appo", "impala")),
    ],
)
def test_toys_are_solved_under_every_schedule(algo: str, env: str, schedule: str) -> None:
    steps, enough = TASKS[env]
    reached, lag = learned(algo, env, steps, {**ALGORITHMS[algo], "schedule": schedule})
    assert reached >= enough
    assert lag == 0.0 if schedule == "sync" else lag > 0.0
