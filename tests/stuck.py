"""A child's module whose import kills the driver and then takes for ever, for `tests/test_process.py`."""

from __future__ import annotations

import signal

from tests.orphan import kill_driver

kill_driver()
signal.pause()
