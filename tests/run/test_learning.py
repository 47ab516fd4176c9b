"""Who learns in a run: what a replay takes, and what is refused before anything starts."""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from slipstream.algos import APPO, IMPALA
from slipstream.nets.actor_critic import make_actor_critic
from slipstream.nets.trunk import Network
from slipstream.run import learning, loop
from slipstream.run.config import Config
from slipstream.run.loop import Own
from slipstream.run.presets import configure
from slipstream.run.settings import ConfigError
from slipstream.run.training import Training

SMALL = {"num_envs": 2, "unroll": 3, "lanes": 1, "net.hidden": [8], "placement.device": "cpu", "placement.workers": 1}


def _config(algo: str, root: Path, changes: dict[str, Any]) -> Config:
    return configure(algo, "toy:catch", {**SMALL, "log.dir": str(root), **changes})


@pytest.fixture
def training() -> Iterator[Callable[..., Training]]:
    made: list[Training] = []

    def make(config: Config, **parts: Any) -> Training:
        made.append(Training(config, **parts))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("remembers", [False, True])
@pytest.mark.parametrize("option", ["clone_policy", "trust_region"])
@pytest.mark.parametrize("kind", [IMPALA, APPO], ids=["impala", "appo"])
def test_a_policy_that_does_not_store_its_distributions_is_refused_where_they_are_wanted(
    training: Callable[..., Training], tmp_path: Path, kind: type[IMPALA | APPO], option: str, remembers: bool
) -> None:
    batch = {"algo.batch_size": 6} if kind is APPO else {}
    plain = _config(kind.name, tmp_path, {"schedule": "sync", **batch})
    policy = make_actor_critic(training(plain).spec, Network(hidden=(8,)), None, 1, remember=remembers)
    training(plain, policy=policy)
    changes = {"algo.replay.proportion": 1.0, "algo.replay.capacity": 100, f"algo.replay.{option}": 0.1}
    config = _config(kind.name, tmp_path, {"schedule": "sync", **batch, **changes})
    if remembers:
        reports = iter(training(config, policy=policy))
        assert "train/policy_loss" in next(reports).metrics
        assert "train/policy_loss" in next(reports).metrics
        return
    with pytest.raises(ConfigError, match=r"clone_policy and trust_region .* a policy of your own stores only if"):
        training(config, policy=policy)


@pytest.mark.parametrize("in_file", [False, True])
def test_a_replay_without_room_is_refused_and_a_capacity_that_fits_is_proposed(
    training: Callable[..., Training], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_file: bool
) -> None:
    """What is proposed is accepted; where even the least has no place, nothing is."""

    def free(amount: int) -> None:
        usage = shutil.disk_usage(tmp_path)._replace(free=amount)
        monkeypatch.setattr(learning, "available_memory", lambda: amount)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)

    changes = {"algo.replay.capacity": 100_000, "algo.replay.memory_map": in_file}
    changes |= {"algo.n_step": 1, "algo.batch_size": 8}
    least = (1 + 2 * 3) * 2 + 8
    seen: list[str] = []
    for amount in (5_000_000, 50_000, 2_000, 0):
        free(amount)
        with pytest.raises(ConfigError) as refused:
            training(_config("dqn", tmp_path, changes))
        message = str(refused.value)
        assert message.startswith("algo.replay.capacity=100,000 needs ")
        assert message.endswith("elsewhere" if in_file else "--algo.replay.memory-map to keep it on disk")
        seen += (found := re.findall(r"--algo\.replay\.capacity (\d+)", message))
        assert bool(found) == (f"too little for the {least} rows" not in message)
        for capacity in found:
            training(_config("dqn", tmp_path, {**changes, "algo.replay.capacity": int(capacity)}))
    assert len(seen) >= 2
    assert int(seen[0]) % 1000 == 0
    assert least <= int(seen[1])


def test_a_replay_in_a_file_takes_its_place_on_the_disk_at_once(
    training: Callable[..., Training], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config("dqn", tmp_path, {"algo.replay.capacity": 1_000, "algo.replay.memory_map": True})
    training(config)
    assert not any(tmp_path.iterdir()), "the file has no name"

    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match=r"capacity=1,000 can't be reserved on the disk of .* \(No space left on dev"):
        training(config)


@pytest.mark.parametrize(
    ("algo", "changes", "line"),
    [
        ("dqn", {"algo.replay.capacity": 1_003}, "The replay keeps 1,002 rows: 0.22 MB in memory, when it is full."),
        (
            "dqn",
            {"algo.replay.capacity": 2_000, "algo.replay.memory_map": True},
            "The replay keeps 1,998 rows: 0.43 MB on the disk of {root}.",
        ),
        (
            "impala",
            {"algo.replay.capacity": 1_000, "algo.replay.proportion": 1.0},
            "The replay keeps 996 rows: 0.23 MB in memory, when it is full.",
        ),
        ("impala", {}, ""),
        ("ppo", {"algo.batch_size": 6}, ""),
    ],
)
@pytest.mark.parametrize("quiet", [False, True])
def test_the_size_of_a_replay_is_said_at_the_start(
    tmp_path: Path, algo: str, changes: dict[str, Any], line: str, quiet: bool
) -> None:
    """A row has 50 numbers to see, an action, a reward and three flags: 215 bytes; IMPALA's three columns more."""
    changes = {"total_steps": 12, "schedule": "sync", "log.tensorboard": False, **changes}
    if algo == "dqn":
        changes |= {"algo.replay.learning_starts": 6, "algo.batch_size": 2}
    out = io.StringIO()
    loop.train(_config(algo, tmp_path, changes), Own(), ["made up"], Console(file=out, quiet=quiet))
    lines = out.getvalue().splitlines()
    if quiet:
        assert lines == []
    else:
        assert lines[0].startswith(f"{algo} on toy:catch")
        assert [each for each in lines if each.startswith("The replay")] == [line.format(root=tmp_path)] * bool(line)
        assert lines[1] == line.format(root=tmp_path) or not line
