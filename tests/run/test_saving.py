"""Checkpoints are written beside training, each of one moment."""

from __future__ import annotations

import os
import shutil
import threading
import warnings
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream.run import checkpoint, metrics, saving
from slipstream.run.config import Log
from slipstream.run.files import CheckpointError
from slipstream.run.progress import Progress
from slipstream.run.saving import Checkpoints
from slipstream.run.segments import ReplayLostError
from tests.run.reports import spec
from tests.run.runs import train

Usage = namedtuple("Usage", "total used free")


class Run:
    """A run directory with nothing but checkpoints, and metrics that have no rows."""

    def __init__(self, root: Path) -> None:
        self.checkpoints, self.metrics = root / "checkpoints", root / "metrics.jsonl"
        self.metrics.touch()


class Something:
    """A state that changes in place, and who saves it."""

    def __init__(self, root: Path, **log: Any) -> None:
        self.weights, self.facts = torch.zeros(3), {"list": [0]}
        self.progress = Progress(1000, 1)
        run: Any = Run(root)
        state = lambda: ({"w": self.weights}, self.facts)  # noqa: E731
        self.checkpoints = Checkpoints(run, Log(checkpoint_every=10, **log), self.progress, spec(), state)
        self.root = run.checkpoints

    def step(self, steps: int) -> None:
        self.progress.before, self.progress.steps = self.progress.steps, steps
        self.weights.fill_(steps)
        self.facts["list"][0] = steps
        report: Any = None
        self.checkpoints(report)


def test_what_is_written_is_the_state_of_one_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer is held at its first flush until training has gone on."""
    something, gone_on, fsync = Something(tmp_path), threading.Event(), os.fsync

    def held(descriptor: int) -> None:
        assert gone_on.wait(5)
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", held)
        something.step(10)
        something.step(13)
        assert not list(something.root.glob("[0-9]*"))
        gone_on.set()
        something.checkpoints.save()
    for steps in (10, 13):
        saved = checkpoint.select(something.root, str(steps))
        assert saved.tensors()["w"].tolist() == [steps] * 3
        assert saved.facts() == {"list": [steps]}


def test_an_update_without_steps_after_an_evaluation_leaves_its_checkpoint_alone(tmp_path: Path) -> None:
    """Pendulum's episodes end together, so that the slab after one of an evaluation has dead rows only."""
    small = {"num_envs": 4, "unroll": 1, "algo__replay__learning_starts": 100, "algo__batch_size": 8}
    changes: dict[str, Any] = {"log__eval_every": 800, "log__eval_episodes": 1, "log__checkpoint_every": 10**6}
    run = train(tmp_path, env="Pendulum-v1", algo="sac", total_steps=1_700, **small, **changes).run
    for steps in (1600, 1700):
        checkpoint.read(run.checkpoints / str(steps)).check(replay=True)
    rows = [row["time/steps"] for row in metrics.read(run.metrics)]
    assert rows == sorted(set(rows)), "one row for a number of steps"


def test_a_thread_that_cannot_start_is_a_failed_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    something = Something(tmp_path)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.warns(UserWarning, match="step 10: RuntimeError: can't start new thread; training goes on"):
            something.step(10)
    something.step(20)
    something.checkpoints.close()
    assert checkpoint.newest(something.root).steps == 20


def test_whatever_goes_wrong_in_the_thread_is_a_failed_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    something = Something(tmp_path)

    def fail(*arguments: Any) -> None:
        raise MemoryError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", fail)
        something.step(10)
        with pytest.warns(UserWarning, match="cannot write the checkpoint at step 10: MemoryError: no more; training"):
            something.step(20)
        with pytest.warns(UserWarning, match="step 20"):
            something.checkpoints.close()


def test_a_disk_that_hangs_is_said_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    something, told, fsync = Something(tmp_path), threading.Event(), os.fsync

    def held(descriptor: int) -> None:
        assert told.wait(10)
        fsync(descriptor)

    monkeypatch.setattr(saving, "_LONG_SECONDS", 0.01)
    monkeypatch.setattr(os, "fsync", held)
    monkeypatch.setattr(warnings, "warn", lambda text, **more: (told.set(), texts.append(text)))
    texts: list[str] = []
    something.step(10)
    something.checkpoints.save()
    assert texts == [
        "the checkpoint at step 10 has been on its way to the disk for 0 seconds, and is waited for: does the disk "
        "hang?"
    ]


def test_the_next_one_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    something, writing, most = Something(tmp_path), [0], [0]
    save = checkpoint.save

    def counted(*arguments: Any, **more: Any) -> Any:
        writing[0] += 1
        most[0] = max(most)
        most.append(writing[0])
        saved = save(*arguments, **more)
        writing[0] -= 1
        return saved

    monkeypatch.setattr(checkpoint, "save", counted)
    for steps in range(10, 60, 10):
        something.step(steps)
    something.checkpoints.close()
    assert max(most) == 1
    assert checkpoint.newest(something.root).steps == 50


def test_there_is_a_look_at_the_disk_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    something = Something(tmp_path)
    something.step(10)
    something.checkpoints.save()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6 - 300, 300))
    monkeypatch.setattr(Path, "mkdir", lambda *arguments, **more: pytest.fail("nothing is to be written"))
    something.step(20)
    with pytest.warns(UserWarning, match=r"No space left on device .*0.3 kB free.*step 10 is kept; training goes on"):
        something.step(30)
    with pytest.warns(UserWarning, match="step 30"):
        something.step(40)
    with pytest.raises(CheckpointError, match="cannot write the checkpoint at step 40"):
        something.step(50)
    assert [path.name for path in something.root.iterdir()] == ["10"]


def test_replays_that_cannot_be_copied_to_the_disk_count_as_failures(tmp_path: Path) -> None:
    """What is written by the training thread fails there; nothing was under way in between."""
    something = Something(tmp_path)

    class Full:
        most = 0

        def begin(self) -> Any:
            raise CheckpointError("no room")

    full: Any = Full()
    something.checkpoints._segments = full
    anew: list[int] = []
    something.checkpoints._then = lambda: anew.append(something.progress.steps)
    for steps in (10, 20):
        with pytest.warns(UserWarning, match="no room; training goes on"):
            something.step(steps)
    assert anew == [10, 20], "as in a run whose checkpoints did not fail"
    with pytest.raises(CheckpointError, match="no room"):
        something.step(30)


def test_the_last_checkpoint_is_without_a_replay_that_has_lost_a_shard(tmp_path: Path) -> None:
    class Lost:
        most = 0

        def begin(self) -> None:
            raise ReplayLostError("cannot write the replay: shard 1 has died")

    something = Something(tmp_path)
    something.checkpoints._segments = Lost()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.warns(UserWarning, match="shard 1 has died; training goes on"):
        something.step(10)
    assert not list(something.root.glob("[0-9]*"))
    something.progress.steps = 13
    with pytest.warns(UserWarning, match="shard 1 has died; the last checkpoint is without it"):
        something.checkpoints.save()
    assert checkpoint.newest(something.root, replay=True).steps == 13


def test_a_disk_that_will_not_do_is_said_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 100_000, 100_000))
    small = {"total_steps": 21, "log__checkpoint_every": 10**6}
    with pytest.warns(UserWarning, match=r"take up to .*MB, and .* has 0.1 MB free: make room, or use --log.dir"):
        train(tmp_path, net__hidden=[32, 32], **small)


def test_that_the_disk_will_not_do_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6 - 30, 30))
    something = Something(tmp_path)
    with warnings.catch_warnings(record=True, action="always") as told:
        for steps in (10, 20, 30):
            something.step(steps)
    assert [str(each.message).partition(" ")[0] for each in told] == ["the", "cannot", "cannot"]
    assert "the checkpoints of this run take up to" in str(told[0].message)


def test_one_is_kept_at_every_distance_for_good(tmp_path: Path) -> None:
    something = Something(tmp_path, keep_last=1, keep_every=40)
    for steps in range(7, 150, 7):
        something.step(steps)
    something.checkpoints.close()
    # Saved at the first update at or after every tenth step.
    kept = sorted(int(path.name) for path in something.root.iterdir())
    assert kept == [42, 84, 126, 140]


def test_metrics_that_somebody_removes_cost_no_checkpoint(tmp_path: Path) -> None:
    something = Something(tmp_path)
    something.checkpoints._metrics.unlink(missing_ok=True)
    something.step(10)
    something.checkpoints.save()
    assert checkpoint.newest(something.root).steps == 10
