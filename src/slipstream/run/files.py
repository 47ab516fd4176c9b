"""Files that are whole or absent: hashed, flushed to the disk, renamed into place."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, is damaged, or belongs to something else."""


@contextmanager
def writing(place: Path) -> Generator[None]:
    """Context in which files below `place` are written.

    Raises:
        CheckpointError: If that is not possible; it has the reason and the space that is left.
    """
    try:
        yield
    except OSError as error:
        reason = str(error.strerror or error).partition("\n")[0]
        raise CheckpointError(f"cannot write {place}: {reason} ({free(place)})") from error


def digest(content: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(content).hexdigest()


def listed(content: bytes) -> dict[str, Any]:
    """Size and hash of a file's content, as manifests list them."""
    return {"bytes": len(content), "sha256": digest(content)}


def read_listed(path: Path, expected: Mapping[str, Any]) -> bytes:
    """The content of a file that a manifest lists.

    Raises:
        CheckpointError: If it is missing or damaged.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # the latter of a NUL in its name
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path} cannot be read: {reason}") from error
    if len(content) != expected["bytes"] or digest(content) != expected["sha256"]:
        raise CheckpointError(f"{path} is damaged: {len(content)} bytes that do not match its hash")
    return content


def as_tensors(content: bytes, path: Path) -> dict[str, Tensor]:
    """What a file of tensors holds; nothing in it can be code.

    Raises:
        CheckpointError: If it is something else, such as a pickle.
    """
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise CheckpointError(f"{path} holds no tensors: {error}") from error


def write_flushed(path: Path, content: bytes) -> None:
    """Writes a file and has it on the disk when this returns; its name may be lost until its directory is flushed."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def flush(path: Path) -> None:
    """Has what was written to a file so far on the disk when this returns."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def replace_flushed(path: Path, content: bytes) -> None:
    """Puts a file in another's place, whole or not at all, and has it and its name on the disk when this returns."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        write_flushed(temporary, content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    flush_directory(path.parent)


def make_directory(path: Path) -> None:
    """Makes a directory and those above it, where they are missing, and has their names on the disk at its return."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        flush_directory(path.parent)


def flush_directory(path: Path) -> None:
    """Has the names in a directory on the disk when this returns."""
    if os.name == "nt":  # Windows can't open a directory; its rename is journaled.
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def space(place: Path) -> int:
    """Bytes that are left on the disk that `place` is on, or would be on."""
    there = next(path for path in (place, *place.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def require_space(place: Path, needed: int) -> None:
    """Refuses to begin with what there is no room for.

    Raises:
        OSError: ENOSPC, if less than `needed` bytes are left.
    """
    if space(place) < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def free(place: Path) -> str:
    """What is left there, in words."""
    return f"{size(space(place))} free"


def size(count: int) -> str:
    """Bytes in words."""
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"


def discard(*descriptors: int) -> None:
    """Has what is written to open descriptors from now on go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
