"""Metrics on disk: one JSON object per row in metrics.jsonl, keyed by step, and the same numbers for TensorBoard.

Names, units and meanings are in docs/metrics.md. The clock enters into those of `CLOCK` and nothing else: two runs with
one seed have the same rows but for these (under the schedule `async`, which is not deterministic, all differ).
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slipstream.ranges import crossed
from slipstream.run.files import replace_flushed, writing
from slipstream.run.machine import cores
from slipstream.run.progress import Mark, Meter, Progress, spread
from slipstream.types import Report

CLOCK = ("time/", "wait/", "limit/", "faults/", "cluster/")
"""Prefixes of what depends on the machine; `time/` has the counters as well, which do not."""

_GREATEST = (
    "/max",
    "_max",
    "/dropped_steps",
    "/gradient_steps",
    "/restarts",
    "/learner_restarts",
    "/lost_shards",
    "/replaced_windows",
    "/skipped_gradients",
)
"""Endings of metrics of which a row has the greatest value (of counters the last), as of `cluster/*` but its gauges."""

_GAUGES = ("cluster/actors", "cluster/store_used_megabytes")
"""Of `cluster/*` those that go up and down."""

_SUMMED = ("/mended_rows",)
"""Endings of metrics of which a row has the sum; of others it has the mean."""


class Metrics:
    """Observer that writes rows at fixed distances in steps, so that they don't depend on the machine's speed.

    A full disk does not end the run: rows wait in memory until they can be written.

    Args:
        path: The metrics.jsonl to append to.
        events: Directory of TensorBoard's events, or None for none.
        progress: The run's counters.
        every: Steps between two rows.
    """

    def __init__(self, path: Path, events: Path | None, progress: Progress, every: int) -> None:
        self._progress, self._every = progress, every
        self._meter = Meter(progress, cores())
        self._table = Table(path)
        self._curves = Curves(events, progress.steps) if events else None
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._last: Mark | None = None

    def __call__(self, report: Report) -> None:
        """Adds one update and writes a row if one is due."""
        for name, value in report.metrics.items():
            number = torch.as_tensor(value, dtype=torch.float64).detach()  # exact for counters above 2**24
            known = self._sums.get(name)
            if known is None:
                self._sums[name] = number
            else:
                self._sums[name] = torch.maximum(known, number) if _greatest(name) else known + number
            self._counts[name] = self._counts.get(name, 0) + 1
        progress = self._progress
        due = crossed(progress.before, progress.steps, self._every)
        if due or progress.finished or progress.just_evaluated:
            row = self._row()
            self._table.append(row)
            if self._curves:
                self._curves.append(row)
            self._sums, self._counts = {}, {}

    def close(self) -> None:
        """Writes what still waits.

        Raises:
            OSError: If that is not possible.
        """
        self._table.close()
        if self._curves:
            self._curves.close()

    def state(self) -> dict[str, Any]:
        """The row in the making."""
        return {"sums": {name: float(value) for name, value in self._sums.items()}, "counts": dict(self._counts)}

    def load(self, facts: Mapping[str, Any]) -> None:
        """Continues the row that `state` described."""
        counts, sums = facts.get("counts", {}), facts["sums"]
        self._sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in sums.items()}
        # The oldest checkpoints have one count for all.
        self._counts = {name: int(counts[name] if counts else facts["updates"]) for name in sums}

    def _row(self) -> dict[str, float | int]:
        progress, now = self._progress, self._progress.mark()
        last = self._last or progress.began
        seconds = max(now.seconds - last.seconds, 1e-9)
        speed = (now.steps - last.steps) / seconds
        row: dict[str, float | int] = {
            "time/steps": progress.steps,
            "time/frames": progress.steps * progress.frames_per_step,
            "time/updates": progress.updates,
            "time/episodes": progress.episodes,
            "time/seconds": now.seconds,
            "time/steps_per_second": speed,
            "time/frames_per_second": speed * progress.frames_per_step,
        }
        if budget := self._meter.read():
            row["limit/cpu_seconds_per_step"] = budget.cpu_seconds_per_step
            row |= {"limit/steps_per_second": budget.limit, "limit/efficiency": budget.efficiency}
        for stage, total in now.stages.items():
            row[f"time/{stage}_seconds"] = total - last.stages.get(stage, 0.0)
        if progress.returns:
            returns = spread(progress.returns)
            row |= {"rollout/ep_rew_mean": returns.mean, "rollout/ep_rew_std": returns.std}
            row["rollout/ep_len_mean"] = spread(progress.lengths).mean
        if progress.shaped:
            row["rollout/ep_shaped_rew_mean"] = spread(progress.shaped).mean
        for name, value in self._sums.items():
            row[name] = float(value) if _greatest(name) or name.endswith(_SUMMED) else float(value) / self._counts[name]
        if progress.just_evaluated:
            row |= progress.evaluation
        self._last = now
        return row


class Table:
    """Appends rows to a JSON-lines file; what can't be written now is written later, and no row is ever torn.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._waiting: list[bytes] = []

    def append(self, row: Mapping[str, float | int]) -> None:
        """Writes one row; not-a-number and infinity become null, since JSON has neither."""
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self._waiting.append(json.dumps(finite).encode() + b"\n")
        warned = len(self._waiting) > 1
        try:
            self._flush()
        except OSError as error:
            if not warned:
                warnings.warn(f"{self._path}: {error.strerror or error}; rows wait in memory", stacklevel=2)

    def close(self) -> None:
        """Writes waiting rows and closes the file.

        Raises:
            OSError: If rows can't be written.
        """
        if self._file.closed:
            return
        try:
            self._flush()
        finally:
            self._file.close()

    def _flush(self) -> None:
        while self._waiting:
            row, start = self._waiting[0], self._file.seek(0, os.SEEK_END)
            try:
                written = self._file.write(row)
            except OSError:
                self._file.truncate(start)
                raise
            if written != len(row):  # A disk that fills up in the middle of a row takes a part of it.
                self._file.truncate(start)
                raise OSError(28, "no space left on the disk")
            self._waiting.pop(0)


def _greatest(name: str) -> bool:
    return name.endswith(_GREATEST) or (name.startswith("cluster/") and name not in _GAUGES)


class Curves:
    """TensorBoard events. They repeat metrics.jsonl, so when they can't be written they stop with a warning.

    Args:
        directory: Where the events go.
        steps: Steps so far; later events of an earlier part of the run are hidden.
    """

    def __init__(self, directory: Path, steps: int) -> None:
        # Imported here because TensorBoard takes longer to import than a short run to train.
        from torch.utils.tensorboard import SummaryWriter

        self._writer: SummaryWriter | None = SummaryWriter(str(directory), purge_step=steps + 1 if steps else None)

    def append(self, row: Mapping[str, float | int]) -> None:
        """Writes one row; the x axis is steps."""
        if self._writer is None:
            return
        try:
            for name, value in row.items():
                self._writer.add_scalar(name, value, int(row["time/steps"]))
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Flushes and closes."""
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._writer = None
        warnings.warn(f"TensorBoard events stop here ({error}); metrics.jsonl goes on", stacklevel=3)


def read(path: Path) -> list[dict[str, Any]]:
    """All rows of a metrics.jsonl; an unfinished last line (after a power cut) is left out.

    Another line that is no row, since the disk has damaged it, is passed over with a warning.
    """
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        if (row := _parsed(line)) is not None:
            rows.append(row)
        elif line:
            warnings.warn(f"{path}, line {number} is damaged, and passed over", stacklevel=2)
    return rows


def truncate(path: Path, steps: int) -> None:
    """Drops rows after `steps`: a resumed run will write them again.

    Raises:
        CheckpointError: If that is not possible; the file is then as it was.
    """
    if not path.is_file():
        return
    with writing(path):
        kept = [row for row in read(path) if row["time/steps"] <= steps]
        replace_flushed(path, "".join(json.dumps(row) + "\n" for row in kept).encode())


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The row that a line holds; None if it holds something else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("time/steps"), int) else None
