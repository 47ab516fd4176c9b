"""What committed results say of their making, and of runs that learned nothing (`benchmarks/`)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import slipstream
from slipstream.run.machine import surroundings
from tests.run.runs import train


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module


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
def test_commands_are_kept_without_the_places_of_this_machine(
    benchmark_module: Callable[[str], ModuleType], typed: str, kept: str
) -> None:
    assert benchmark_module("record").made(typed.split(), surroundings(), "cpu")["command"] == kept


def test_a_run_that_ended_before_100_episodes_has_an_entry_without_a_curve(
    benchmark_module: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    run = train(tmp_path, total_steps=60).run.path
    entry = benchmark_module("learning").entry(slipstream.load(run), [475.0], 0, "training")
    assert entry["curve"] == []
    assert entry["final"] is entry["best"] is entry["reached"]["475"]["steps"] is None
    assert entry["steps"] >= 60
