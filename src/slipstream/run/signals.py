"""What SIGINT, SIGTERM and SIGHUP mean for a run in progress."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from types import FrameType, TracebackType
from typing import Any

from slipstream.run.files import discard

_ENDING = [number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGHUP")]
_NOTICE = "Stopping after this update, then saving. Once more to stop at once."
_PATIENCE_SECONDS = 3.0  # with an output that takes nothing any more


class Interrupted(KeyboardInterrupt):
    """A run that was told to stop, and has saved where it was if it goes on from there.

    Attributes:
        signal: Number of the signal.
        run: The run directory.
    """

    def __init__(self, number: int, run: Path, saved: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; {saved}")
        self.signal, self.run = number, run


class Signals:
    """Context manager that notes SIGINT, SIGTERM and SIGHUP instead of dying of them; a second one is obeyed at once.

    Python delivers signals to the main thread only; elsewhere (a notebook's worker, a test) nothing is installed. They
    may come while that thread writes to the very output that the notice goes to, which is then an error in Python: so a
    thread that waits for the first signal shows the notice.

    Args:
        notice: Shows a line; called by that thread, at most once.

    Attributes:
        received: Number of the signal that came, or None.
    """

    def __init__(self, notice: Callable[[str], None]) -> None:
        self.received: int | None = None
        self._notice = notice
        self._former: dict[int, Any] = {}
        self._terminals: list[int] = []
        self._texts: SimpleQueue[str] = SimpleQueue()  # unlike an Event, it may be filled at any moment
        self._thread = threading.Thread(target=self._show, name="slipstream-signals", daemon=True)

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._thread.start()
            self._terminals = [fd for fd in (1, 2) if os.isatty(fd)]
            for number in _ENDING:
                former = signal.getsignal(number)
                if number in (signal.SIGINT, signal.SIGTERM) or former is not signal.SIG_IGN:  # as nohup has it
                    self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if self._thread.is_alive():
            self._texts.put("")
            self._thread.join(_PATIENCE_SECONDS)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        if number not in (signal.SIGINT, signal.SIGTERM):
            self._let_go_of_terminals()
        self._texts.put(_NOTICE)

    def _show(self) -> None:
        """Shows the notice once there is one, or nothing if there is none until the end."""
        if text := self._texts.get():
            with suppress(OSError):
                self._notice(text)

    def _restore(self) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)

    def _let_go_of_terminals(self) -> None:
        """Has output that went to a terminal go nowhere: writing to one that was closed is an error."""
        discard(*self._terminals)
