"""Command lines that start within milliseconds, and get their signals at a moment that is counted, not timed.

    python -m tests.laws.forge      one process that has imported everything and forks a child for every command line

A child counts what it does: calls of Slipstream's functions in its main thread, or what it does to the files of a
folder. At the given counts it sends itself the given signal.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
_WARM = "--env CartPole-v1 --num-envs 2 --unroll 8 --algo.batch-size 16 --total-steps 16 --log.no-tensorboard"
_BELOW = ("os.remove", "os.rmdir")
_FILES = ("open", "os.mkdir", "os.rename", *_BELOW)


@dataclass(frozen=True)
class Order:
    """A command line and what befalls it.

    Attributes:
        words: What was typed after `slipstream`.
        output: File for stdout and stderr.
        number: Signal that it sends itself; 0 for none.
        at: Counts at which it does.
        folder: Count what is done to the files in it; empty to count calls. What is flushed in the moment of the signal
            is half written, but for what was flushed before.
    """

    words: list[str]
    output: str
    number: int = 0
    at: tuple[int, ...] = ()
    folder: str = ""


@dataclass(frozen=True)
class Outcome:
    """How it ended.

    Attributes:
        code: Exit code, or minus the number of the signal that ended it.
        said: What it wrote.
        counted: How much it has counted; 0 if it was killed.
        seconds: From the first signal to its end; 0 without one.
        left: Processes that it started and that live on two seconds later.
    """

    code: int
    said: str
    counted: int
    seconds: float
    left: list[str]


class Forge:
    """The process that forks, seen from a test."""

    def __init__(self) -> None:
        words = [sys.executable, "-m", "tests.laws.forge"]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def run(
        self, words: Sequence[str], notes_in: Path, number: int = 0, at: Sequence[int] = (), folder: str = ""
    ) -> Outcome:
        """Runs a command line to its end, with notes about it in a directory; the rest as in `Order`."""
        notes = {name: notes_in / name for name in ("output", "output.count", "output.signal", "output.children")}
        for path in notes.values():
            path.unlink(missing_ok=True)
        order = Order(list(words), str(notes["output"]), number, tuple(at), folder)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(vars(order)) + "\n")
        self._process.stdin.flush()
        status, ended = json.loads(self._process.stdout.readline())
        numbers = [int(word) for word in _text(notes["output.children"]).split()]
        alive = list(_living(numbers))
        deadline = time.monotonic() + 2.0
        while alive and time.monotonic() < deadline:
            time.sleep(0.01)  # nothing tells of the death of grandchildren
            alive = list(_living(numbers))
        signalled = _text(notes["output.signal"]).split()
        return Outcome(
            os.waitstatus_to_exitcode(status),
            _text(notes["output"]),
            int(_text(notes["output.count"]) or 0),
            ended - float(signalled[0]) if signalled else 0.0,
            alive,
        )

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=10)
        self._process.stdout.close()


@contextmanager
def forge() -> Iterator[Forge]:
    """A forge that ends with its context."""
    made = Forge()
    try:
        yield made
    finally:
        made.close()


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _living(numbers: Sequence[int]) -> Iterator[str]:
    for number in numbers:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(number)
            if process.status() != psutil.STATUS_ZOMBIE:  # an orphan stays one where nobody reaps
                yield str(process)


def main() -> None:
    """Forks until its input ends."""
    from slipstream.run.cli import main as slipstream

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        slipstream(["train", "ppo", *_WARM.split(), "--log.dir", folder])  # whatever is imported late has been
    assert threading.active_count() == 1
    for line in sys.stdin:
        order = Order(**json.loads(line))
        child = os.fork()
        if not child:
            _enter(order)
            code = slipstream(order.words)
            _leave(order, code)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(json.dumps([status, time.monotonic()]) + "\n")
        sys.stdout.flush()


_counted = 0


def _enter(order: Order) -> None:
    """Gives the child its files, and has it count."""
    output = os.open(order.output, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for fd, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(fd, target)
    faulthandler.enable()  # a child that crashes says where, in its output
    at, start, flush = set(order.at), subprocess.Popen.__init__, os.fsync
    on_disk: dict[int, int] = {}  # bytes of files that are flushed again and again, by number

    def count() -> None:
        global _counted
        _counted += 1
        if _counted in at:
            with open(f"{order.output}.signal", "a") as file:
                file.write(f"{time.monotonic()}\n")
            os.kill(os.getpid(), order.number)

    def noted(self: subprocess.Popen[Any], *arguments: Any, **named: Any) -> None:
        start(self, *arguments, **named)
        with open(f"{order.output}.children", "a") as file:
            file.write(f"{self.pid}\n")

    def called(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and "/slipstream/" in frame.f_code.co_filename:
            count()

    def touched(event: str, arguments: tuple[Any, ...]) -> None:
        inside = event in _BELOW and arguments[-1] not in (None, -1)  # of a directory that is open
        if inside or (event in _FILES and str(arguments[0]).startswith(order.folder)):
            count()

    def flushed(fd: int) -> None:
        found = os.fstat(fd)
        size = found.st_size
        if _counted + 1 in at and stat.S_ISREG(found.st_mode):
            os.truncate(fd, (on_disk.get(found.st_ino, 0) + size) // 2)
        count()
        flush(fd)
        on_disk[found.st_ino] = size

    subprocess.Popen.__init__ = noted  # type: ignore[method-assign]
    if order.folder:
        os.fsync = flushed
        sys.addaudithook(touched)
    else:
        sys.settrace(called)


def _leave(order: Order, code: int) -> None:
    sys.settrace(None)
    Path(f"{order.output}.count").write_text(str(_counted))
    atexit._run_exitfuncs()
    os._exit(code)  # what an interpreter tears down takes longer than the run


if __name__ == "__main__":
    main()
