"""A run whose collector processes die or hang is the run in which none did, bit for bit; `async` loses no row."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slipstream import patience
from slipstream.envs import EnvError
from slipstream.run.presets import configure
from slipstream.run.training import Training

SETTINGS = {"num_envs": 4, "lanes": 2, "unroll": 8, "net.hidden": [8], "total_steps": 10_000}
PPO = {"algo.batch_size": 16, "algo.epochs": 1}
REPLAY = {"algo.replay.capacity": 64, "algo.replay.learning_starts": 16, "algo.batch_size": 8}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo": ("ppo", {**PPO, "reward": "scale"}),
    "ppo, concurrent": ("ppo", {**PPO, "schedule": "concurrent"}),
    "ppo, ready lanes": ("ppo", {**PPO, "group": 2}),
    "ppo, recurrent": ("ppo", {"net.core": "lstm", "algo.batch_size": 16}),
    "ppo, recurrent and concurrent": ("ppo", {"net.core": "gru", "algo.batch_size": 16, "schedule": "concurrent"}),
    "dqn": ("dqn", REPLAY),
    "dqn, concurrent": ("dqn", {**REPLAY, "schedule": "concurrent"}),
    "impala, async": ("impala", {"schedule": "async", "total_steps": 200}),
}
UPDATES = 5
AT = 23  # with the dead rows between episodes of five steps, row 27: in the middle of the fourth unroll
IN_PROCESSES = {"collectors": "process", "workers": 2}


def training(case: str, placement: dict[str, Any], path: Path | None = None, **fault: Any) -> Training:
    """A run in which nothing fails without a folder `path`."""
    algo, settings = CASES[case]
    where = {f"placement.{key}": value for key, value in placement.items()}
    chaos = {"path": str(path), "spared": os.getpid(), "at": AT, **fault}
    chaos |= {} if path else {"fault": "none"}
    options = {
        "env_options.kwargs": chaos,
        "env_options.timeout_seconds": 1.0 if fault.get("fault") == "hang" else 60.0,
    }
    return Training(configure(algo, "tests.faulty:Once-v0", {**SETTINGS, **settings, **options, **where}))


def hashes(run: Training) -> tuple[list[str], float]:
    """A hash of everything after every update, and how often anything was brought back."""
    found: list[str] = []
    try:
        for report in run:
            digest = hashlib.sha256(repr((report.episodes, report.steps)).encode())
            for name, tensor in sorted(run.state()[0].items()):
                digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
            found.append(digest.hexdigest())
            if report.update == UPDATES:
                return found, float(report.metrics["faults/restarts"])
    finally:
        run.close()
    raise AssertionError("the run ended early")


@cache
def undisturbed(case: str) -> list[str]:
    return hashes(training(case, {"workers": 1}))[0]


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        ("ppo", {"fault": "kill"}),
        ("ppo", {"fault": "kill", "at": 0}),
        ("ppo", {"fault": "hang"}),
        ("ppo, concurrent", {"fault": "segfault"}),
        pytest.param("ppo, concurrent", {"fault": "hang", "at": 0}, marks=pytest.mark.slow),
        pytest.param("ppo, ready lanes", {"fault": "kill"}, marks=pytest.mark.slow),
        ("ppo, recurrent", {"fault": "exit"}),
        ("ppo, recurrent and concurrent", {"fault": "kill"}),
        ("dqn", {"fault": "kill"}),
        pytest.param("dqn, concurrent", {"fault": "exit"}, marks=pytest.mark.slow),
    ],
)
def test_a_lost_process_changes_no_bit(case: str, fault: dict[str, Any], tmp_path: Path) -> None:
    assert hashes(training(case, IN_PROCESSES, tmp_path, **fault)) == (undisturbed(case), 1.0)


def test_two_are_lost_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_FIRST_PAUSE", 0.0)
    run = training("ppo, concurrent", IN_PROCESSES, tmp_path, fault="kill", times=2)
    assert hashes(run) == (undisturbed("ppo, concurrent"), 2.0)


@pytest.mark.parametrize("fault", ["kill", "hang"])
def test_no_row_is_lost_under_async(fault: str, tmp_path: Path) -> None:
    run = training("impala, async", IN_PROCESSES, tmp_path, fault=fault)
    valid: dict[int, list[bool]] = {slot: [] for slot in range(4)}
    seen: dict[int, np.ndarray[Any, Any]] = {}
    restarts = steps = 0.0
    try:
        for report in run:
            slab = report.trajectory
            for column, slot in enumerate(slab.slot.tolist()):
                valid[slot] += slab.valid[:, column].tolist()
                obs = slab.obs[:, column].numpy()
                np.testing.assert_array_equal(obs[0], seen.get(slot, obs[0]))
                seen[slot] = obs[-1].copy()
            restarts, steps = report.metrics["faults/restarts"], report.steps
            assert report.metrics["lag/dropped_steps"] == 0.0
    finally:
        run.close()
    assert restarts == 1.0
    assert steps >= 200
    assert steps == sum(sum(rows) for rows in valid.values())
    for rows in valid.values():  # episodes of five steps, each with the row that resets
        assert rows == [row % 6 != 5 for row in range(len(rows))]


def test_what_is_lost_the_same_way_again_ends_the_run(tmp_path: Path) -> None:
    run = training("ppo", {**IN_PROCESSES, "workers": 1}, tmp_path, fault="exit", at=0, times=2)
    try:
        assert run._remotes is not None
        first = run._remotes.collectors[0].pid
        with pytest.raises(EnvError, match=f"collector process {first} .*ended with exit code 0 while making or reset"):
            next(iter(run))
        assert run._remotes.restarted == 1
        assert run._remotes.collectors[0].pid != first
    finally:
        run.close()
