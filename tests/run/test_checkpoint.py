from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from slipstream.run import checkpoint
from slipstream.run.files import CheckpointError
from tests.run.reports import spec


def _save(root: Path, steps: int, score: float | None = None) -> None:
    tensors = {"policy.w": torch.full((5, 7), float(steps)), "step": torch.tensor(steps), "flat": torch.arange(3)[1:]}
    checkpoint.save(root, steps, tensors, {"training": {"steps": steps}}, spec(), score)


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    _save(tmp_path, 30, 1.5)
    found = checkpoint.newest(tmp_path)
    assert (found.steps, found.score, found.path) == (30, 1.5, tmp_path / "30")
    assert found.facts() == {"training": {"steps": 30}}
    tensors = found.tensors()
    assert torch.equal(tensors["policy.w"], torch.full((5, 7), 30.0))
    assert tensors["step"].item() == 30
    assert tensors["flat"].tolist() == [1, 2]
    assert sorted(path.name for path in found.path.iterdir()) == ["MANIFEST.json", "facts.json", "tensors.safetensors"]
    trained = found.spec()
    assert trained.observation_space == spec().observation_space
    assert (trained.action_space, trained.frames_per_step, trained.family) == (spec().action_space, 4, "classic")


def test_the_newest_is_the_one_with_the_highest_step(tmp_path: Path) -> None:
    for steps in (1000, 999, 9):
        _save(tmp_path, steps)
    for place, steps in enumerate((9, 999, 1000)):  # the clock says the reverse
        os.utime(tmp_path / str(steps), (10**9 - place, 10**9 - place))
    assert checkpoint.newest(tmp_path).steps == 1000


@pytest.mark.parametrize("name", ["tensors.safetensors", "facts.json", "MANIFEST.json"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_torn_file_falls_back_loudly(tmp_path: Path, name: str, share: float) -> None:
    _save(tmp_path, 10)
    _save(tmp_path, 20)
    file = tmp_path / "20" / name
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.warns(UserWarning, match=rf"{name} .*damaged.*falling back to the checkpoint at step 10"):
        assert checkpoint.newest(tmp_path).steps == 10


@pytest.mark.parametrize("name", ["tensors.safetensors", "facts.json", "MANIFEST.json"])
def test_every_flipped_bit_is_found(tmp_path: Path, name: str) -> None:
    _save(tmp_path, 10, score=3.0)
    file = tmp_path / "10" / name
    whole = file.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 23)):
        broken = bytearray(whole)
        broken[place] ^= 1 << (place % 8)
        file.write_bytes(bytes(broken))
        with pytest.raises(CheckpointError, match=f"{name} is damaged"):
            checkpoint.newest(tmp_path)
    file.write_bytes(whole)
    assert checkpoint.newest(tmp_path).steps == 10


def test_a_missing_file_falls_back(tmp_path: Path) -> None:
    _save(tmp_path, 10)
    _save(tmp_path, 20)
    (tmp_path / "20" / "facts.json").unlink()
    with pytest.warns(UserWarning, match=r"facts\.json cannot be read"):
        assert checkpoint.newest(tmp_path).steps == 10


def test_a_copy_under_another_name_does_not_count_and_costs_no_other(tmp_path: Path) -> None:
    for steps, score in [(10, 9.0), (20, 1.0)]:
        _save(tmp_path, steps, score)
    for name in ("99", "15", "0010"):
        shutil.copytree(tmp_path / "10", tmp_path / name)
        with pytest.raises(CheckpointError, match=f"{name} was copied or renamed: it is the checkpoint of step 10"):
            checkpoint.select(tmp_path, name)
    with pytest.warns(UserWarning, match=r"99 was copied or renamed.*falling back to the checkpoint at step 20"):
        found = checkpoint.newest(tmp_path)
    checkpoint.set_aside(tmp_path, found.steps)
    checkpoint.prune(tmp_path, keep_last=1)
    assert {path.name for path in tmp_path.iterdir()} == {"10", "20", "damaged-99", "15", "0010"}
    assert found.path == tmp_path / "20"
    assert checkpoint.best(tmp_path).path == tmp_path / "10"


def test_without_a_whole_one_there_is_an_error_and_never_a_fresh_start(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no whole checkpoint in .*: none was written"):
        checkpoint.newest(tmp_path)
    _save(tmp_path, 10)
    shutil.rmtree(tmp_path / "10")
    (tmp_path / "10").mkdir()
    with pytest.raises(CheckpointError, match=r"has no MANIFEST\.json that can be read"):
        checkpoint.newest(tmp_path)


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 9)
    _save(tmp_path, 10)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has format 9, this version of Slipstream reads format 1"):
        checkpoint.read(tmp_path / "10")


@pytest.mark.parametrize("size", [0, 100, 400])
def test_a_full_disk_keeps_the_older_checkpoint(tmp_path: Path, size: int) -> None:
    _save(tmp_path, 10)
    with _largest_file(size), pytest.raises(CheckpointError) as caught:
        _save(tmp_path, 20)
    assert "cannot write the checkpoint at step 20" in str(caught.value)
    assert "File too large" in str(caught.value)
    assert str(caught.value).endswith("the checkpoint at step 10 is kept")
    assert [path.name for path in tmp_path.iterdir()] == ["10"]
    _save(tmp_path, 20)
    assert checkpoint.newest(tmp_path).steps == 20


def test_an_error_of_fsync_counts_as_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match=r"No space left on device .*there is no older checkpoint"):
        _save(tmp_path, 10)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_while_writing_leaves_nothing_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path, 10)

    def die(path: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            _save(tmp_path, 20)
    assert checkpoint.newest(tmp_path).steps == 10
    _save(tmp_path, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "20"]


def test_the_state_of_a_step_is_written_once_unless_damaged(tmp_path: Path) -> None:
    _save(tmp_path, 10, 1.0)
    _save(tmp_path, 10, 2.0)
    assert checkpoint.newest(tmp_path).score == 1.0
    (tmp_path / "10" / "facts.json").write_text("{")
    _save(tmp_path, 10, 2.0)
    assert checkpoint.newest(tmp_path).score == 2.0


def test_prune_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    for steps, score in [(10, None), (20, 5.0), (30, 4.0), (40, 4.5), (50, 3.0)]:
        _save(tmp_path, steps, score)
        checkpoint.prune(tmp_path, keep_last=2)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [20, 40, 50]
    assert checkpoint.best(tmp_path).steps == 20
    assert checkpoint.newest(tmp_path).steps == 50


def test_what_cannot_be_removed_is_an_error_of_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    for steps in (10, 20):
        _save(tmp_path, steps)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        with pytest.raises(CheckpointError, match=r"cannot remove the checkpoint .*10: Permission denied"):
            checkpoint.prune(tmp_path, keep_last=1)
    _save(tmp_path, 30)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["20", "30"]


def test_a_kill_while_removing_leaves_no_torn_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(path: Path) -> None:
        (path / "facts.json").unlink()
        raise KeyboardInterrupt

    for steps in (10, 20):
        _save(tmp_path, steps)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.prune(tmp_path, keep_last=1)
    with pytest.raises(CheckpointError, match="expected last, best, or one of 20"):
        checkpoint.select(tmp_path, "10")


def test_what_was_passed_over_is_set_aside_and_counts_no_more(tmp_path: Path) -> None:
    for steps in (10, 20):
        _save(tmp_path, steps)
    (tmp_path / "20" / "tensors.safetensors").write_bytes(b"torn")
    with pytest.warns(UserWarning, match="falling back to the checkpoint at step 10"):
        found = checkpoint.newest(tmp_path)
    checkpoint.set_aside(tmp_path, found.steps)
    _save(tmp_path, 15)
    checkpoint.prune(tmp_path, keep_last=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["15", "damaged-20"]
    for _ in range(2):
        _save(tmp_path, 20)
        checkpoint.set_aside(tmp_path, 15)
    names = ["15", "damaged-20", "damaged-20-2", "damaged-20-3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_prune_does_not_count_damaged_ones(tmp_path: Path) -> None:
    for steps in (10, 20, 30):
        _save(tmp_path, steps)
    (tmp_path / "30" / "MANIFEST.json").write_text("{}")
    checkpoint.prune(tmp_path, keep_last=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["20", "30"]


def test_best_passes_over_a_damaged_one_and_falls_back_to_the_newest(tmp_path: Path) -> None:
    _save(tmp_path, 10, 1.0)
    _save(tmp_path, 20, 9.0)
    _save(tmp_path, 30)
    (tmp_path / "20" / "facts.json").write_text("{")
    with pytest.warns(UserWarning, match="next best"):
        assert checkpoint.best(tmp_path).steps == 10
    shutil.rmtree(tmp_path / "10")
    shutil.rmtree(tmp_path / "20")
    assert checkpoint.best(tmp_path).steps == 30


def test_select(tmp_path: Path) -> None:
    _save(tmp_path, 10, 2.0)
    _save(tmp_path, 20, 1.0)
    assert checkpoint.select(tmp_path, "last").steps == 20
    assert checkpoint.select(tmp_path, "best").steps == 10
    assert checkpoint.select(tmp_path, "10").steps == 10
    for which in ("30", "../20", "first"):
        with pytest.raises(CheckpointError, match="expected last, best, or one of 20, 10"):
            checkpoint.select(tmp_path, which)


def test_another_environment_is_refused(tmp_path: Path) -> None:
    _save(tmp_path, 10)
    found = checkpoint.newest(tmp_path)
    found.require(spec())
    with pytest.raises(
        CheckpointError, match=r"belongs to another environment: its action space .*Discrete\(2\), .*\(4\)"
    ):
        found.require(spec(actions=4))
    with pytest.raises(CheckpointError, match="its observation space"):
        found.require(spec(size=5))


def test_no_pickle(tmp_path: Path) -> None:
    _save(tmp_path, 10)
    for path in (tmp_path / "10").iterdir():
        content = path.read_bytes()
        if path.suffix == ".json":
            json.loads(content)
        else:
            header = int.from_bytes(content[:8], "little")
            assert json.loads(content[8 : 8 + header])["policy.w"]["dtype"] == "F32"


def test_weights_that_share_memory_are_saved(tmp_path: Path) -> None:
    """Tied layers, and a view into another tensor."""
    whole = torch.arange(6.0).reshape(2, 3)
    tensors = {"a": whole, "tied": whole, "part": whole[1]}
    checkpoint.save(tmp_path, 10, checkpoint.copies(tensors), {"training": {"steps": 10}}, spec(), None)
    loaded = checkpoint.newest(tmp_path).tensors()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
