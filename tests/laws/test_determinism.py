"""The same seed gives the same run, bit for bit, under any placement (DESIGN section 5)."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream.algos import ALGORITHMS
from slipstream.run.presets import configure
from slipstream.run.training import Training

UPDATES = 4
SIZE = {"num_envs": 8, "unroll": 16, "total_steps": 10_000, "seed": 3}

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ppo": ("ppo", "CartPole-v1", {"lanes": 4, "algo.batch_size": 64, "net.normalize_obs": True}),
    "ppo, recurrent": ("ppo", "CartPole-v1", {"lanes": 2, "net.core": "lstm", "algo.batch_size": 64}),
    "ppo, continuous": ("ppo", "Pendulum-v1", {"lanes": 2, "reward": "scale", "algo.batch_size": 64}),
    "a2c": ("a2c", "CartPole-v1", {"lanes": 4}),
    "ppo, concurrent": (
        "ppo",
        "CartPole-v1",
        {"lanes": 4, "schedule": "concurrent", "algo.batch_size": 64, "net.normalize_obs": True},
    ),
    "ppo, concurrent and recurrent": (
        "ppo",
        "CartPole-v1",
        {
            "lanes": 2,
            "schedule": "concurrent",
            "net.core": "lstm",
            "algo.batch_size": 64,
        },
    ),
    "a2c, concurrent": ("a2c", "CartPole-v1", {"lanes": 8, "schedule": "concurrent"}),
}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "inline": {"collectors": "inline"},
    "1 worker": {"workers": 1},
    "2 workers": {"workers": 2},
    "4 workers": {"workers": 4},
    "2 env workers": {"workers": 1, "env_workers": 2},
}

# Every collector process imports torch, so only some cases run in them; `slipstream verify` runs any.
PROCESSES = [
    ("ppo", 1),
    ("ppo", 2),
    pytest.param("ppo", 4, marks=pytest.mark.slow),
    ("ppo, recurrent", 2),
    ("ppo, continuous", 2),
    ("ppo, concurrent and recurrent", 1),
    ("a2c, concurrent", 2),
]


def hashes(
    algo: str,
    env: str,
    settings: dict[str, Any],
    placement: dict[str, Any],
    saved: tuple[Any, Any] | None = None,
    learner: bool = False,
) -> list[str]:
    """One hash per update, from `saved` on, of all that a resume needs, or of what the learner has; and of episodes."""
    where = {f"placement.{key}": value for key, value in placement.items()}
    training = Training(configure(algo, env, {**SIZE, **settings, **where}))
    if saved is not None:
        tensors, facts = saved
        training.load({name: tensor.clone() for name, tensor in tensors.items()}, facts)
    found: list[str] = []
    try:
        for report in training:
            digest = hashlib.sha256(repr(report.episodes).encode())
            state = training.learner.state() if learner else training.state()
            for name, tensor in sorted(state[0].items()):
                digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
            found.append(digest.hexdigest())
            if len(found) == UPDATES:
                return found
    finally:
        training.close()
    raise AssertionError("the run ended early")


@cache
def reference(case: str) -> tuple[str, ...]:
    return tuple(hashes(*CASES[case], {"workers": 1}))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("case", CASES)
def test_placement_changes_no_bit(case: str, placement: str) -> None:
    assert tuple(hashes(*CASES[case], PLACEMENTS[placement])) == reference(case)


@pytest.mark.parametrize(("case", "processes"), PROCESSES)
def test_collector_processes_change_no_bit(case: str, processes: int) -> None:
    where = {"collectors": "process", "workers": processes}
    assert tuple(hashes(*CASES[case], where)) == reference(case)


@pytest.mark.parametrize("schedule", [pytest.param("sync", marks=pytest.mark.slow), "concurrent"])
def test_a_resumed_run_is_the_same_in_processes(schedule: str) -> None:
    algo, env, settings = CASES["ppo"]
    settings = {**settings, "schedule": schedule}
    first = Training(configure(algo, env, {**SIZE, **settings}))
    reports = iter(first)
    next(reports)
    tensors, facts = first.state()
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    reports.close()
    first.close()
    assert facts["version"] == 1
    found = [hashes(algo, env, settings, where, (saved, facts)) for where in ({}, {"collectors": "process"})]
    assert found[0] == found[1]


@pytest.mark.parametrize("case", CASES)
def test_another_seed_is_another_run(case: str) -> None:
    algo, env, settings = CASES[case]
    other = hashes(algo, env, {**settings, "seed": 4}, {"workers": 1})
    assert not set(other) & set(reference(case))


@pytest.mark.filterwarnings("ignore:net.precision=bfloat16 is slower than float32")
@pytest.mark.parametrize(("threads", "precision"), [(1, "float32"), (2, "float32"), (4, "float32"), (2, "bfloat16")])
def test_native_threads_change_no_bit(threads: int, precision: str) -> None:
    settings = {"lanes": 2, "unroll": 8, "num_envs": 4, "algo.batch_size": 16, "algo.epochs": 1}
    settings["net.precision"] = precision
    one = hashes("ppo", "ALE/Pong-v5", settings, {"workers": 2, "env_threads": threads})
    assert one == hashes("ppo", "ALE/Pong-v5", settings, {"workers": 1, "env_threads": 1})


@pytest.mark.filterwarnings("ignore:net.precision=bfloat16 is slower than float32")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_games_in_collector_processes_change_no_bit(precision: str) -> None:
    settings = {"lanes": 2, "unroll": 8, "num_envs": 4, "algo.batch_size": 16, "algo.epochs": 1}
    settings["net.precision"] = precision
    two = hashes("ppo", "ALE/Pong-v5", settings, {"collectors": "process", "workers": 2})
    assert two == hashes("ppo", "ALE/Pong-v5", settings, {"workers": 1, "env_threads": 1})


def test_global_generators_are_neither_read_nor_moved() -> None:
    algo, env, settings = CASES["ppo"]
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = hashes(algo, env, settings, {"workers": 1})
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert hashes(algo, env, settings, {"workers": 1}) == first


@pytest.mark.parametrize("case", ["ppo", pytest.param("ppo, concurrent and recurrent", marks=pytest.mark.slow)])
def test_the_number_of_math_threads_changes_no_bit(case: str) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert tuple(hashes(*CASES[case], {"workers": 1})) == reference(case)
    finally:
        torch.set_num_threads(before)


FRESH = """
import json, sys
from tests.laws.test_determinism import fresh
print(json.dumps(fresh(sys.argv[1:])))
"""
TINY_REPLAY = {"algo.replay.capacity": 128, "algo.replay.learning_starts": 32, "algo.batch_size": 8}


def fresh(algorithms: Sequence[str]) -> dict[str, list[str]]:
    """Hashes of a few updates of each."""
    found: dict[str, list[str]] = {}
    for name in algorithms:
        env = "Pendulum-v1" if name in ("sac", "td3", "ddpg") else "CartPole-v1"
        size = {"lanes": 2, "num_envs": 4, "unroll": 8, "net.hidden": [8]}
        more = {"r2d2": {"algo.replay.capacity": 256, "algo.length": 8, "algo.burn_in": 4}}.get(name, {})
        replayed = TINY_REPLAY if ALGORITHMS[name].replays else {}
        batch = {"algo.batch_size": 16} if name in ("ppo", "appo") else {}
        found[name] = hashes(name, env, {**size, **batch, **replayed, **more}, {"workers": 1})
    return found


@pytest.mark.parametrize(
    "algorithms",
    [
        pytest.param(["ppo", "dqn", "sac"], id="a few"),
        pytest.param(list(ALGORITHMS), id="all", marks=pytest.mark.slow),
    ],
)
def test_a_fresh_process_makes_the_same_run(algorithms: list[str], tmp_path: Path) -> None:
    """In another directory, with other hashes of Python's."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    environment = {**os.environ, "PYTHONHASHSEED": "4242", "PYTHONPATH": path}
    words = [sys.executable, "-c", FRESH, *algorithms]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, timeout=60, check=True)
    assert json.loads(done.stdout) == fresh(algorithms)
