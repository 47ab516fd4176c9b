"""A run that stands still says so, and where: a thread looks on, since the others may never come back."""

from __future__ import annotations

import concurrent.futures
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from slipstream.types import Report

_ADVICE = (
    "One of several learners that hangs is replaced after 300 s. A step of an environment that hangs can't be ended "
    "here (Ctrl-C twice ends the run); in a process of its own it is, and is tried again: --placement.env-workers N "
    "--env-options.timeout-seconds S"
)

_LIBRARY = {Path(threading.__file__).parent, Path(concurrent.futures.__file__).parent}


class StallWatch:
    """Observer that says when there has been no update for a while, and where every thread is then.

    It says so after `seconds`, again after twice as long, and so on: a note, not an end, since an update that takes an
    hour may be what was asked for. It reads a clock and decides nothing by it that a run depends on.

    Args:
        seconds: Without an update before it says so; 0 for never.
        stacks: The file that the stacks of all threads are written to.
        say: Prints some lines.
        awaited: Says which processes are waited for and what they are busy with, a line each.
    """

    def __init__(
        self, seconds: float, stacks: Path, say: Callable[[str], None], awaited: Callable[[], list[str]] = list
    ) -> None:
        self._seconds, self._stacks, self._say, self._awaited = seconds, stacks, say, awaited
        self._last = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="slipstream-stall", daemon=True)
        if seconds:
            self._thread.start()

    def __call__(self, report: Report) -> None:
        """Takes note of an update."""
        self._last = time.monotonic()

    def close(self) -> None:
        """Ends the thread; may be called twice."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        due = self._seconds
        while not self._over.wait(self._seconds / 4):
            still = time.monotonic() - self._last
            if still < self._seconds:
                due = self._seconds
            elif still >= due:
                due = 2 * still
                self._tell(still)

    def _tell(self, still: float) -> None:
        names = {thread.ident: thread.name for thread in threading.enumerate() if thread is not self._thread}
        running = sys._current_frames()  # pyright: ignore[reportPrivateUsage] - documented, for this
        frames = [(names[ident], frame) for ident, frame in running.items() if ident in names]  # names may come twice
        lines = [f"no update for {still:.0f} s. Where the threads are:"]
        lines += [f"  {name}: {_place(frame)}" for name, frame in frames]
        try:
            self._stacks.write_text(
                "\n".join(f"{name}\n{''.join(traceback.format_stack(frame))}" for name, frame in frames)
            )
            lines.append(f"whole stacks: {self._stacks}")
        except OSError as problem:
            lines.append(f"whole stacks: not written, {problem.strerror or problem}")
        try:
            lines += [f"waited for: {line}" for line in self._awaited()]
        except Exception as problem:  # noqa: BLE001 - of what is being looked at while others change it
            lines.append(f"waited for: unknown, {type(problem).__name__}: {problem}")
        self._say("\n".join([*lines, _ADVICE]))


def _place(frame: FrameType) -> str:
    """File, line and function of a frame, or of the nearest caller that is not in Python's own library."""
    at: FrameType | None = frame
    while at is not None and Path(at.f_code.co_filename).parent in _LIBRARY:
        at = at.f_back
    at = at or frame
    return f"{at.f_code.co_filename}:{at.f_lineno} in {at.f_code.co_name}"
