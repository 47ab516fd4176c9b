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

from slipstream.run import metrics
from slipstream.run.remains import differences
from tests.laws.forge import Forge, Outcome

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
        row = 41 + 8  # every episode of 5 steps is followed by a row that resets
        place = rf"(slot \d, step 1, episode 8|slots \d to \d, row {row})"
        assert re.search(f"was killed by SIGKILL while busy with {place}", error)
    assert seconds < LIMIT
    assert family or placement not in OWN_PROCESS
    assert not [process for process in family.values() if process.is_running()]
    assert set(os.listdir("/dev/shm")) == shared


WORKERS = "--num-envs 4 --lanes 2 --unroll 8 --algo.batch-size 16 --algo.epochs 1 --net.hidden 8 --total-steps 400"
WORKERS += " --placement.workers 1 --log.metrics-every 50 --log.no-tensorboard"


def _trained(made: Forge, root: Path, env: str, kwargs: str, *more: str) -> tuple[Outcome, Path]:
    words = ["train", "ppo", "--env", f"tests.faulty:{env}", *WORKERS.split(), "--env-options.kwargs", kwargs, *more]
    root.mkdir()
    outcome = made.run([*words, "--log.dir", str(root / "runs")], root)
    assert outcome.left == []
    return outcome, next((root / "runs").iterdir())


@pytest.fixture(scope="module")
def unfailed(made: Forge, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in which nothing fails."""
    folder = tmp_path_factory.mktemp("unfailed")
    outcome, run = _trained(made, folder / "run", "Once-v0", f"{{path: {folder}, fault: none}}")
    assert outcome.code == 0
    return run


@pytest.mark.parametrize(
    ("fault", "workers", "said"),
    [
        ("raise", 0, r"raised RuntimeError: Chaos was told to raise; it is brought back to where it was \(1 of 3\)"),
        ("raise", 1, "raised RuntimeError: Chaos was told to raise; it is brought back"),
        ("kill", 1, "was killed by SIGKILL while busy with slots? .*; it is brought back"),
        ("segfault", 1, "was killed by SIGSEGV while busy with slots? .*; it is brought back"),
        ("exit", 1, "ended with exit code 0 while busy with slots? .*; it is brought back"),
        ("hang", 1, "no answer within 1 seconds: slot .*; it is brought back"),
    ],
    ids=["raise here", "raise", "kill", "segfault", "exit", "hang"],
)
def test_a_program_goes_on_after_one_fault(
    made: Forge, unfailed: Path, tmp_path: Path, fault: str, workers: int, said: str
) -> None:
    flag = tmp_path / "faults"
    flag.mkdir()
    more = [f"--placement.env-workers={workers}", f"--env-options.timeout-seconds={1 if fault == 'hang' else 60}"]
    outcome, run = _trained(made, tmp_path / "one", "Once-v0", f"{{path: {flag}, fault: {fault}, at: 23}}", *more)
    assert outcome.code == 0, outcome.said
    assert list(flag.iterdir())
    assert re.search(said, outcome.said), outcome.said
    rows = metrics.read(run / "metrics.jsonl")
    lanes = 1 if fault == "raise" else 2  # whatever a process of both had
    assert (rows[0]["faults/restarts"], rows[-1]["faults/restarts"]) == (0.0, lanes)
    assert list(differences(run, unfailed)) == []


def test_an_environment_without_manners(made: Forge, tmp_path: Path) -> None:
    started = tmp_path / "started"
    kwargs, more = f"{{path: {started}}}", ["--placement.env-workers", "1", "--num-envs", "2"]
    outcome, _ = _trained(made, tmp_path / "run", "Rude-v0", kwargs, *more)
    assert outcome.code == 0
    assert len(outcome.said) > 2 * 10_000_000
    pids = [int(line) for line in started.read_text().split()]
    assert len(pids) == 2
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)
