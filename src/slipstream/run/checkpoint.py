"""Checkpoints: directories that are whole or absent, checked by hash, without pickle.

    checkpoints/20480/
        tensors.safetensors     weights, optimiser, normalisers
        facts.json              counters and whatever else is not a tensor
        MANIFEST.json           format, step, score, spaces of the env, SHA-256 of the two files and of itself
    checkpoints/replay/         what the replays of the checkpoints are made of, see segments.py

A checkpoint is written into a temporary directory, flushed to the disk and renamed, so a kill or a full disk at any
moment leaves the older ones as they were. The newest is the one with the highest step, whatever the clock says.
"""

from __future__ import annotations

import json
import shutil
import textwrap
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from slipstream.run import segments, spaces
from slipstream.run.files import (
    CheckpointError,
    as_tensors,
    digest,
    flush_directory,
    free,
    listed,
    make_directory,
    read_listed,
    require_space,
    size,
    write_flushed,
    writing,
)
from slipstream.types import EnvSpec

FORMAT = 1
"""Version of the layout; a reader refuses any other."""

_TOLD = 160
"""Characters of a line of PyTorch's that a message shows."""

_TENSORS, _FACTS, _MANIFEST = "tensors.safetensors", "facts.json", "MANIFEST.json"

Json = dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk whose manifest is sound (its files are checked when they are read).

    Attributes:
        path: Its directory.
        steps: Agent decisions when it was taken.
        score: Mean raw return that it is ranked by; None before there was one.
        manifest: The whole manifest.
    """

    path: Path
    steps: int
    score: float | None
    manifest: Json

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, on the CPU.

        Raises:
            CheckpointError: If the file is damaged, or holds something else.
        """
        return as_tensors(self._read(_TENSORS), self.path / _TENSORS)

    def facts(self) -> Json:
        """The JSON part.

        Raises:
            CheckpointError: If the file is damaged.
        """
        return json.loads(self._read(_FACTS))

    def spec(self) -> EnvSpec:
        """What it was trained on, as one slot."""
        return EnvSpec(
            id=self.manifest["env"],
            observation_space=spaces.restore(self.manifest["observation_space"]),
            action_space=spaces.restore(self.manifest["action_space"]),
            num_envs=1,
            frames_per_step=self.manifest["frames_per_step"],
            family=self.manifest["family"],
            frame_stack=self.manifest.get("frame_stack", 1),  # older checkpoints have none
        )

    def require(self, spec: EnvSpec) -> None:
        """Refuses environments with other spaces.

        Raises:
            CheckpointError: If a space differs; it shows both.
        """
        require_spaces(str(self.path), self.spec(), spec)

    @contextmanager
    def fitting(self) -> Generator[None]:
        """Context in which its tensors are loaded into networks, and nothing else is done.

        Raises:
            CheckpointError: If they don't fit; it has the beginning of PyTorch's list.
        """
        try:
            yield
        except RuntimeError as error:
            title, *lines = str(error).splitlines()
            told = "; ".join(textwrap.shorten(line, _TOLD, placeholder=" ...") for line in (lines or [title])[:2])
            raise CheckpointError(
                f"{self.path} does not fit the network; give the torso or policy that the run was trained with: {told}"
            ) from error

    @property
    def segments(self) -> list[Json]:
        """Those that its replay is made of; empty if it has none."""
        return self.manifest.get("replay", [])  # older checkpoints have none

    def replay(self) -> Iterator[dict[str, Tensor]]:
        """The tensors of its segments, one after the other.

        Raises:
            CheckpointError: If one is damaged or missing.
        """
        return segments.read(self.path.parent, self.segments)

    def check(self, *, replay: bool = False) -> None:
        """Reads every file against its hash.

        Args:
            replay: Whether to check the segments of its replay too.

        Raises:
            CheckpointError: If one is damaged or missing.
        """
        for name in (_TENSORS, _FACTS):
            self._read(name)
        for _ in segments.contents(self.path.parent, self.segments if replay else ()):
            pass

    def _read(self, name: str) -> bytes:
        return read_listed(self.path / name, self.manifest["files"][name])


def save(
    root: Path,
    steps: int,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    spec: EnvSpec,
    score: float | None = None,
    replay: Sequence[segments.Listed] = (),
) -> Checkpoint:
    """Writes `root/{steps}` and returns it; where it is there already, whole and of the same replay, it stays.

    Args:
        root: Directory of the checkpoints.
        steps: Agent decisions so far.
        tensors: By name; none shares its memory with another, see `copies`.
        facts: Whatever else there is, for JSON.
        spec: The environments.
        score: What it is ranked by.
        replay: The segments that the replay is made of, which have been written.

    Raises:
        CheckpointError: If the disk is full or can't be written; older checkpoints are kept as they are.
    """
    final = root / str(steps)
    if final.exists():
        with suppress(CheckpointError):
            existing = read(final)
            existing.check(replay=bool(replay))
            if existing.segments == list(replay):
                return existing
        _remove(final)
    files = {
        _TENSORS: safetensors.torch.save(dict(tensors)),
        _FACTS: json.dumps(facts, indent=1).encode(),
    }
    manifest: Json = {
        "format": FORMAT,
        "steps": steps,
        "score": score,
        "env": spec.id,
        "family": spec.family,
        "frames_per_step": spec.frames_per_step,
        "frame_stack": spec.frame_stack,
        "observation_space": spaces.describe(spec.observation_space),
        "action_space": spaces.describe(spec.action_space),
        "files": {name: listed(content) for name, content in files.items()},
        "replay": list(replay),
        "resumes": facts.get("training", {}).get("resumes"),
    }
    files[_MANIFEST] = _seal(manifest)
    try:
        require_space(root, sum(map(len, files.values())))
        _write_directory(root, final, files)
    except OSError as error:
        raise CheckpointError(_write_problem(root, steps, sum(map(len, files.values())), error)) from error
    return read(final)


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, each contiguous and in memory of its own, as parameters need not be (tied weights)."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }


def require_spaces(owner: str, trained: EnvSpec, given: EnvSpec) -> None:
    """Refuses environments whose spaces are not those that `owner` was trained on.

    Raises:
        CheckpointError: If a space differs; it shows both.
    """
    pairs = {
        "observation space": (trained.observation_space, given.observation_space),
        "action space": (trained.action_space, given.action_space),
    }
    for name, (saved, now) in pairs.items():
        if spaces.describe(saved) != spaces.describe(now):
            raise CheckpointError(
                f"{owner} belongs to another environment: its {name} (of {trained.id}) is {saved}, "
                f"that of {given.id} is {now}"
            )


def read(path: Path) -> Checkpoint:
    """The checkpoint in `path`, its manifest verified.

    Raises:
        CheckpointError: If there is no sound manifest of a known format, or it is that of another step.
    """
    try:
        text = (path / _MANIFEST).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} has no {_MANIFEST} that can be read: {error.strerror}") from error
    try:
        manifest = json.loads(text)
        sound = isinstance(manifest, dict) and _seal(manifest) == text
    except (ValueError, RecursionError):
        manifest, sound = {}, False
    if not sound:
        raise CheckpointError(f"{path / _MANIFEST} is damaged")
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest['format']}, this version of Slipstream reads format {FORMAT}"
        )
    if path.name != str(manifest["steps"]):
        raise CheckpointError(f"{path} was copied or renamed: it is the checkpoint of step {manifest['steps']}")
    return Checkpoint(path, manifest["steps"], manifest["score"], manifest)


def newest(root: Path, *, replay: bool = False) -> Checkpoint:
    """The newest whole checkpoint; a damaged newer one is passed over with a warning, never in silence.

    Args:
        root: Directory of the checkpoints.
        replay: Whether its replay must be whole too.

    Raises:
        CheckpointError: If there is none; it says how to do without the replay, if that is all that is missing.
    """
    problems: list[str] = []
    for path in _paths(root):
        try:
            found = read(path)
            found.check(replay=replay)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            warnings.warn(f"{problem}; falling back to the checkpoint at step {found.steps}", stacklevel=2)
        return found
    way_on = f"To train anew with the same settings: slipstream train --config {root.parent}"
    if replay and any(map(_whole, _paths(root))):
        way_on = f"To go on with an empty replay: slipstream resume {root.parent} --log.no-save-replay"
    raise CheckpointError(f"no whole checkpoint in {root}: {'; '.join(problems) or 'none was written'}. {way_on}")


def set_aside(root: Path, steps: int) -> None:
    """Renames checkpoints after `steps`, which are damaged, since `newest` passed them over: they don't count any more.

    Raises:
        CheckpointError: If that is not possible.
    """
    for path in _paths(root):
        if int(path.name) > steps:
            with writing(path):
                name = path.with_name(f"damaged-{path.name}")
                others = (path.with_name(f"{name.name}-{number}") for number in count(2))  # of the same step, earlier
                path.rename(next(each for each in chain([name], others) if not each.exists()))


def select(root: Path, which: str) -> Checkpoint:
    """The checkpoint called `last`, `best` or by its number of steps.

    Raises:
        CheckpointError: If it does not exist or is damaged.
    """
    if which in ("last", "best"):
        return newest(root) if which == "last" else best(root)
    if not (which.isdecimal() and (root / which).is_dir()):
        steps = ", ".join(path.name for path in _paths(root)) or "none"
        raise CheckpointError(f"no checkpoint {which!r} in {root}: expected last, best, or one of {steps}")
    found = read(root / which)
    found.check()
    return found


def best(root: Path) -> Checkpoint:
    """The whole checkpoint with the highest score, the newer of equals; the newest when none has a score.

    Raises:
        CheckpointError: If there is none.
    """
    for found in sorted(_sound(root), key=_rank, reverse=True):
        if found.score is not None:
            try:
                found.check()
            except CheckpointError as error:
                warnings.warn(f"{error}; falling back to the next best checkpoint", stacklevel=2)
                continue
            return found
    return newest(root)


def prune(root: Path, keep_last: int, keep_every: int = 0) -> None:
    """Removes all but the last `keep_last` checkpoints, the best, and the first at or after every `keep_every` steps.

    Those whose manifests are damaged do not count and stay. Of the others than the last only what they need to be
    looked at is kept: a replay goes with the last checkpoints.

    Raises:
        CheckpointError: If one can't be removed.
    """
    found = list(_sound(root))
    keep = {item.path for item in found[:keep_last]}
    keep |= {item.path for item in sorted(found, key=_rank, reverse=True)[:1] if item.score is not None}
    if keep_every:
        first = {item.steps // keep_every: item.path for item in found}  # the newest come first
        keep |= {path for number, path in first.items() if number}
    for item in found:
        if item.path not in keep:
            _remove(item.path)
    try:
        segments.sweep(root, [segment for item in found[:keep_last] for segment in item.segments])
    except OSError as error:
        raise CheckpointError(f"cannot remove old segments in {root}: {error.strerror or error}") from error


def _rank(item: Checkpoint) -> tuple[float, int]:
    return (float("-inf") if item.score is None else item.score, item.steps)


def _paths(root: Path) -> list[Path]:
    """Checkpoint directories, newest first by step."""
    found = [path for path in root.iterdir() if path.name.isdecimal()] if root.is_dir() else []
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def _sound(root: Path) -> Iterable[Checkpoint]:
    for path in _paths(root):
        try:
            yield read(path)
        except CheckpointError:
            continue


def _whole(path: Path) -> bool:
    """Whether it can be looked at, whatever became of its replay."""
    try:
        read(path).check()
    except CheckpointError:
        return False
    return True


def _seal(manifest: Json) -> bytes:
    """The manifest's text, which carries the hash of its own content."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    sealed = digest(json.dumps(content, sort_keys=True).encode())
    return json.dumps(content | {"sha256": sealed}, indent=1).encode()


def _write_directory(root: Path, final: Path, files: Mapping[str, bytes]) -> None:
    """Writes files so that `final` appears whole or not at all, and is on the disk when this returns."""
    make_directory(root)
    for stale in [*root.glob(".writing-*"), *root.glob(".removing-*")]:
        shutil.rmtree(stale)
    temporary = root / f".writing-{final.name}"
    try:
        temporary.mkdir()
        for name, content in files.items():
            write_flushed(temporary / name, content)
        flush_directory(temporary)
        temporary.rename(final)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    flush_directory(root)


def _remove(path: Path) -> None:
    """Removes a checkpoint, which is whole or gone at any moment; what a kill leaves of it goes with the next save."""
    try:
        doomed = path.rename(path.with_name(f".removing-{path.name}"))
        shutil.rmtree(doomed)
    except OSError as error:
        raise CheckpointError(f"cannot remove the checkpoint {path}: {error.strerror or error}") from error


def _write_problem(root: Path, steps: int, needed: int, error: OSError) -> str:
    kept = _paths(root)
    older = f"the checkpoint at step {kept[0].name} is kept" if kept else "there is no older checkpoint"
    return (
        f"cannot write the checkpoint at step {steps} in {root}: {error.strerror or error} "
        f"({size(needed)} needed, {free(root)}); {older}"
    )
