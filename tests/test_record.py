"""What committed results say of their making (`benchmarks/record.py`)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from slipstream.run.machine import surroundings


@pytest.fixture(scope="module")
def record() -> ModuleType:
    spec = importlib.util.spec_from_file_location("record", Path(__file__).parents[1] / "benchmarks/record.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        (
            "/home/me/.venv/bin/slipstream train ppo --env ALE/Pong-v5",
            "slipstream train ppo --env ALE/Pong-v5",
        ),
        ("slipstream train ppo --log.dir /home/me/runs --seed 2", "slipstream train ppo --seed 2"),
        ("slipstream train ppo --log.dir=runs", "slipstream train ppo"),
        (
            "python benchmarks/schedules.py --output benchmarks/results/a.json",
            "python benchmarks/schedules.py --output benchmarks/results/a.json",
        ),
        ("benchmarks/learning.py ppo CartPole-v1", "python benchmarks/learning.py ppo CartPole-v1"),
        (
            "slipstream train --config /home/me/x.yaml --env=envpool:gfootball/corner",
            "slipstream train --config x.yaml --env=envpool:gfootball/corner",
        ),
    ],
)
def test_commands_are_kept_without_the_places_of_this_machine(record: ModuleType, typed: str, kept: str) -> None:
    assert record.made(typed.split(), surroundings(), "cpu")["command"] == kept
