"""The same seed gives the same run where algorithms learn from a replay: draws, priorities, noise and targets too."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.laws.test_determinism import PLACEMENTS, hashes

# A gradient step for every four collected steps, from the second update of 128 steps on.
SMALL: dict[str, Any] = {
    "lanes": 4,
    "shards": 2,
    "net.hidden": [16],
    "algo.batch_size": 32,
    "algo.replay.capacity": 2_000,
    "algo.replay.learning_starts": 100,
    "algo.replay.ratio": 0.07,
}
STACKED = {"env_options.frame_stack": 3, "algo.n_step": 3, "algo.replay.alpha": 0.6, "algo.target_every": 128}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dqn, sync": ("dqn", "CartPole-v1", {**SMALL, **STACKED}),
    "dqn, concurrent": ("dqn", "CartPole-v1", {**SMALL, **STACKED, "schedule": "concurrent"}),
    "rainbow, concurrent": ("rainbow", "CartPole-v1", {**SMALL, "schedule": "concurrent"}),
    "r2d2, concurrent": (
        "r2d2",
        "CartPole-v1",
        {**SMALL, "schedule": "concurrent", "algo.burn_in": 3, "algo.length": 16, "net.core_size": 8},
    ),
    "c51, concurrent": ("c51", "CartPole-v1", {**SMALL, "schedule": "concurrent"}),
    "qrdqn, concurrent": ("qrdqn", "CartPole-v1", {**SMALL, "schedule": "concurrent"}),
    "ddpg, concurrent": ("ddpg", "Pendulum-v1", {**SMALL, "schedule": "concurrent"}),
    "sac, concurrent": ("sac", "Pendulum-v1", {**SMALL, "schedule": "concurrent", "reward": "scale"}),
    "td3, concurrent": ("td3", "Pendulum-v1", {**SMALL, "schedule": "concurrent"}),
}

# Every collector process imports torch, so that some wait for the slow tests.
_SLOW = ("c51", "ddpg", "dqn", "qrdqn", "r2d2", "td3")
PROCESSES = [
    ("rainbow, concurrent", 2),
    ("sac, concurrent", 2),
    ("r2d2, concurrent", 1),
    *(pytest.param(f"{algo}, concurrent", 2, marks=pytest.mark.slow) for algo in _SLOW),
]


@cache
def reference(case: str) -> tuple[str, ...]:
    return tuple(hashes(*CASES[case], {"workers": 1, "loaders": 0}))


@pytest.mark.parametrize("placement", ["inline", "2 workers", "2 env workers"])
@pytest.mark.parametrize("case", CASES)
def test_placement_changes_no_bit(case: str, placement: str) -> None:
    assert len(set(reference(case))) == len(reference(case)), "every update is to change something"
    assert tuple(hashes(*CASES[case], PLACEMENTS[placement])) == reference(case)


@pytest.mark.parametrize(("case", "processes"), PROCESSES)
def test_collector_processes_change_no_bit(case: str, processes: int) -> None:
    assert tuple(hashes(*CASES[case], {"collectors": "process", "workers": processes})) == reference(case)


@pytest.mark.parametrize("case", ["dqn, concurrent", "sac, concurrent"])
def test_loaders_change_no_bit(case: str) -> None:
    """Three against the reference's none; the other placements have one."""
    assert tuple(hashes(*CASES[case], {"workers": 2, "loaders": 3})) == reference(case)


def test_schedule_and_seed_are_part_of_the_result() -> None:
    """Both schedules fill the first slab with the first weights, and learn from it alike."""
    together, apart = (hashes(*CASES[case], {}, learner=True) for case in ("dqn, sync", "dqn, concurrent"))
    assert together[0] == apart[0]
    assert together[-1] != apart[-1]
    algo, env, settings = CASES["dqn, sync"]
    assert hashes(algo, env, {**settings, "seed": 4}, {}, learner=True)[-1] != together[-1]
