"""The run directory: everything that a run leaves behind, and nothing of any other run.

It is `runs/{env}__{algo}__{seed}__{stamp}/`:

    config.yaml     the whole configuration; `slipstream train --config` takes it
    command.txt     what was typed
    env.json        versions, hardware, git
    error.txt       the traceback of the error that ended the run, if one did
    stacks.txt      where all threads were when there was no update for a while
    metrics.jsonl   one JSON object per row, keyed by step
    tensorboard/    the same for TensorBoard
    checkpoints/    see checkpoint.py
    faults/         what gradients that were not finite came from
    videos/         what `slipstream watch` records
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import safetensors.torch
import yaml
from torch import Tensor

from slipstream.run.checkpoint import copies
from slipstream.run.config import Config, from_plain
from slipstream.run.files import flush_directory, make_directory, replace_flushed, write_flushed, writing
from slipstream.run.machine import surroundings
from slipstream.run.settings import ConfigError, plain

if sys.platform != "win32":
    import fcntl


_STAMP = re.compile(r"__(\d{8}-\d{6})(?:-(\d+))?$")

_KEPT = 10
"""Files of `faults/`, so that they don't fill the disk."""


def latest(root: Path) -> Path:
    """The run in `root` that was started last, by the time in its name.

    Raises:
        ConfigError: If there is none, or it was killed before it was one: an older run is not what was meant.
    """
    started = _newest(path for path in root.glob("*") if path.is_dir())
    if started is None:
        raise ConfigError(f"there is no run in {root}; start one: slipstream train ALGO --env ENV --log.dir {root}")
    if not (started / "config.yaml").is_file():
        older = _newest(_runs(root))
        removed = f"; without that directory, the newest run is {older}" if older else ""
        raise ConfigError(
            f"{started}, started last, has no config.yaml to go on with: it was killed before it wrote one, or the "
            f"file was lost. Start it anew{removed}"
        )
    return started


def _runs(root: Path) -> Iterator[Path]:
    return (file.parent for file in root.glob("*/config.yaml"))


def _newest(paths: Iterable[Path]) -> Path | None:
    """The one with the latest stamp in its name; agents that were saved have none."""
    stamped = ((_STAMP.search(path.name), path) for path in paths)
    return max(((stamp[1], int(stamp[2] or 0), path) for stamp, path in stamped if stamp), default=(None,))[-1]


def _run_nearby(path: Path) -> str:
    """Which run may be meant by a directory of runs, or by one of checkpoints in a run, as the end of a sentence."""
    if inside := _newest(_runs(path)):
        return f"; the newest run in it is {inside}"
    above = [place.parent for place in (path, *path.parents) if place.name == "checkpoints"]
    return f"; it belongs to the run {above[0]}" if above and (above[0] / "config.yaml").is_file() else ""


class RunDirectory:
    """Names and reads the files of one run.

    Args:
        path: The run directory, which must exist.

    Raises:
        ConfigError: If there is no run in `path`.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise ConfigError(f"{path} {'is a file, not a run directory' if path.exists() else 'does not exist'}")
        if not (path / "config.yaml").is_file():
            raise ConfigError(f"{path} is not a run directory: it has no config.yaml{_run_nearby(path)}")
        self.path = path

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    @property
    def error(self) -> Path:
        """The traceback of the last attempt, if it failed."""
        return self.path / "error.txt"

    @property
    def stacks(self) -> Path:
        """Where threads were when the run last stood still."""
        return self.path / "stacks.txt"

    @property
    def metrics(self) -> Path:
        """The table of metrics."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Where TensorBoard's events are."""
        return self.path / "tensorboard"

    def config(self) -> Config:
        """The configuration of the run.

        Raises:
            ConfigError: If the file does not hold a valid one.
        """
        file = self.path / "config.yaml"
        values = read_yaml(file)
        try:
            return from_plain(values)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error

    def surroundings(self) -> dict[str, Any]:
        """What it was started with: versions, hardware; empty if nothing can be read of that."""
        try:
            found = json.loads((self.path / "env.json").read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write_config(self, config: Config) -> None:
        """Replaces config.yaml, whole or not at all.

        Raises:
            CheckpointError: If it can't be written.
        """
        with writing(self.path / "config.yaml"):
            replace_flushed(self.path / "config.yaml", to_yaml(config).encode())

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        """Writes `tensors` to `faults/`, unless there are ten already; returns a sentence that says where they are."""
        folder = self.path / "faults"
        kept = len(list(folder.glob("*.safetensors")))
        if kept >= _KEPT:
            return f"what the gradient came from was not kept: {folder} has {kept} files already"
        place = folder / f"{name}-{kept}.safetensors"
        try:
            folder.mkdir(exist_ok=True)
            place.write_bytes(safetensors.torch.save(copies(tensors)))
        except (OSError, ValueError, RuntimeError) as error:
            return f"what the gradient came from can't be written to {place}: {error}"
        return f"what the gradient came from: {place}"

    def lock(self) -> RunLock:
        """Keeps a second trainer out of this directory for as long as the lock is held."""
        return RunLock(self.path)


class RunLock:
    """Context manager: an advisory lock that dies with its process, so a kill leaves nothing stale.

    Raises:
        ConfigError: On entry, if another process is training in this directory, or something is written in it yet, or a
            file in it is a link to one that may lie elsewhere, which training would write to.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def __enter__(self) -> RunLock:
        for path in self._path.rglob("*"):
            if path.is_symlink():
                raise ConfigError(f"{path} is a symbolic link, and training writes to it: put what it stands for there")
        self._file = (self._path / ".lock").open("w")
        if sys.platform != "win32":
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._file.close()
                raise ConfigError(
                    f"another process is training in {self._path}, or the last checkpoint of a run that was stopped is "
                    "still being written"
                ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def outlast(self, work: Future[None] | None) -> None:
        """Has the lock be held until some work is done, if there is any, however early the context ends."""
        if work is not None and self._file is not None:
            copy = os.dup(self._file.fileno())  # the lock is gone when both are closed
            work.add_done_callback(lambda done: os.close(copy))


def create(config: Config, command: Sequence[str]) -> RunDirectory:
    """Makes the directory of a new run, which never is one that exists; it is on the disk when this returns.

    Raises:
        ConfigError: If it can't be written; nothing is left of it then.
    """
    root = Path(config.log.dir)
    try:
        path = _new_directory(root, config)
    except OSError as error:
        raise ConfigError(_no_place(root, error)) from error
    try:
        write_flushed(path / "config.yaml", to_yaml(config).encode())
        write_flushed(path / "command.txt", f"{shlex.join(command)}\n".encode())
        write_flushed(path / "env.json", f"{json.dumps(surroundings(), indent=1)}\n".encode())
        flush_directory(path)
        flush_directory(root)
    except OSError as error:
        shutil.rmtree(path, ignore_errors=True)
        raise ConfigError(_no_place(root, error)) from error
    return RunDirectory(path)


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML."""
    return yaml.safe_dump(plain(config), sort_keys=False, width=120)


_MERGE = "tag:yaml.org,2002:merge"
"""Of the key `<<`, which puts another mapping's keys under those of its own."""


class _Once(yaml.SafeLoader):
    """Refuses a mapping with the same key twice, of which YAML would take the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As `SafeLoader`."""
        names: list[Any] = []
        for key, _ in node.value:
            if key.tag == _MERGE:
                continue
            name = self.construct_object(key, deep=True)
            if name in names:
                raise yaml.constructor.ConstructorError(None, None, f"{name} is there twice", key.start_mark)
            names.append(name)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping from a YAML file.

    Raises:
        ConfigError: If the file is missing, is not text, holds no mapping, or has a key twice.
    """
    try:
        loader = _Once(path.read_text())
        try:
            content = loader.get_single_data()
        finally:
            loader.dispose()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected settings (name: value), got {type(content).__name__}")
    return content


def merge_yaml(path: Path, changes: Mapping[str, Any]) -> None:
    """Puts top-level settings into a YAML file, which keeps its others; the file is made if there is none.

    Raises:
        ConfigError: If the file holds no mapping.
        OSError: If it can't be written; it is then as it was.
    """
    content = read_yaml(path) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_flushed(path, yaml.safe_dump({**content, **changes}, sort_keys=False, width=120).encode())


def _no_place(root: Path, error: OSError) -> str:
    """Why there can be no run in `root`: what stands in its way, or what the system says."""
    files = [path for path in (root, *root.parents) if path.exists() and not path.is_dir()]
    reason = f"{files[0]} is a file" if files else error.strerror or str(error)
    return f"log.dir: no run can be written in {root}: {reason}; choose another place with --log.dir DIRECTORY"


def _new_directory(root: Path, config: Config) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = re.sub(r"[^\w.+-]+", "-", config.env)
    make_directory(root)
    base = f"{name}__{config.algo.name}__{config.seed}__{stamp}"
    for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
        try:
            (path := root / f"{base}{suffix}").mkdir(mode=0o700)
        except FileExistsError:
            continue
        return path
    raise FileExistsError(f"{root / base} and its 998 successors exist")
