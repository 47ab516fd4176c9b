"""A child that kills its driver while it ties its life to the driver's, for `tests/test_process.py`."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from typing import Any

from slipstream import process


def main() -> None:
    """Kills the driver before the call of `fcntl` that it was told, or after the last of `enter`."""
    moment = int(process.read_file(int(sys.argv[1])))
    original, calls = fcntl.fcntl, 0

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        if calls == moment:
            _kill_driver()
        calls += 1
        return original(*arguments)

    fcntl.fcntl = counted
    process.enter()
    if calls == moment:
        _kill_driver()
    signal.pause()


def _kill_driver() -> None:
    driver = os.getppid()
    os.kill(driver, signal.SIGKILL)
    while os.getppid() == driver:
        os.sched_yield()
