"""Whatever fails, and wherever it runs: the command line says what it was and is gone within seconds (DESIGN 7)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

LIMIT = 5.0
COMMAND = [sys.executable, "-c", "import sys; from slipstream.run.cli import main; sys.exit(main())"]
PLACEMENTS = {
    "inline": "--placement.collectors inline",
    "thread": "--placement.workers 2",
    "env workers": "--placement.workers 2 --placement.env-workers 2",
    "process": "--placement.collectors process --placement.workers 2",
    "process, env workers": "--placement.collectors process --placement.workers 2 --placement.env-workers 2",
}
SCHEDULES = {"sync": "ppo", "concurrent": "ppo", "async": "impala"}
OWN_PROCESS = [name for name in PLACEMENTS if name not in ("inline", "thread")]
CASES = [(name, "sync", "raise") for name in PLACEMENTS]
CASES += [("thread", schedule, "raise") for schedule in ("concurrent", "async")]
CASES += [("process", "async", "raise"), ("env workers", "sync", "kill")]
CASES += [("process", schedule, "kill") for schedule in ("concurrent", "async")]
SLOW = [("process", "concurrent", "raise"), ("process", "sync", "kill"), ("process, env workers", "sync", "kill")]


@pytest.mark.parametrize(
    ("placement", "schedule", "fault"), CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]
)
def test_a_fault_ends_the_program_with_its_reason(tmp_path: Path, placement: str, schedule: str, fault: str) -> None:
    said_at, shared = tmp_path / "fault", set(os.listdir("/dev/shm"))
    words = ["train", SCHEDULES[schedule], "--env", "tests.faulty:Faulty-v0", "--schedule", schedule]
    words += f"--num-envs 4 --lanes 2 --unroll 16 {PLACEMENTS[placement]} --placement.restarts 0".split()
    words += ["--algo.batch-size", "32"] if schedule != "async" else []
    words += ["--env-options.kwargs", f"{{path: {said_at}, fault: {fault}, at: 41}}", "--log.dir", str(tmp_path)]
    child = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    family: dict[int, psutil.Process] = {}
    while not said_at.exists():
        family |= {process.pid: process for process in psutil.Process(child.pid).children(recursive=True)}
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=0.02)
            break
    _, error = child.communicate(timeout=60)
    seconds = time.monotonic() - float(said_at.read_text())
    print(f"{placement}, {schedule}, {fault}: {seconds:.2f} s")  # noqa: T201 - for `pytest -s`
    assert child.returncode == 1, error
    if fault == "raise":
        assert re.search(r"slot \d, step 1, episode 8: step\(\d\) raised RuntimeError: Chaos was told", error)
        trace = re.search(r"^traceback: +(.*)$", error, re.MULTILINE)
        assert trace, error
        assert "in _raise" in Path(trace[1]).read_text()
    else:
        step = 41 + 8  # rows; every episode of 5 steps is followed by one that resets
        assert re.search(rf"was killed by SIGKILL while busy with slots? \d.*, step {step}", error)
    assert seconds < LIMIT
    assert family or placement not in OWN_PROCESS
    assert not [process for process in family.values() if process.is_running()]
    assert set(os.listdir("/dev/shm")) == shared
