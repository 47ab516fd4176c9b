"""The same seed gives the same run for V-trace as well, a target policy included."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.laws.test_determinism import PLACEMENTS, hashes

APPO = {"lanes": 4, "algo.batch_size": 64, "algo.target_period": 3, "net.normalize_obs": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "impala, sync": ("impala", {"lanes": 4, "schedule": "sync"}),
    "impala, concurrent and recurrent": ("impala", {"lanes": 2, "schedule": "concurrent", "net.core": "gru"}),
    "appo, sync": ("appo", {**APPO, "schedule": "sync"}),
    "appo, concurrent": ("appo", {**APPO, "schedule": "concurrent"}),
    "appo, concurrent and replayed": (
        "appo",
        {
            **APPO,
            "schedule": "concurrent",
            "algo.replay.proportion": 1.0,
            "algo.replay.capacity": 1_000,
            "algo.replay.clone_policy": 0.01,
            "algo.replay.trust_region": 0.5,
        },
    ),
}


@cache
def reference(case: str) -> tuple[str, ...]:
    algo, settings = CASES[case]
    return tuple(hashes(algo, "CartPole-v1", settings, {"workers": 1}))


@pytest.mark.parametrize("placement", ["inline", "2 workers", "2 env workers"])
@pytest.mark.parametrize("case", CASES)
def test_placement_changes_no_bit(case: str, placement: str) -> None:
    algo, settings = CASES[case]
    assert tuple(hashes(algo, "CartPole-v1", settings, PLACEMENTS[placement])) == reference(case)


def test_collector_processes_change_no_bit_of_replayed_unrolls() -> None:
    case = "appo, concurrent and replayed"
    algo, settings = CASES[case]
    assert tuple(hashes(algo, "CartPole-v1", settings, {"collectors": "process", "workers": 1})) == reference(case)


@pytest.mark.parametrize("loaders", [0, 3])
def test_loaders_change_no_bit_of_replayed_unrolls(loaders: int) -> None:
    """The reference has one, as the other placements."""
    case = "appo, concurrent and replayed"
    algo, settings = CASES[case]
    assert tuple(hashes(algo, "CartPole-v1", settings, {"workers": 2, "loaders": loaders})) == reference(case)


def test_schedule_is_part_of_the_result() -> None:
    """The first slab has lag 0 in both schedules; from the second on, concurrent learns from older rows."""
    chosen = [CASES[case] for case in ("appo, sync", "appo, concurrent")]
    together, apart = (hashes(algo, "CartPole-v1", settings, {}, learner=True) for algo, settings in chosen)
    assert together[0] == apart[0]
    assert not set(together[1:]) & set(apart[1:])
