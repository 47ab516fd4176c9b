"""Toys with known optima for the algorithms that replay, each under one of the schedules."""

from __future__ import annotations

import statistics

import pytest

from slipstream.run.config import Config
from slipstream.run.evaluate import evaluate
from slipstream.run.loop import evaluation_envs
from slipstream.run.presets import configure
from slipstream.run.training import Training
from tests.laws.test_learning import final_return, reaches, succeeds, usually_reaches

SMALL = {"net.hidden": (32,), "placement.workers": 1, "placement.loaders": 0}
MEMORY = {
    **SMALL,
    "algo.lr": 2e-3,
    "algo.target_every": 200,
    "algo.replay.ratio": 0.1,
    "algo.burn_in": 0,
    "algo.exploration.steps": 2_000,
    "algo.exploration.final": 0.01,
    "algo.exploration.least": 0.01,
}
CONTROL = {
    **SMALL,
    "algo.batch_size": 64,
    "algo.lr": 3e-3,
    "algo.anneal_lr": True,
    "algo.tau": 0.02,
    "algo.gamma": 0.9,
    "algo.replay.learning_starts": 200,
    "algo.replay.ratio": 0.5,
}


@pytest.mark.parametrize(
    ("algo", "schedule"),
    [
        ("dqn", "async"),
        ("c51", "concurrent"),
        ("qrdqn", "sync"),
        pytest.param("rainbow", "concurrent", marks=pytest.mark.slow),
    ],
)
def test_catch_is_solved(algo: str, schedule: str) -> None:
    assert reaches(0.85, algo, "toy:catch", 6_000, {**SMALL, "schedule": schedule})


def test_memory_is_needed_and_used() -> None:
    assert reaches(0.9, "r2d2", "toy:recall", 8_000, {**MEMORY, "schedule": "concurrent"})
    assert final_return("dqn", "toy:recall", 8_000, SMALL, 1) < 0.4


def regulator(algo: str, schedule: str, seed: int) -> float:
    """Mean return of the greedy policy on `toy:lqr`: the optimum is -0.54, doing nothing gets -3.7."""
    settings = {**CONTROL, "schedule": schedule, "total_steps": 2_000, "seed": seed}
    return evaluated(configure(algo, "toy:lqr", settings), 100)


def evaluated(config: Config, episodes: int) -> float:
    """Mean return of the greedy policy after training."""
    training = Training(config)
    try:
        for _ in training:
            pass
        envs = evaluation_envs(config, episodes)
        try:
            return evaluate(training.policy, envs, episodes, config.seed, greedy=True).reward.mean
        finally:
            envs.close()
    finally:
        training.close()


@pytest.mark.parametrize(("algo", "schedule"), [("sac", "concurrent"), ("td3", "async"), ("ddpg", "sync")])
def test_linear_quadratic_regulator_is_near_its_optimum(algo: str, schedule: str) -> None:
    assert succeeds(lambda seed: regulator(algo, schedule, seed) > -0.95)


@pytest.mark.slow
def test_the_preset_of_cartpole_reaches_its_target() -> None:
    assert usually_reaches(475, "dqn", "CartPole-v1", 100_000, {})


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["sac", "td3"])
def test_presets_of_pendulum_reach_their_target(algo: str) -> None:
    """By evaluation: 20,000 steps are 100 episodes, those of the beginning among them."""
    configs = [configure(algo, "Pendulum-v1", {"placement.workers": 1, "seed": seed}) for seed in (1, 2, 3)]
    assert statistics.median(evaluated(config, 30) for config in configs) >= -180
