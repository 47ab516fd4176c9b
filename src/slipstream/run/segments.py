"""What a replay has taken in, on disk: files that are written once and shared by the checkpoints that need them.

    checkpoints/replay/5f3a....safetensors      rows that came between two checkpoints, named by their hash

A checkpoint's manifest lists those that its replay is made of, oldest first. A file goes when no checkpoint that a run
can go on from lists it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from slipstream.replay.rows import needed
from slipstream.replay.sharded import ShardLostError
from slipstream.replay.windows import Windows
from slipstream.run.files import (
    CheckpointError,
    as_tensors,
    flush_directory,
    listed,
    make_directory,
    read_listed,
    require_space,
    write_flushed,
    writing,
)

FOLDER = "replay"
"""Of the segments, beside the checkpoints."""

Listed = Mapping[str, Any]
"""A segment as manifests list it: its file's name, size and hash, and for each slot the row after its last."""


class ReplayLostError(CheckpointError):
    """Some of its rows are gone with their shard; after the next slab it can be written again."""


class Segments:
    """Saves a replay piece by piece.

    Args:
        root: Directory of the checkpoints.
        windows: The replay.
        before: What the checkpoint that a run goes on from lists.
    """

    def __init__(self, root: Path, windows: Windows, before: Sequence[Listed] = ()) -> None:
        self._folder, self._windows = root / FOLDER, windows
        self._listed = list(before)
        self._mark: Tensor | None = windows.rows.state()["head"] if before else None

    @property
    def most(self) -> int:
        """Bytes that the segments of a full replay take, about."""
        return self._windows.rows.bytes

    def begin(self) -> tuple[dict[str, Tensor], Callable[[], list[Listed]]]:
        """Copies the rows that have come since the last time; returns the replay's small state, and what finishes it.

        That writes what was copied and returns all segments of the replay; it may run in another thread, and must have
        ended before the next `begin`. Where the rows make several segments, which is where checkpoints are far apart,
        all but the last are written at once, so that there are never more than three in memory.

        Raises:
            CheckpointError: If they can't be written; the next time writes what is missing. `finish` raises it too.
        """
        state = self._windows.state()
        kept = [segment for segment in self._listed if needed(torch.tensor(segment["end"]), state["oldest"])]
        last: Mapping[str, Tensor] | None = None
        try:
            for tensors in self._windows.since(self._mark):
                if last is not None:
                    kept.append(self._write(last))
                last = tensors
        except ShardLostError as error:
            raise ReplayLostError(f"cannot write the replay: {error}") from error

        def finish() -> list[Listed]:
            if last is not None:
                kept.append(self._write(last))
            self._listed, self._mark = kept, state["head"]
            return kept

        return state, finish

    def _write(self, tensors: Mapping[str, Tensor]) -> Listed:
        with writing(self._folder):
            make_directory(self._folder)
            entry = self._write_file(tensors)
            flush_directory(self._folder)
        return entry

    def _write_file(self, tensors: Mapping[str, Tensor]) -> Listed:
        content = safetensors.torch.save(dict(tensors))
        entry = listed(content)
        name = f"{entry['sha256']}.safetensors"
        temporary = self._folder / f".writing-{name}"
        require_space(self._folder, len(content))
        try:
            write_flushed(temporary, content)
            temporary.rename(self._folder / name)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        return {"name": name, **entry, "end": tensors["end"].tolist()}


def read(root: Path, segments: Iterable[Listed]) -> Iterator[dict[str, Tensor]]:
    """The segments' tensors, one after the other.

    Raises:
        CheckpointError: If a file is missing or damaged, or holds something else.
    """
    return (as_tensors(content, root / FOLDER) for content in contents(root, segments))


def contents(root: Path, segments: Iterable[Listed]) -> Iterator[bytes]:
    """The segments' files, checked against their hashes; errors as `read`."""
    return (read_listed(root / FOLDER / Path(segment["name"]).name, segment) for segment in segments)


def sweep(root: Path, keep: Iterable[Listed]) -> None:
    """Removes all segments but those to keep, and what a kill has left of others.

    Raises:
        OSError: If one can't be removed.
    """
    names = {segment["name"] for segment in keep}
    for path in (root / FOLDER).glob("*") if (root / FOLDER).is_dir() else ():
        if path.name not in names:
            path.unlink()
