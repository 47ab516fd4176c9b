"""A run whose environments fail is the run in which nothing failed, bit for bit."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from slipstream import patience
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
