"""A replay on disk: written once, shared by checkpoints, gone with the last that lists it."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from slipstream.replay.windows import Windows
from slipstream.run import checkpoint, metrics, segments
from slipstream.run.directory import RunDirectory
from slipstream.run.files import CheckpointError
from tests.run.runs import resume, train

DQN: dict[str, Any] = {
    "algo": "dqn",
    "num_envs": 4,
    "unroll": 8,
    "algo__replay__capacity": 128,
    "algo__replay__learning_starts": 64,
    "algo__batch_size": 8,
    "log__checkpoint_every": 64,
    "total_steps": 400,
}


def names(run: RunDirectory) -> set[str]:
    return {path.name for path in (run.checkpoints / segments.FOLDER).iterdir()}


def test_segments_are_shared_and_go_with_the_last_checkpoint_that_lists_them(tmp_path: Path) -> None:
    run = train(tmp_path, log__keep_last=2, **DQN).run
    newest = checkpoint.newest(run.checkpoints, replay=True)
    older = checkpoint.read(sorted(run.checkpoints.glob("[0-9]*"), key=lambda path: int(path.name))[-2])
    lists = [[segment["name"] for segment in saved.segments] for saved in (older, newest)]
    assert set(lists[0]) & set(lists[1])
    assert set(lists[1]) - set(lists[0])
    assert names(run) == set(lists[0]) | set(lists[1])
    assert len(lists[1]) >= 2


def test_the_best_checkpoint_is_looked_at_without_its_replay(tmp_path: Path) -> None:
    run = train(tmp_path, log__keep_last=1, log__eval_every=64, log__eval_episodes=2, seed=2, **DQN).run
    newest, best = checkpoint.newest(run.checkpoints, replay=True), checkpoint.best(run.checkpoints)
    assert best.steps < newest.steps, "the test wants an older one to be the best"
    assert names(run) == {segment["name"] for segment in newest.segments}
    best.check()
    with pytest.raises(CheckpointError, match="cannot be read"):
        best.check(replay=True)


def test_a_damaged_segment_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    run = train(tmp_path, log__keep_last=2, **DQN).run
    paths = sorted(run.checkpoints.glob("[0-9]*"), key=lambda path: int(path.name))
    older, newest = (checkpoint.read(path) for path in paths[-2:])
    (only,) = {segment["name"] for segment in newest.segments} - {segment["name"] for segment in older.segments}
    path = run.checkpoints / segments.FOLDER / only
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=rf"{only} is damaged.*falling back to the checkpoint at step {older.steps}"):
        assert checkpoint.newest(run.checkpoints, replay=True).steps == older.steps
    with pytest.warns(UserWarning, match="falling back"):
        assert resume(run.path, total_steps=500).progress.steps >= 500


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, count = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count in (17, 19):  # in the second checkpoint's segment, and the third's, after the metrics
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match=r"replay: No space left on device \(.* free\).*training goes on"):
        run = train(tmp_path, log__keep_last=9, **DQN).run
    saved = checkpoint.newest(run.checkpoints, replay=True)
    assert saved.steps >= 400
    assert not list((run.checkpoints / segments.FOLDER).glob(".writing-*"))


def test_only_what_networks_are_loaded_from_is_said_not_to_fit_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(tmp_path, **DQN).run

    def fail(self: Windows, *given: Any) -> None:
        raise RuntimeError("no memory left for the replay")

    with monkeypatch.context() as patch:
        patch.setattr(Windows, "load", fail)
        with pytest.raises(RuntimeError, match=r"^no memory left for the replay$"):
            resume(run.path, total_steps=500)
    assert resume(run.path, total_steps=500).progress.steps >= 500


def test_a_replay_need_not_be_saved(tmp_path: Path) -> None:
    run = train(tmp_path, log__save_replay=False, **DQN).run
    assert not (run.checkpoints / segments.FOLDER).exists()
    assert not checkpoint.newest(run.checkpoints).segments
    assert resume(run.path, total_steps=500).progress.steps >= 500


def test_a_run_whose_replay_is_lost_goes_on_with_an_empty_one_when_told_to(tmp_path: Path) -> None:
    run = train(tmp_path, **DQN).run
    saved, checkpoints = checkpoint.newest(run.checkpoints, replay=True), sorted(run.checkpoints.glob("[0-9]*"))
    full = metrics.read(run.metrics)[-1]["replay/rows"]
    shutil.rmtree(run.checkpoints / segments.FOLDER)
    with pytest.raises(CheckpointError, match=rf"no whole.*: slipstream resume {run.path} --log.no-save-replay$"):
        resume(run.path, total_steps=600)
    with pytest.warns(UserWarning, match="cannot be read: .*; the run goes on with an empty replay"):
        resume(run.path, total_steps=600, log__save_replay=False, log__keep_last=9)
    assert set(checkpoints) < set(run.checkpoints.iterdir()), "none was set aside"
    rows = [row["replay/rows"] for row in metrics.read(run.metrics) if row["time/steps"] > saved.steps]
    assert 0 < rows[0] < rows[-1] == full, "it fills again"


def test_a_replay_that_is_there_is_gone_on_with_though_it_is_saved_no_more(tmp_path: Path) -> None:
    run = train(tmp_path, **DQN).run
    steps, full = checkpoint.newest(run.checkpoints).steps, metrics.read(run.metrics)[-1]["replay/rows"]
    resume(run.path, total_steps=500, log__save_replay=False)
    rows = [row["replay/rows"] for row in metrics.read(run.metrics) if row["time/steps"] > steps]
    assert rows[0] == full
    assert not checkpoint.newest(run.checkpoints).segments


def test_names_of_segments_stay_in_their_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    listed = {"name": "../secret", "bytes": 1, "sha256": "", "end": []}
    with pytest.raises(CheckpointError, match=r"replay/secret cannot be read"):
        next(segments.read(tmp_path, [listed]))
