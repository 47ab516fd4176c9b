"""A child that kills its driver while it ties its life to the driver's, for `tests/test_process.py`."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from contextlib import suppress
from typing import Any

from slipstream import process

MOMENT, DRIVER = map(int, process.read_file(int(sys.argv[2])).split())


def before_it_enters() -> None:
    """Has the driver killed before the call of `fcntl` that was told."""
    original, calls = fcntl.fcntl, 0

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        if calls == MOMENT:
            kill_driver()
        calls += 1
        return original(*arguments)

    fcntl.fcntl = counted


def kill_driver() -> None:
    """Returns when it is dead."""
    with suppress(ProcessLookupError):
        os.kill(DRIVER, signal.SIGKILL)
    while os.getppid() == DRIVER:
        os.sched_yield()
