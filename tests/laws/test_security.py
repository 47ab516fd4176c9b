"""A run directory that somebody else made may fail to load, but runs no code and touches nothing outside of it."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import stat
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import slipstream
from slipstream.run import checkpoint
from slipstream.run.directory import RunDirectory, read_yaml
from slipstream.run.files import CheckpointError, digest, listed
from slipstream.run.metrics import read
from slipstream.run.remains import timeless
from slipstream.run.settings import ConfigError
from tests.run.runs import resume, train

FIXTURE = Path(__file__).parents[1] / "fixtures" / "dqn-2026-11-28"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory whose files the test may forge."""
    path = tmp_path / "runs" / "one"
    shutil.copytree(FIXTURE, path)
    return path


def forge(run: Path, name: str, content: bytes, **changes: Any) -> None:
    """Puts a file into the checkpoint under the manifest's own seal."""
    (folder,) = run.glob("checkpoints/[0-9]*")
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "MANIFEST.json").read_text()) | changes
    del manifest["sha256"]
    manifest["files"][name] = listed(content)
    sealed = digest(json.dumps(manifest, sort_keys=True).encode())
    (folder / "MANIFEST.json").write_text(json.dumps(manifest | {"sha256": sealed}, indent=1))


class Bomb:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


def pickles(place: Path) -> dict[str, bytes]:
    """Files in which PyTorch would look for code."""
    bomb, legacy, zipped = Bomb(place), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(bomb))
        archive.writestr("archive/version", "3\n")
    torch.save({"policy.w": bomb}, legacy, _use_new_zipfile_serialization=False)
    return {"pickle": pickle.dumps(bomb), "zip": zipped.getvalue(), "legacy": legacy.getvalue()}


@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy"])
def test_a_pickle_is_not_read(run: Path, tmp_path: Path, kind: str) -> None:
    place = tmp_path / "done"
    content = pickles(place)[kind]
    forge(run, "tensors.safetensors", content)
    for use in (slipstream.load, lambda path: slipstream.resume(path, 400, quiet=True)):
        with pytest.raises(CheckpointError, match=r"tensors\.safetensors holds no tensors"):
            use(run)
    assert not place.exists()
    pickle.loads(pickles(place)["pickle"])
    assert place.exists(), "it would have worked"


@pytest.mark.parametrize("tag", ["object/apply:os.mkdir", "object/new:os.mkdir", "name:os.mkdir", "module:os"])
def test_a_configuration_runs_nothing(run: Path, tmp_path: Path, tag: str) -> None:
    (run / "config.yaml").write_text(f"env: !!python/{tag} [{tmp_path / 'done'}]\n")
    with pytest.raises(ConfigError, match=r"config\.yaml is not valid YAML: could not determine a constructor"):
        slipstream.load(run)
    assert not (tmp_path / "done").exists()


def test_a_key_that_is_there_twice_is_refused(run: Path) -> None:
    file = run / "config.yaml"
    file.write_text(f"{file.read_text()}seed: 4\n")
    with pytest.raises(ConfigError, match=r"config\.yaml is not valid YAML: seed is there twice in .* line \d+"):
        slipstream.load(run)


def test_keys_may_come_from_another_mapping(tmp_path: Path) -> None:
    file = tmp_path / "part.yaml"
    file.write_text("x: &small {num_envs: 4, lanes: 2}\ny: {<<: *small, lanes: 1}\n")
    assert read_yaml(file)["y"] == {"num_envs": 4, "lanes": 1}


def safetensors(header: object, data: bytes = b"abcd", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(*shape: int, kind: str = "F32", data: tuple[int, int] = (0, 4)) -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": data}


BOMBS = {
    "length of the header": safetensors({}, length=2**60),
    "cut header": safetensors({"a": entry(1)}, b"", length=4_000),
    "negative shape": safetensors({"a": entry(-1)}),
    "huge shape": safetensors({"a": entry(2**40)}),
    "product beyond 64 bits": safetensors({"a": entry(2**32, 2**32, 2**32)}),
    "offsets beyond the end": safetensors({"a": entry(2, data=(0, 8))}),
    "offsets that overlap": safetensors({"a": entry(1), "b": entry(1)}),
    "offsets that run back": safetensors({"a": entry(1, data=(4, 0))}),
    "unknown type": safetensors({"a": entry(1, kind="Q8")}),
    "depth": safetensors(b"[" * 100_000),
    "the same name twice": safetensors(b'{"a":%b,"a":%b}' % ((json.dumps(entry(1)).encode(),) * 2)),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_header_that_promises_what_is_not_there(run: Path, bomb: str) -> None:
    forge(run, "tensors.safetensors", BOMBS[bomb])
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"holds no tensors|does not fit the network"):
        slipstream.load(run)
    assert time.monotonic() - start < 1.0


def test_a_manifest_without_a_bottom(run: Path) -> None:
    (folder,) = run.glob("checkpoints/[0-9]*")
    (folder / "MANIFEST.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json is damaged"):
        slipstream.load(run)


LINKS = [
    "config.yaml.tmp",
    "metrics.jsonl",
    "metrics.tmp",
    ".lock",
    "error.txt",
    "checkpoints/replay",
    "checkpoints/400",
]


@pytest.mark.parametrize("link", LINKS)
def test_training_writes_through_no_link(run: Path, tmp_path: Path, link: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("mine")
    target = outside if "checkpoints" in link else outside / "precious"
    if (run / link).is_dir():
        shutil.rmtree(run / link)
    (run / link).unlink(missing_ok=True)
    (run / link).symlink_to(target)
    with pytest.raises(ConfigError, match=rf"{re.escape(link)} is a symbolic link"):
        resume(run, 400)
    assert [path.name for path in outside.iterdir()] == ["precious"]
    assert (outside / "precious").read_text() == "mine"


def test_a_run_directory_may_be_a_link_itself(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run)
    assert resume(tmp_path / "link", 260).progress.steps >= 260


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "a\0b"])
def test_names_of_files_stay_in_their_folder(run: Path, name: str) -> None:
    forge(run, "facts.json", b"{}", replay=[{"name": name, "bytes": 1, "sha256": "", "end": [0]}])
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        checkpoint.newest(run / "checkpoints", replay=True)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        slipstream.load(run, name)


def test_an_environments_name_makes_one_directory(tmp_path: Path) -> None:
    inside = tmp_path / "runs"
    run = train(inside, env="tests.faulty:Once-v0", env_options__kwargs={"path": str(tmp_path)}).run
    assert run.path.parent == inside
    assert re.fullmatch(r"[\w.+-]+", run.path.name)


def test_nobody_else_may_look_and_no_secret_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "do-not-tell-anyone")
    run = train(tmp_path, total_steps=100, log__tensorboard=True).run
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o700
    files = [path for path in run.path.rglob("*") if path.is_file()]
    assert len(files) >= 8
    assert not [path for path in files if b"do-not-tell-anyone" in path.read_bytes()]


def test_a_wall_clock_that_jumps_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"log__checkpoint_every": 50, "log__metrics_every": 20, "placement__env_workers": 1}
    runs = [train(tmp_path / "steady", **settings).run]
    original, calls = time.time, 0

    def jumping() -> float:
        nonlocal calls
        calls += 1
        return original() + 3_600.0 * (-1) ** calls

    monkeypatch.setattr(time, "time", jumping)
    runs.append(train(tmp_path / "jumping", log__tensorboard=True, **settings).run)
    assert calls, "TensorBoard asks for it"
    one, other = ([timeless(row) for row in read(run.metrics)] for run in runs)
    assert one == other
    seconds = [row["time/seconds"] for row in read(runs[1].metrics)]
    assert seconds == sorted(seconds)
    assert 0.0 < seconds[-1] < 600.0
    assert RunDirectory(runs[1].path).config().total_steps == 200
