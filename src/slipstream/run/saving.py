"""Saving while training goes on: the state is copied between two updates, and a thread brings it to the disk.

    training thread                     thread of the checkpoint
    waits for the one before
    copies state and new rows       ->  hashes, writes, flushes, renames; removes old checkpoints
    goes on                             ends

Who waits for whom: the next checkpoint, and the end of the run, wait for the one before. A kill at any moment leaves
the older ones. What can't be written is told when it is waited for.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from slipstream.ranges import crossed
from slipstream.run import checkpoint
from slipstream.run.checkpoint import copies
from slipstream.run.config import Log
from slipstream.run.directory import RunDirectory
from slipstream.run.files import CheckpointError, free, size, space
from slipstream.run.progress import Progress
from slipstream.run.segments import Segments
from slipstream.types import EnvSpec, Report

_FAILURES = 3
"""Checkpoints in a row that may fail to be written before the run gives up."""

State = Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]


class Checkpoints:
    """Observer that saves at fixed distances in steps, and whatever was evaluated, so that the best can be kept.

    A checkpoint that can't be written is a warning, three in a row are the end.

    Args:
        run: Where to save.
        log: How often and how many.
        progress: The run's counters.
        spec: The environments.
        state: Everything that must be saved but the replay: tensors and facts.
        segments: Saves the replay; None if there is none, or it is not to be saved.
        resumes: How the run can be resumed, for the manifests.
    """

    def __init__(
        self,
        run: RunDirectory,
        log: Log,
        progress: Progress,
        spec: EnvSpec,
        state: State,
        segments: Segments | None = None,
        resumes: str = "",
    ) -> None:
        self._root, self._log, self._segments, self._resumes = run.checkpoints, log, segments, resumes
        self._progress, self._spec, self._state = progress, spec, state
        self._failures, self._begun = 0, False
        self._written = threading.Event()  # a join that a signal interrupts takes the thread for ended (bpo-45274)
        self._written.set()
        self._error: BaseException | None = None

    def __call__(self, report: Report) -> None:
        """Begins to save if it is time to.

        Raises:
            CheckpointError: If that was not possible for the third time in a row.
        """
        progress = self._progress
        due = crossed(progress.before, progress.steps, self._log.checkpoint_every)
        if not due and progress.evaluated_at != progress.steps:
            return
        self._settle()
        try:
            self._begin()
        except CheckpointError as error:
            self._fail(error)

    def save(self) -> None:
        """Saves now, and waits until it is on the disk.

        Raises:
            CheckpointError: If that is not possible; older checkpoints are kept.
        """
        self._settle()
        self._begin()
        self._wait()

    def close(self, seconds: float | None = None) -> None:
        """Waits for what is being written, so many seconds at most; a failure of that is a warning."""
        try:
            self._wait(seconds)
        except CheckpointError as error:
            warnings.warn(str(error), stacklevel=2)

    def _begin(self) -> None:
        tensors, facts = self._state()
        tensors, steps, score = copies(tensors), self._progress.steps, self._progress.score
        facts = json.loads(json.dumps(facts))  # a copy too
        finish, first = None, not self._root.is_dir()
        if self._segments is not None:
            replay, finish = self._segments.begin()
            tensors |= {f"replay.{name}": value for name, value in replay.items()}
        if first:
            self._warn_of_space(sum(tensor.nbytes for tensor in tensors.values()))

        def write() -> None:
            try:
                listed = finish() if finish else ()
                checkpoint.save(self._root, steps, tensors, facts, self._spec, score, listed, self._resumes)
                checkpoint.prune(self._root, self._log.keep_last, self._log.keep_every)
            except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                self._error = error
            finally:
                self._written.set()

        self._begun = True
        self._written.clear()
        threading.Thread(target=write, name="checkpoint", daemon=True).start()

    def _warn_of_space(self, each: int) -> None:
        """Warns, at the first checkpoint, if the disk has less room than those of this run will take."""
        most = self._segments.most if self._segments else 0
        needed = each * (self._log.keep_last + 2) + most
        if space(self._root) < needed:
            less = ", --log.no-save-replay" if most else ""
            warnings.warn(
                f"the checkpoints of this run take up to {size(needed)}, and {self._root} has {free(self._root)}: make "
                f"room, or use --log.dir, --log.keep-last{less}",
                stacklevel=3,
            )

    def _settle(self) -> None:
        """Waits for the checkpoint before, and takes note of how it went."""
        try:
            self._wait()
        except CheckpointError as error:
            self._fail(error)

    def _wait(self, seconds: float | None = None) -> None:
        if not self._written.wait(seconds):
            return
        error, self._error = self._error, None
        begun, self._begun = self._begun, False
        if error is not None:
            raise error
        if begun:
            self._failures = 0

    def _fail(self, error: CheckpointError) -> None:
        self._failures += 1
        if self._failures == _FAILURES:
            raise error
        warnings.warn(f"{error}; training goes on", stacklevel=3)
