"""A run that is stopped and goes on is the run that was never stopped, bit for bit (DESIGN section 5)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import gymnasium
import pytest
import safetensors.torch
from gymnasium.vector import SyncVectorEnv

from slipstream.run.config import CALLABLE
from slipstream.run.presets import configure
from slipstream.run.training import Training

SIZE = {"num_envs": 4, "lanes": 2, "unroll": 8, "total_steps": 10_000, "seed": 3, "net.hidden": [8]}
PPO = {"algo.batch_size": 16, "algo.epochs": 2, "net.normalize_obs": True}
REPLAY = {"algo.replay.capacity": 64, "algo.replay.learning_starts": 32, "algo.batch_size": 8}
UPDATES = 6

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ppo": ("ppo", "CartPole-v1", PPO),
    "ppo, scaled rewards": ("ppo", "Pendulum-v1", {**PPO, "reward": "scale"}),
    "ppo, recurrent": ("ppo", "CartPole-v1", {"net.core": "lstm", "algo.batch_size": 16}),
    "ppo, concurrent": ("ppo", "CartPole-v1", {**PPO, "schedule": "concurrent"}),
    "ppo, ready lanes": ("ppo", "CartPole-v1", {**PPO, "schedule": "concurrent", "group": 2}),
    "ppo, recurrent and concurrent": (
        "ppo",
        "CartPole-v1",
        {"net.core": "gru", "algo.batch_size": 16, "schedule": "concurrent"},
    ),
    "ppo, decorrelated": ("ppo", "CartPole-v1", {**PPO, "env_options.decorrelate_steps": 30}),
    "a2c, concurrent": ("a2c", "CartPole-v1", {"schedule": "concurrent"}),
    "a2c, forwards reused": ("a2c", "CartPole-v1", {"schedule": "concurrent", "algo.reuse_forward": True}),
    "impala, concurrent": ("impala", "CartPole-v1", {"schedule": "concurrent"}),
    "appo, concurrent": ("appo", "CartPole-v1", {"schedule": "concurrent", "algo.batch_size": 16}),
    "dqn": ("dqn", "CartPole-v1", REPLAY),
    "rainbow, concurrent": ("rainbow", "CartPole-v1", {**REPLAY, "schedule": "concurrent"}),
    "r2d2": ("r2d2", "CartPole-v1", {**REPLAY, "algo.replay.capacity": 512, "algo.length": 8, "algo.burn_in": 4}),
    "sac, concurrent": ("sac", "Pendulum-v1", {**REPLAY, "schedule": "concurrent"}),
    "td3": ("td3", "Pendulum-v1", REPLAY),
    "appo, with a replay": (
        "appo",
        "CartPole-v1",
        {"schedule": "concurrent", "algo.batch_size": 16, "algo.replay.proportion": 1, "algo.replay.capacity": 128},
    ),
    "step times": ("ppo", "toy:step_time", {**PPO, "env_options.kwargs": {"mean_ms": 0.01, "length": 5}}),
}


def vector() -> SyncVectorEnv:
    return SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 2)  # resets its environments itself


EXACT: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "EnvPool": ("ppo", "envpool:CartPole-v1", PPO),
    "EnvPool, concurrent": ("ppo", "envpool:CartPole-v1", {**PPO, "schedule": "concurrent"}),
    "EnvPool, recurrent and concurrent": (
        "impala",
        "envpool:CartPole-v1",
        {"net.core": "gru", "schedule": "concurrent"},
    ),
    "EnvPool, dqn": ("dqn", "envpool:CartPole-v1", {**REPLAY, "schedule": "concurrent"}),
    "vector": ("a2c", vector, {"reward": "scale", "schedule": "concurrent"}),
    "vector, forwards reused": ("a2c", vector, {"schedule": "concurrent", "algo.reuse_forward": True}),
}

APART = {"collectors": "process", "workers": 2}

Saved = tuple[bytes, str, list[bytes]]


def run(
    case: str, placement: dict[str, Any], updates: int, saved: Saved | None = None, checkpoints: Sequence[int] = ()
) -> tuple[list[str], Saved]:
    """A hash of everything after each update up to number `updates`, from `saved` on, and what to go on from.

    After the updates `checkpoints` the environments start anew.
    """
    algo, env, settings = (CASES | EXACT)[case]
    where = {f"placement.{key}": value for key, value in placement.items()}
    name = env if isinstance(env, str) else f"{CALLABLE}vector"
    training = Training(configure(algo, name, {**SIZE, **settings, **where}), None if env is name else env)
    if saved is not None:
        segments = [safetensors.torch.load(segment) for segment in saved[2]]
        training.load(safetensors.torch.load(saved[0]), json.loads(saved[1]), segments or None)
    found: list[str] = []
    try:
        for report in training:
            tensors, facts = training.state()
            windows = training.learner.windows
            if windows is not None:
                tensors |= {f"replay.{name}": value for name, value in windows.state().items()}
            state = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
            digest = hashlib.sha256(repr((report.episodes, report.steps, sorted(state))).encode())
            for _, tensor in sorted(state.items()):
                digest.update(tensor.numpy().tobytes())
            found.append(digest.hexdigest())
            if report.update in checkpoints:
                training.restart()
            if report.update == updates:
                segments = windows.since() if windows is not None else ()
                kept = [safetensors.torch.save(segment) for segment in segments]
                return found, (safetensors.torch.save(state), json.dumps(facts), kept)
    finally:
        training.close()
    raise AssertionError("the run ended early")


@cache
def uninterrupted(case: str) -> list[str]:
    return run(case, {"workers": 1}, UPDATES)[0]


@pytest.mark.parametrize("stop", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_a_stop_changes_no_bit(case: str, stop: int) -> None:
    first, saved = run(case, {"workers": 2}, stop)
    rest, _ = run(case, {"workers": 1}, UPDATES, saved)
    assert first + rest == uninterrupted(case)


@pytest.mark.parametrize(
    ("case", "before", "after"),
    [
        ("ppo, concurrent", {"env_workers": 2}, {"collectors": "inline"}),
        ("ppo", {"collectors": "inline"}, {"env_workers": 3}),
        ("ppo, recurrent and concurrent", {"collectors": "process", "workers": 2}, {"workers": 1}),
        ("a2c, forwards reused", {"workers": 1}, {"collectors": "process", "workers": 2, "env_workers": 2}),
    ],
)
def test_a_run_may_go_on_in_another_placement(case: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    first, saved = run(case, before, 3)
    rest, _ = run(case, after, UPDATES, saved)
    assert first + rest == uninterrupted(case)


@pytest.mark.parametrize(
    ("case", "placement"),
    [
        *((case, {"workers": 1}) for case in EXACT),
        *((case, APART) for case in ("EnvPool", "vector")),
        *(pytest.param(case, APART, marks=pytest.mark.slow) for case in EXACT if case not in ("EnvPool", "vector")),
    ],
)
def test_environments_that_cannot_be_brought_back_start_anew_at_every_checkpoint(
    case: str, placement: dict[str, Any]
) -> None:
    """With `exact_resume`, in the run that is not stopped too, so that both are the same run."""
    EXACT[case][2]["exact_resume"] = True
    whole, _ = run(case, placement, 7, checkpoints=(2, 5))
    first, saved = run(case, {"workers": 2}, 2)
    second, saved = run(case, placement, 5, saved)
    rest, _ = run(case, placement, 7, saved)
    assert first + second + rest == whole
    assert run(case, {"workers": 2}, 4)[0] != whole[:4], "something else than without a new start"


Rows = dict[int, list[tuple[Any, ...]]]


def asynchronous(placement: dict[str, Any], updates: int, saved: Saved | None = None) -> tuple[Rows, Rows, Saved]:
    """The rows that were learned from and the episodes, by slot, and what to go on from.

    Nothing is learned at a rate of 0, so that rows are the same whoever is faster, and only their order differs.
    """
    settings = {**SIZE, "schedule": "async", "max_lag": 2, "algo.lr": 0.0, "net.core": "gru", "net.core_size": 4}
    where = {f"placement.{key}": value for key, value in placement.items()}
    training = Training(configure("impala", "CartPole-v1", {**settings, **where}))
    if saved is not None:
        training.load(safetensors.torch.load(saved[0]), json.loads(saved[1]))
    rows: Rows = {slot: [] for slot in range(4)}
    episodes: Rows = {slot: [] for slot in range(4)}
    try:
        for report in training:
            slab = report.trajectory
            for column, slot in enumerate(slab.slot.tolist()):
                columns = [slab.obs, slab.action, slab.log_prob, slab.reward, slab.terminated, slab.valid]
                told = [leaf[: slab.rows, column].tolist() for leaf in columns]
                rows[slot] += [(str(obs), *others) for obs, *others in zip(*told, strict=True)]
            for episode in report.episodes:
                episodes[episode.slot].append((episode.length, episode.reward, episode.row))
            if report.update == updates:
                tensors, facts = training.state()
                kept = {name: value.clone().contiguous() for name, value in tensors.items()}
                return rows, episodes, (safetensors.torch.save(kept), json.dumps(facts), [])
    finally:
        training.close()
    raise AssertionError("the run ended early")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"workers": 2}, {"workers": 1}),
        ({"collectors": "inline"}, APART),
        pytest.param(APART, APART, marks=pytest.mark.slow),
    ],
)
def test_under_async_episodes_go_on_after_what_was_learned_from(before: dict[str, Any], after: dict[str, Any]) -> None:
    rows, episodes, saved = asynchronous(before, 7)
    more, ended, _ = asynchronous(after, 40, saved)
    whole, all_ended, _ = asynchronous({"workers": 2}, 60)
    assert json.loads(saved[1])["resumes"] == (
        "environments are played back to where they were; under async no two runs are the same"
    )
    assert sum(map(len, more.values())) == 33 * 2 * 2 * 8, "updates, lanes, their slots, rows"
    for slot in range(4):
        for parts, wanted in (((rows, more), whole), ((episodes, ended), all_ended)):
            found = parts[0][slot] + parts[1][slot]
            common = min(len(found), len(wanted[slot]))
            assert found[:common] == wanted[slot][:common]
    assert any(len(whole[slot]) > len(rows[slot]) + 50 for slot in range(4))
