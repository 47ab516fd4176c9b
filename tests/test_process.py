"""Children of a run: they die with their driver whenever it dies, and what can't be started leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from slipstream import process
from slipstream.envs import make_envs
from tests.envs.test_worker_failures import gone

DRIVER = """
import os, signal, sys
from slipstream import process
process._CHILD = "from tests.orphan import before_it_enters; before_it_enters(); " + process._CHILD
child = process.start("tests.stuck", f"{sys.argv[1]} {os.getpid()}".encode(), process.anonymous_file())
print(child.pid, flush=True)
signal.pause()
"""


@pytest.mark.parametrize("moment", range(5))
def test_no_child_outlives_a_driver_that_dies_while_it_starts(moment: int) -> None:
    """Before and between the four calls that have the kernel end it, and after them, when it imports its module."""
    words = [sys.executable, "-c", DRIVER, str(moment)]
    driver = subprocess.Popen(words, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
    assert driver.stdout is not None
    with driver.stdout as said:
        pid = int(said.readline())
    assert driver.wait(20) == -9
    assert gone([pid], 2.0)


@contextmanager
def _descriptors_left(count: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (psutil.Process().num_fds() + count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("count", [3, 21, 24, 27, 30])
def test_where_descriptors_are_short_the_error_says_so_and_nothing_is_left(count: int) -> None:
    before = psutil.Process().num_fds(), len(psutil.Process().children())
    with _descriptors_left(count), pytest.raises(OSError, match="Too many open files"):
        make_envs("toy:chaos", 8, workers=8)
    assert (psutil.Process().num_fds(), len(psutil.Process().children())) == before


def test_where_processes_are_short_the_error_says_so_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    original, started = subprocess.Popen.__init__, 0

    def refused(self: subprocess.Popen[Any], *arguments: Any, **named: Any) -> None:
        nonlocal started
        started += 1
        if started == 3:
            self.returncode = 0  # for its finaliser
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        original(self, *arguments, **named)

    before = psutil.Process().num_fds(), len(psutil.Process().children())
    monkeypatch.setattr(subprocess.Popen, "__init__", refused)
    with pytest.raises(BlockingIOError, match="Resource temporarily unavailable"):
        make_envs("toy:chaos", 4, workers=4)
    assert (psutil.Process().num_fds(), len(psutil.Process().children())) == before


def test_close_may_be_called_on_what_was_never_started() -> None:
    process.stop([])


@pytest.mark.parametrize("character", ["a", '"', "é", "深", "\U0001f600", "\0", "\udc80"], ids=ascii)
def test_a_report_of_any_characters_fits_a_pipe_and_is_what_was_raised(character: str) -> None:
    def fail() -> None:
        raise type(1_000 * "深", (ValueError,), {})(100_000 * character)

    file = process.anonymous_file()
    assert not process.answer(file, fail)
    told = process.read_file(file)
    os.close(file)
    assert len(told) < 65_536
    assert len(told) == 5 + int.from_bytes(told[1:5], "little")
    said = json.loads(told[5:])
    assert said["kind"] == 100 * "深"
    assert said["message"] == len(said["message"]) * character
    assert len(said["message"]) >= 4_990
    assert said["traceback"].endswith(f"{character}\n")
