"""What committed results say of their making, and of runs that learned nothing (`benchmarks/`)."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

import slipstream
from slipstream import patience
from slipstream.run.machine import surroundings
from slipstream.run.presets import configure
from slipstream.run.record import made
from tests.run.runs import train


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    for folder in ("benchmarks/peers", "benchmarks"):  # as for whoever runs a script there
        monkeypatch.syspath_prepend(Path(__file__).parents[1] / folder)
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
            "python benchmarks/replay.py --output benchmarks/results/a.json",
            "python benchmarks/replay.py --output benchmarks/results/a.json",
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
    assert made(typed.split(), surroundings(), "cpu")["command"] == kept


def test_a_run_that_ended_before_100_episodes_has_an_entry_without_a_curve(
    benchmark_module: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    run = train(tmp_path, total_steps=60).run.path
    entry = benchmark_module("learning").entry(slipstream.load(run), [475.0], 0, "training")
    assert entry["curve"] == []
    assert entry["final"] is entry["best"] is entry["reached"]["475"]["steps"] is None
    assert entry["steps"] >= 60


def test_peers_are_compared_round_by_round(benchmark_module: Callable[[str], ModuleType]) -> None:
    """A contestant that failed in a round does not count there, and is said to have failed where it never ran."""
    peers = benchmark_module("compare")

    def row(speed: float) -> dict[str, float]:
        return {"steps_per_s": speed, "startup_s": 2.0, "peak_pss_mb": 100.0}

    rounds = [{"ours": row(300), "sb3": row(100), "rllib": {}}, {"ours": row(50), "sb3": row(10), "rllib": {}}]
    rounds.append({"ours": row(80), "sb3": {}, "rllib": {}})
    summary = peers.compared(rounds, ["ours", "sb3", "rllib"], {"ours": True, "sb3": False, "rllib": False})
    assert summary["times_as_fast"] == {"ours": {"sb3": 4.0}}
    assert summary["medians"]["ours"]["steps_per_s"] == 80
    text = peers.table("one pass", summary)
    assert "| ours | 80.0 | 2.0 | 100.0 |" in text
    assert "| rllib | failed | failed | failed |" in text
    assert "ours is 4.00 times as fast as sb3" in text


def test_every_driver_that_is_compared_exists(benchmark_module: Callable[[str], ModuleType]) -> None:
    peers = benchmark_module("compare")
    for group in peers.GROUPS.values():
        assert sum(contestant.peer == peers.OURS for contestant in group.values()) >= 1
        for contestant in group.values():
            assert (peers.DRIVERS / contestant.driver).is_file()
            assert contestant.peer in peers.PACKAGES
            if contestant.peer == peers.OURS:
                algo, _, env, *rest = contestant.words
                configure(algo, env, dict(word.split("=", 1) for word in rest[1::2]))


def test_a_soak_sees_every_fault_and_leaves_no_thread(
    benchmark_module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first three faults, at most 240 steps apart; `make soak` goes on for minutes."""
    monkeypatch.setattr(patience, "_FIRST_PAUSE", 0.0)
    soak = benchmark_module("soak")
    monkeypatch.setitem(soak.SETTINGS, "env_options.timeout_seconds", 1.0)
    samples = soak.soak(60.0, steps=700, every=0.0, rows=60)
    assert samples[-1].restarts >= 3
    found, _ = soak.judge(samples)
    assert found["descriptors"]["greatest"] <= found["descriptors"]["least"] + 20  # those of the dead go with a lane
    assert found["threads"]["greatest"] == found["threads"]["least"]


def test_growth_is_told(benchmark_module: Callable[[str], ModuleType]) -> None:
    soak = benchmark_module("soak")
    flat = [soak.Sample(float(each), 100 * each, each, 300.0, 20, 4) for each in range(1, 60)]
    assert soak.judge(flat)[1] == []
    worse = [replace(each, megabytes=300.0 + each.seconds / 50.0) for each in flat]
    assert soak.judge(worse)[1] == ["memory grows by 1.20 MB a minute"]
    worse = [replace(each, descriptors=20 + (each.seconds > 40)) for each in flat]
    assert soak.judge(worse)[1] == ["descriptors grew from 20 to 21"]
    slower = [replace(each, steps=int(100 * each.seconds - max(0.0, each.seconds - 30.0) * 10)) for each in flat]
    assert "times as fast as the first" in soak.judge(slower)[1][0]


def test_the_page_says_what_the_committed_results_say(benchmark_module: Callable[[str], ModuleType]) -> None:
    page = benchmark_module("page")
    assert page.PAGE.read_text() == page.page(), "python benchmarks/page.py makes it anew"
    for section, _ in page.sections():
        assert section.file in page.page()
        if section.draw:
            with Image.open((page.PICTURES / section.file).with_suffix(".png")) as picture:
                assert picture.info["Source"] == page.digest(section), section.file


def test_results_that_are_not_there_yet_can_be_drawn(benchmark_module: Callable[[str], ModuleType]) -> None:
    page = benchmark_module("page")
    row = {"schedule": "sync", "num_envs": 8, "lanes": 2, "steps_per_second": {"1": 5.0, "2": 9.0}}
    scale = page.scale({"rows": [{**row, "predicted": {"1": 5.0, "2": 10.0}}]})
    assert [line.get_ydata().tolist() for line in scale.axes[0].lines] == [[5.0, 9.0], [5.0, 10.0]]
    medians = {"ours": {"steps_per_s": 4.0}, "theirs": {"steps_per_s": 2.0}, "failed": {"steps_per_s": None}}
    peers = page.peers({"groups": {"one pass": {"medians": medians}}})
    assert [bar.get_width() for bar in peers.axes[0].patches] == [4.0, 2.0]
    page.plt.close("all")


def test_a_result_that_nobody_draws_is_on_the_page(
    benchmark_module: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = benchmark_module("page")
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    result = {"command": "python benchmarks/new.py", "commit": "0123456789", "machine": {"processor": "P", "cores": 2}}
    (tmp_path / "new_kind.json").write_text(json.dumps({**result, "cost_at_default": 0.0125}))
    text = page.page()
    assert "## new kind" in text
    assert "Cost at default 0.0125." in text
    assert "`python benchmarks/new.py`: P, 2 cores, commit 0123456." in text
    cells = {str(number): {**result, "dirty": True} for number in range(5)}
    (tmp_path / "nested.json").write_text(json.dumps({"cells": cells}))
    assert "commit 0123456 with changes. And 4 more like it." in page.page()
