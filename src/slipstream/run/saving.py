"""Saving while training goes on: the state is copied between two updates, and a thread brings it to the disk.

    training thread                     thread of the checkpoint
    waits for the one before
    copies state and new rows       ->  flushes the metrics, which whoever goes on from here does not repeat;
                                        hashes, writes, flushes, renames; removes old checkpoints
    goes on                             ends

Who waits for whom: the next checkpoint, and the end of the run, wait for the one before; a run that is to end at once
waits for a moment only, and leaves the lock of its directory to what is `pending`. A kill at any moment leaves the
older ones. What can't be written is told when it is waited for.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from slipstream.ranges import crossed
from slipstream.run import checkpoint
from slipstream.run.checkpoint import copies
from slipstream.run.config import Log
from slipstream.run.directory import RunDirectory
from slipstream.run.files import CheckpointError, flush, free, size, space, writing
from slipstream.run.progress import Progress
from slipstream.run.segments import ReplayLostError, Segments
from slipstream.types import EnvSpec, Report

_FAILURES = 3
"""Checkpoints in a row that may fail to be written before the run gives up."""

_LONG_SECONDS = 30.0  # for a checkpoint; then it is said that it takes long

State = Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]


class Checkpoints:
    """Observer that saves at fixed distances in steps, and whatever was evaluated, so that the best can be kept.

    A checkpoint that can't be written is a warning, three in a row are the end. There is one for a number of steps: an
    update that takes none (of dead rows only) is done again after a resume.

    Args:
        run: Where to save.
        log: How often and how many.
        progress: The run's counters.
        spec: The environments.
        state: Everything that must be saved but the replay: tensors and facts.
        segments: Saves the replay; None if there is none, or it is not to be saved.
        then: Called while the run goes on, when the state of a checkpoint has been copied, or could not be; None for
            nothing.
        saved: Steps of the one that the run goes on from, which is on the disk; -1 for none.
    """

    def __init__(
        self,
        run: RunDirectory,
        log: Log,
        progress: Progress,
        spec: EnvSpec,
        state: State,
        segments: Segments | None = None,
        then: Callable[[], None] | None = None,
        saved: int = -1,
    ) -> None:
        self._root, self._metrics = run.checkpoints, run.metrics
        self._log, self._segments, self._then = log, segments, then
        self._progress, self._spec, self._state = progress, spec, state
        self._failures = 0
        self._writing: _Writing | None = None
        self._saved = saved  # steps of the last that is on the disk
        self._seen = progress.updates
        self._looked = self._root.is_dir()  # whether the disk has room enough

    @property
    def whole(self) -> bool:
        """Whether those who observe updates before it does have all seen the last one."""
        return self._seen == self._progress.updates

    @property
    def pending(self) -> Future[None] | None:
        """Is done when nothing is written any more; None if nothing is."""
        writing = self._writing
        return writing.done if writing is not None and writing.thread.is_alive() else None

    def __call__(self, report: Report) -> None:
        """Begins to save if it is time to.

        Raises:
            CheckpointError: If that was not possible for the third time in a row.
        """
        progress = self._progress
        self._seen = progress.updates
        if not crossed(progress.before, progress.steps, self._log.checkpoint_every) and not progress.just_evaluated:
            return
        self._settle()
        try:
            self._begin()
        except CheckpointError as error:
            self._fail(error)
        if self._then is not None:
            self._then()

    def save(self) -> None:
        """Saves now, if that has not been done at this step, and waits until it is on the disk.

        Without the replay, if a shard of it was lost in the last update.

        Raises:
            CheckpointError: If that is not possible; older checkpoints are kept.
        """
        self._settle()
        if self._progress.steps == self._saved:
            return
        try:
            self._begin()
        except ReplayLostError as error:
            warnings.warn(f"{error}; the last checkpoint is without it", stacklevel=2)
            self._segments = None
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
        finish = None
        if self._segments is not None:
            replay, finish = self._segments.begin()
            tensors |= {f"replay.{name}": value for name, value in replay.items()}
        if not self._looked:
            self._looked = True
            self._warn_of_space(sum(tensor.nbytes for tensor in tensors.values()))

        def write() -> None:
            with writing(self._metrics), suppress(FileNotFoundError):  # nothing is there yet, or somebody removed it
                flush(self._metrics)
            listed = finish() if finish else ()
            checkpoint.save(self._root, steps, tensors, facts, self._spec, score, listed)
            checkpoint.prune(self._root, self._log.keep_last, self._log.keep_every)

        self._writing = _Writing.of(steps, write)  # before it starts: a signal may come while it does
        try:
            self._writing.thread.start()
        except RuntimeError as error:
            self._writing = None
            raise _problem(steps, error) from error

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
        writing = self._writing
        if writing is None or not writing.wait(seconds):
            return
        self._writing = None
        writing.result()
        self._failures, self._saved = 0, writing.steps

    def _fail(self, error: CheckpointError) -> None:
        self._failures += 1
        if self._failures == _FAILURES:
            raise error
        warnings.warn(f"{error}; training goes on", stacklevel=3)


@dataclass(frozen=True)
class _Writing:
    """A checkpoint on its way to the disk.

    Attributes:
        steps: Its step.
        thread: Writes it.
        done: Is set when it is there, or can't be.
    """

    steps: int
    thread: threading.Thread
    done: Future[None]

    @staticmethod
    def of(steps: int, write: Callable[[], None]) -> _Writing:
        """One that `write` brings there, once the thread has been started."""
        done = Future[None]()

        def work() -> None:
            try:
                write()
            except CheckpointError as error:
                done.set_exception(error)
            except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                done.set_exception(_problem(steps, error))
            else:
                done.set_result(None)

        return _Writing(steps, threading.Thread(target=work, name="slipstream-checkpoint"), done)

    def wait(self, seconds: float | None = None) -> bool:
        """Waits, so many seconds at most, or as long as it takes; returns whether it is done."""
        # Not by joining the thread: a join that a signal interrupts takes it for ended (bpo-45274).
        if not self._within(_LONG_SECONDS if seconds is None else seconds):
            if seconds is not None:
                return False
            warnings.warn(
                f"the checkpoint at step {self.steps} has been on its way to the disk for {_LONG_SECONDS:.0f} seconds, "
                "and is waited for: does the disk hang?",
                stacklevel=5,
            )
            while not self._within(_LONG_SECONDS):
                pass
        self.thread.join()  # it has nothing left to do
        return True

    def result(self) -> None:
        """Raises what went wrong."""
        self.done.result()

    def _within(self, seconds: float) -> bool:
        try:
            self.done.exception(seconds)
        except TimeoutError:
            return False
        return True


def _problem(steps: int, error: BaseException) -> CheckpointError:
    found = CheckpointError(f"cannot write the checkpoint at step {steps}: {type(error).__name__}: {error}")
    found.__cause__ = error
    return found
