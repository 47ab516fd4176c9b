"""A run whose environments fail is the run in which nothing failed, bit for bit."""

from __future__ import annotations

import hashlib
from typing import Any

import gymnasium
import numpy as np
import pytest

from slipstream import dice, patience
from slipstream.envs.toy import Chaos
from slipstream.run.presets import configure
from slipstream.run.training import Training

SETTINGS = {
    "num_envs": 4,
    "lanes": 2,
    "unroll": 8,
    "algo.batch_size": 16,
    "algo.epochs": 1,
    "net.hidden": [8],
    "total_steps": 10_000,
    "placement.restarts": 99,
}
UPDATES = 6


def run(fault: str, schedule: str, placement: dict[str, Any]) -> tuple[list[str], float]:
    """A hash of everything after every update, and how often environments were brought back."""
    where = {f"placement.{key}": value for key, value in placement.items()}
    chaos = {"env_options.kwargs": {"fault": fault, "at": 29, "length": 5}}
    chaos |= {"env_options.timeout_seconds": 3.0 if fault == "hang" else 60.0}
    training = Training(configure("ppo", "toy:chaos", {**SETTINGS, **chaos, **where, "schedule": schedule}))
    found: list[str] = []
    try:
        for report in training:
            digest = hashlib.sha256(repr((report.episodes, report.steps)).encode())
            for name, tensor in sorted(training.state()[0].items()):
                digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
            found.append(digest.hexdigest())
            if report.update == UPDATES:
                return found, float(report.metrics["faults/restarts"])
    finally:
        training.close()
    raise AssertionError("the run ended early")


@pytest.mark.parametrize(
    ("fault", "schedule", "placement"),
    [
        ("raise", "sync", {"workers": 2}),
        ("kill", "concurrent", {"workers": 2, "env_workers": 2}),
        ("hang", "sync", {"workers": 2, "env_workers": 2}),
        ("raise", "concurrent", {"collectors": "process", "workers": 2}),
        ("exit", "concurrent", {"collectors": "process", "workers": 1, "env_workers": 2}),
    ],
)
def test_faults_change_no_bit(
    fault: str, schedule: str, placement: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "_FIRST_PAUSE", 0.0)
    found, restarts = run(fault, schedule, placement)
    assert restarts >= 1
    assert found == run("none", schedule, {"workers": 1})[0]


def length(seed: int) -> int:
    """Steps of the episode that begins with this seed."""
    return 2 + seed % 5


class Numbered(Chaos):
    """Shows the seed of its episode and the steps in it; has a fault in its step `at`, counted over all episodes."""

    def __init__(self, fault: Any, at: int) -> None:
        super().__init__(fault, at, 10**9)
        self.observation_space = gymnasium.spaces.Box(0, 2**31, (2,), np.int64)
        self._seed = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self._seed = seed or 0
        return super().reset(seed=seed)

    def step(self, action: Any) -> Any:
        obs, reward, _, truncated, info = super().step(action)
        return obs, reward, self._t == length(self._seed), truncated, info

    def _obs(self) -> Any:
        return np.array([self._seed, self._t], np.int64)


@pytest.mark.parametrize(("fault", "env_workers"), [("none", 0), ("raise", 0), ("kill", 1)])
def test_async_loses_and_repeats_no_row(fault: str, env_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of every slot, dead ones too, in the order in which the slot showed them, whoever failed meanwhile."""
    monkeypatch.setattr(patience, "_FIRST_PAUSE", 0.0)
    settings = {"num_envs": 4, "lanes": 2, "unroll": 7, "net.hidden": [8], "total_steps": 400, "schedule": "async"}
    place = {"placement.workers": 2, "placement.env_workers": env_workers, "placement.restarts": 99}
    config = configure("impala", "callable:numbered", {**settings, **place, "max_lag": 2})
    training = Training(config, lambda: Numbered(fault, 71))
    unrolls: dict[int, list[list[tuple[int, int]]]] = {slot: [] for slot in range(4)}
    restarts = 0.0
    for report in training:
        restarts = float(report.metrics["faults/restarts"])
        assert float(report.metrics["lag/max"]) <= 2
        for column, slot in enumerate(report.trajectory.slot.tolist()):
            rows = report.trajectory.obs[:-1, column].tolist()
            unrolls[slot].append([(int(seed), int(t)) for seed, t in rows])
    training.close()
    assert (restarts > 0) == (fault != "none")
    assert sum(len(shown) for shown in unrolls.values()) >= 400 // 7
    for slot, shown in unrolls.items():
        seeds = [dice.env_seed(config.seed, "env", slot, episode) for episode in range(200)]
        played = [(seed, t) for seed in seeds for t in range(length(seed) + 1)]
        place_of = {row: number for number, row in enumerate(played)}
        assert sorted(place_of[row] for unroll in shown for row in unroll) == list(range(7 * len(shown)))
