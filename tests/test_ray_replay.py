"""A replay in shards on a Ray cluster: the bits of one in the learner's process, and what is left when a shard dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from slipstream import ray_replay
from slipstream.replay.sharded import ShardLostError
from slipstream.run import checkpoint
from slipstream.run.config import ConfigError
from slipstream.run.presets import configure
from slipstream.run.training import Training
from tests.run.runs import resume, train

from .test_team import CASES, REPLAY, run, same

ray: Any = pytest.importorskip("ray")

PLACE: dict[str, Any] = {"placement.collectors": "ray", "placement.workers": 1, "placement.replay_shards": 2}
CLUSTER: dict[str, Any] = {**PLACE, "placement.address": "auto"}
PONG = {**REPLAY, "net.torso": "nips_cnn", "algo.replay.capacity": 600, "algo.replay.alpha": 0.5}


def shards() -> list[psutil.Process]:
    """The processes that have shards."""
    every = (each for each in psutil.process_iter(["cmdline"]) if each.info["cmdline"])
    return [each for each in every if each.info["cmdline"][0].startswith("ray::RayShelf")]


@pytest.mark.slow
def test_a_private_cluster_has_room_and_leaves_nothing() -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    alone, _ = run("dqn", 1, 12)
    sharded, _ = run("dqn", 1, 12, **PLACE)
    assert same(sharded, alone)
    assert not {child.pid for child in psutil.Process().children(recursive=True)} - before
    assert not ray.is_initialized()


@pytest.mark.usefixtures("nodes")
@pytest.mark.parametrize("case", ["dqn", *(pytest.param(each, marks=pytest.mark.slow) for each in ("r2d2", "sac"))])
def test_shards_change_no_bit(case: str) -> None:
    alone, _ = run(case, 1, 20)
    sharded, metrics = run(case, 1, 20, **CLUSTER)
    assert same(sharded, alone)
    assert metrics["faults/lost_shards"] == metrics["faults/replaced_windows"] == 0
    assert not psutil.wait_procs(shards(), timeout=10)[1]


@pytest.mark.slow
@pytest.mark.usefixtures("nodes")
def test_unrolls_beside_fresh_ones_are_the_same() -> None:
    alone, _ = run("appo, replay", 1, 12)
    sharded, metrics = run("appo, replay", 1, 12, **CLUSTER)
    assert metrics["lag/replayed_mean"] > 0
    assert same(sharded, alone)


@pytest.mark.slow
@pytest.mark.usefixtures("nodes")
def test_stacked_frames_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "pong", ("dqn", "ALE/Pong-v5", PONG))
    alone, _ = run("pong", 1, 30)
    sharded, _ = run("pong", 1, 30, **CLUSTER)
    assert same(sharded, alone)


def kill(process: psutil.Process) -> None:
    process.kill()


def hang(process: psutil.Process) -> None:
    os.kill(process.pid, signal.SIGSTOP)


@pytest.mark.slow
@pytest.mark.usefixtures("nodes")
@pytest.mark.parametrize("end", [kill, hang])
def test_a_run_goes_on_without_the_rows_of_a_shard_that_is_lost(
    end: Callable[[psutil.Process], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_replay, "_SECONDS", 3.0)
    algo, env, settings = CASES["dqn"]
    with closing(Training(configure(algo, env, {**settings, **CLUSTER}))) as training:
        held: list[float] = []
        for report in training:
            held.append(report.metrics["replay/rows"])
            if report.update == 10:
                end(shards()[0])
            if report.update == 20:
                break
        assert report.metrics["faults/lost_shards"] == 1
        assert report.metrics["faults/replaced_windows"] > 0
        assert report.metrics["train/gradient_steps"] > 0
        rows = settings["num_envs"] * settings["unroll"]
        assert held[-1] - held[-2] == rows, "all slots bring rows again"
        assert held[-1] < held[9] + 10 * rows - 3 * rows, "those of the lost shard are gone"
        assert all(torch.isfinite(value).all() for value in training.learner.state()[0].values())
        assert len(shards()) == 2
    assert not psutil.wait_procs(shards(), timeout=10)[1]


@pytest.mark.slow
@pytest.mark.usefixtures("nodes")
def test_without_restarts_a_shard_that_is_lost_ends_the_run() -> None:
    algo, env, settings = CASES["dqn"]
    config = configure(algo, env, {**settings, **CLUSTER, "placement.restarts": 0})
    with closing(Training(config)) as training:
        reports = iter(training)
        for _ in range(10):
            next(reports)
        kill(shards()[0])
        with pytest.raises(ShardLostError, match=r"shard \d of the replay \(actor, process \d+ on .*\) has died"):
            list(islice(reports, 10))


@pytest.mark.slow
@pytest.mark.usefixtures("nodes")
@pytest.mark.filterwarnings("ignore:.*falling back to the checkpoint")
def test_a_run_goes_on_with_another_number_of_shards(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"algo": "dqn", "unroll": 4, "lanes": 3, "algo__replay__learning_starts": 60}
    settings |= {"algo__batch_size": 18, "algo__replay__alpha": 0.6, "log__checkpoint_every": 60, "total_steps": 240}
    place = {f"placement__{key.partition('.')[2]}": value for key, value in CLUSTER.items()}
    whole = train(tmp_path / "whole", **settings, log__keep_last=9).run
    part = train(tmp_path / "part", **settings, log__keep_last=9, **place).run
    (*_, expected) = sorted(int(path.name) for path in whole.checkpoints.iterdir() if path.name.isdecimal())
    for shards_ in (1, 0):
        saved = sorted(int(path.name) for path in part.checkpoints.iterdir() if path.name.isdecimal())
        for steps in saved[2:]:
            (part.checkpoints / str(steps) / "MANIFEST.json").unlink()
        resume(part.path, **(place | {"placement__replay_shards": shards_}))
        found, wanted = (checkpoint.read(each.checkpoints / str(expected)).tensors() for each in (part, whole))
        assert same(found, wanted)


@pytest.mark.parametrize(
    ("algo", "changes", "message"),
    [
        ("dqn", {"placement.collectors": "thread"}, "use --placement.collectors ray"),
        ("ppo", {}, "ppo has no replay"),
        ("dqn", {"algo.replay.memory_map": True}, "algo.replay.memory_map keeps the replay on the disk"),
    ],
)
def test_what_shards_can_not_be_had_with_is_refused(algo: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configure(algo, "CartPole-v1", {**PLACE, **changes})


def test_more_shards_than_environments_are_refused() -> None:
    config = configure("dqn", "CartPole-v1", {**REPLAY, **PLACE, "placement.replay_shards": 9})
    with pytest.raises(ConfigError, match="some of the 8 environments; use 8 at most"):
        Training(config)
