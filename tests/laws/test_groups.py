"""Lanes that share a forward: who is ready when, and where, changes no bit; `group` itself does."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

import pytest

from slipstream.jitter import Jitter
from slipstream.run.presets import configure
from slipstream.run.training import Training

UPDATES = 3
SIZE = {"num_envs": 8, "lanes": 8, "unroll": 7, "total_steps": 10_000, "seed": 3, "algo.batch_size": 56}
CASES: dict[str, dict[str, Any]] = {
    "sync": {},
    "concurrent": {"schedule": "concurrent"},
    "recurrent": {"schedule": "concurrent", "net.core": "lstm"},
}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "inline": {"collectors": "inline"},
    "1 worker": {"workers": 1},
    "2 workers": {"workers": 2},
    "4 workers": {"workers": 4},
    "2 env workers": {"workers": 2, "env_workers": 2},
    "4 env workers": {"workers": 1, "env_workers": 4},
    "2 processes": {"collectors": "process", "workers": 2},
}


def hashes(group: int, settings: dict[str, Any], placement: dict[str, Any], delay: float) -> list[str]:
    """One hash of trajectory, parameters, optimiser state and episodes per update."""
    where = {f"placement.{key}": value for key, value in placement.items()}
    config = configure("ppo", "CartPole-v1", {**SIZE, "shards": 2, **settings, "group": group, **where})
    training = Training(config, jitter=Jitter(delay) if delay else None)
    found: list[str] = []
    try:
        for report in training:
            digest = hashlib.sha256(repr(report.episodes).encode())
            rows = report.trajectory
            for tensor in (rows.obs, rows.action, rows.log_prob, rows.reward, rows.valid, rows.extras["value"]):
                digest.update(tensor.numpy().tobytes())
            for name, tensor in sorted(training.state()[0].items()):
                digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
            found.append(digest.hexdigest())
            if len(found) == UPDATES:
                return found
    finally:
        training.close()
    raise AssertionError("the run ended early")


@cache
def reference(group: int, case: str) -> tuple[str, ...]:
    return tuple(hashes(group, CASES[case], {"workers": 1}, 0.0))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_placement_and_delays_change_no_bit(group: int, placement: str) -> None:
    assert tuple(hashes(group, CASES["concurrent"], PLACEMENTS[placement], 0.002)) == reference(group, "concurrent")


@pytest.mark.parametrize("case", ["sync", "recurrent"])
@pytest.mark.parametrize("group", [2, 8])
def test_schedules_and_memory(case: str, group: int) -> None:
    for placement in ("2 workers", "2 env workers"):
        assert tuple(hashes(group, CASES[case], PLACEMENTS[placement], 0.002)) == reference(group, case)


def test_a_group_of_all_lanes_is_one_lane_of_all_slots() -> None:
    """The shape of the forward is what decides: eight lanes in one group have the bits of one lane."""
    assert reference(8, "sync") == tuple(hashes(1, {"lanes": 1}, {"workers": 1}, 0.0))
