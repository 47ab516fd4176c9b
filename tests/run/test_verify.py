from __future__ import annotations

import os
import threading
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor, nn

from slipstream import tree
from slipstream.jitter import Jitter
from slipstream.replay.rows import Rows
from slipstream.replay.windows import Windows
from slipstream.run import cli
from slipstream.run.config import Config, ConfigError, Placement
from slipstream.run.loop import Own
from slipstream.run.presets import configure
from slipstream.run.training import Training
from slipstream.run.verify import Outcome, fingerprint, first_difference, placement_of, verify

UPDATES, DELAY = 3, 0.001


def config(env: str = "toy:catch", schedule: str = "sync", **settings: object) -> Config:
    size = {"num_envs": 6, "unroll": 5, "lanes": 3, "schedule": schedule, "algo.batch_size": 15, "algo.epochs": 2}
    return configure("ppo", env, {**size, **settings})


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


class Planted(gymnasium.Env[NDArray[np.float32], np.int64]):
    """Shows where it is stepped, from its eighth step on: the bug that `verify` is there to find."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.action_space = spaces.Discrete(2)
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action: np.int64) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._steps += 1
        seen = float(self._steps >= 8 and not in_main_thread())
        return np.array([0.5, seen], np.float32), 0.0, False, False, {}


class PlantedTorso(nn.Module):
    """Learns a little differently outside the main thread."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)

    def forward(self, obs: Tensor) -> Tensor:
        features = self.linear(obs)
        return features * 1.001 if torch.is_grad_enabled() and not in_main_thread() else features


@pytest.mark.parametrize("schedule", ["sync", "concurrent"])
def test_threads_and_delays_change_nothing(schedule: str) -> None:
    outcomes = list(verify(config(schedule=schedule), UPDATES, ("thread:1", "thread:2", "thread:4"), DELAY))
    assert [outcome.placement for outcome in outcomes] == ["inline", "thread:1", "thread:2", "thread:4"]
    assert all(outcome.updates == UPDATES and outcome.difference is None for outcome in outcomes)
    assert len({outcome.digest for outcome in outcomes}) == 1


def test_a_planted_bug_in_the_environment_is_found_and_named() -> None:
    """Step 8 is the answer to row 2 of the second update, and is seen in row 3 of it."""
    planted = config("callable:planted", unroll=5)
    outcomes = list(verify(planted, UPDATES, ("thread:2",), DELAY, Own(env=Planted)))
    assert outcomes[1].difference == "update 2, row 3, slot 0: obs"
    assert outcomes[1].updates == 2


def test_a_planted_bug_in_learning_is_found_and_named() -> None:
    planted = config("callable:planted")
    still = Own(env=lambda: gymnasium.wrappers.TimeLimit(Quiet(), 4), torso=PlantedTorso())
    outcomes = list(verify(planted, UPDATES, ("thread:2",), DELAY, still))
    difference = outcomes[1].difference
    assert difference is not None
    assert difference.startswith("update 1, after learning: ")


def prioritised(updates: int) -> list[Outcome]:
    """DQN, inline and with one loader; its second update is the first that learns, by several gradient steps."""
    replay = {"algo.replay.alpha": 0.6, "algo.replay.learning_starts": 40, "algo.replay.ratio": 0.5}
    size = {"num_envs": 6, "unroll": 5, "lanes": 3, "algo.batch_size": 15, "algo.replay.capacity": 900}
    return list(verify(configure("dqn", "toy:catch", {**size, **replay}), updates, ("thread:1",), DELAY))


def test_a_planted_bug_in_a_loader_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Rows.obs

    def planted(self: Rows, slots: NDArray[np.int64], rows: NDArray[np.int64]) -> Tensor:
        return plain(self, slots, rows) + (0.0 if in_main_thread() else 0.001)

    monkeypatch.setattr(Rows, "obs", planted)
    inline, loaded = prioritised(3)
    assert inline.difference is None
    assert loaded.difference is not None
    assert loaded.difference.startswith("update 2, after learning: ")


def test_a_planted_bug_in_the_last_priorities_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been drawn by them yet: all draws of an update are made before its first gradient step."""
    gather, reprioritise = Rows.obs, Windows.reprioritise
    loaded = False

    def noticed(self: Rows, slots: NDArray[np.int64], rows: NDArray[np.int64]) -> Tensor:
        nonlocal loaded
        loaded = loaded or not in_main_thread()
        return gather(self, slots, rows)

    def planted(self: Windows, slots: NDArray[np.int64], rows: NDArray[np.int64], errors: NDArray[np.float32]) -> None:
        reprioritise(self, slots, rows, errors * (1.01 if loaded else 1.0))

    monkeypatch.setattr(Rows, "obs", noticed)
    monkeypatch.setattr(Windows, "reprioritise", planted)
    assert [outcome.difference for outcome in prioritised(2)] == [None, "update 2, after learning: replay.priorities"]


def test_loaders_are_delayed_too() -> None:
    """One worker acts and learns in the main thread: whoever else asks for a delay is a loader."""
    where: set[bool] = set()

    class Noted(Jitter):
        def __call__(self) -> None:
            where.add(in_main_thread())

    place: dict[str, Any] = {"placement.collectors": "thread", "placement.workers": 1}
    for loaders in (0, 1):
        where.clear()
        settings = config("toy:catch", "sync", **place | {"placement.loaders": loaders})
        with closing(Training(settings, jitter=Noted(DELAY))) as training:
            next(iter(training))
        assert where == ({True} if loaders == 0 else {True, False})


def test_environments_are_delayed_too() -> None:
    """All lanes are sent to and received from in 50 rows; acting and learning are 20 tasks or so."""
    calls = 0

    class Counted(Jitter):
        def __call__(self) -> None:
            nonlocal calls
            calls += 1

    place: dict[str, Any] = {"placement.collectors": "thread", "placement.workers": 1, "placement.loaders": 0}
    settings = config("toy:catch", "sync", unroll=50, **place | {"algo.batch_size": 150})
    with closing(Training(settings, jitter=Counted(DELAY))) as training:
        next(iter(training))
    assert calls > 2 * 3 * 50


class Quiet(Planted):
    def step(self, action: np.int64) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.array([0.5, float(action)], np.float32), float(action), False, False, {}


def sleepless(folder: Path, driver: int) -> gymnasium.Env[Any, Any]:
    """In another process than the driver, whoever sleeps only writes down for how long, in a file of the process."""

    def note(seconds: float, /) -> None:
        with (folder / str(os.getpid())).open("a") as file:
            file.write(f"{seconds}\n")

    if os.getpid() != driver:
        time.sleep = note
    return gymnasium.wrappers.TimeLimit(Quiet(), 4)


def test_collector_processes_are_delayed_too(tmp_path: Path) -> None:
    """Every lane is stepped 189 times, with a delay in one of four calls: none at all has a chance of 1e-40."""
    delayed = Own(env=partial(sleepless, tmp_path, os.getpid()))
    long = config("callable:sleepless", "sync", unroll=63, **{"algo.batch_size": 189})
    outcomes = list(verify(long, UPDATES, ("process:2",), DELAY, delayed))
    assert [(outcome.difference, outcome.refused) for outcome in outcomes] == [(None, None)] * 2
    written = [[float(line) for line in file.read_text().split()] for file in tmp_path.iterdir()]
    assert len(written) == 2
    assert all(0.0 <= seconds <= DELAY for delays in written for seconds in delays)


def test_replays_are_learned_from_or_it_says_that_they_are_not() -> None:
    """The presets collect more before their first gradient than is compared."""

    def digest(**changes: Any) -> str:
        settings = {"algo.lr": 1e-3, "algo.batch_size": 8, "net.hidden": (8,), **changes}
        (outcome,) = verify(configure("dqn", "CartPole-v1", settings), 3, (), 0.0)
        return outcome.digest

    assert digest() != digest(**{"algo.lr": 0.5})
    with pytest.raises(ConfigError, match=r"nothing was learned in 3 updates \(\d+ steps\): .* use more --updates"):
        digest(**{"algo.batch_size": 512})


def test_async_is_refused() -> None:
    appo = configure("appo", "toy:catch", {"schedule": "async"})
    with pytest.raises(ConfigError, match="async does not promise"):
        verify(appo, UPDATES, ("thread:2",), DELAY)


@pytest.mark.parametrize("name", ["", "thread", "thread:0", "inline:2", "gpu", "process:"])
def test_unknown_placements_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown placement"):
        placement_of(name, Placement())


def test_the_reference_is_not_recorded() -> None:
    assert not placement_of("inline", Placement(cuda_graphs=True)).cuda_graphs


def test_recordings_want_a_gpu() -> None:
    with pytest.raises(ConfigError, match="there is none here"):
        placement_of("graphs", Placement(device="cpu"))


def test_a_placement_keeps_the_rest() -> None:
    base = Placement(env_workers=3)
    assert placement_of("thread:2", base) == replace(base, collectors="thread", workers=2, loaders=2)
    assert placement_of("process:4", base) == replace(base, collectors="process", workers=4, loaders=4)
    assert placement_of("inline", base) == replace(base, collectors="inline", workers=1, loaders=0)


@pytest.mark.parametrize("name", ["obs", "slot", "version", "extras value", "action", "valid", "recurrent state 0"])
def test_a_difference_in_any_column_is_named(name: str) -> None:
    with closing(Training(config(**{"net.core": "gru"}))) as training:
        report = next(iter(training))
        expected = fingerprint(report, {})
        column, _, leaf = name.partition(" ")
        if column == "recurrent":
            changed = tree.leaves(report.trajectory.state0)[0][5]
        elif column == "slot":
            changed = report.trajectory.slot[5]
        else:
            value = getattr(report.trajectory, column)
            changed = (value[leaf] if leaf else value)[2, 5]
        changed.copy_(~changed if changed.dtype == torch.bool else changed + 1)
        difference = first_difference(1, expected, fingerprint(report, {}))
    row = {"recurrent": "before row 0", "slot": "row 0"}.get(column, "row 2")
    assert difference == f"update 1, {row}, slot 5: {name}"


def test_the_reference_comes_first_and_has_no_difference() -> None:
    outcomes = list(verify(config(), 1, (), DELAY))
    assert outcomes == [Outcome("inline", 1, digest=outcomes[0].digest)]


def test_the_verb_says_identical(capsys: pytest.CaptureFixture[str]) -> None:
    words = "ppo --env toy:catch --system hts --num-envs 8 --unroll 4 --batch-size 32 --updates 2 --placements thread:2"
    assert cli.main(["verify", *words.split()]) == 0
    out, error = capsys.readouterr()
    assert error == "runs: 2, 2 updates (64 steps) each\n"
    lines = out.splitlines()
    assert lines[0] == "ppo on toy:catch, schedule concurrent, lanes 4, 2 updates"
    assert lines[1].startswith("inline      the reference, 2 updates, ")
    assert lines[2].startswith("thread:2    identical, 2 updates, ")
