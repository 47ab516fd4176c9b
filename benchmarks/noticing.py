"""How soon it is noticed that a worker process has died, or hangs.

    python benchmarks/noticing.py [--rounds 20] [--output benchmarks/results/noticing.json]

kill    a worker kills itself with SIGKILL in the midst of a step: seconds from there to the error, its stack asked for
        and its process group killed. Half of the environments are in another worker, which answers.
hang    a worker sleeps in C and keeps the interpreter's lock: seconds beyond the time limit of one second, its stack
        taken, which a signal handler in C writes.

Ends with 1 if one that was killed was noticed after a second or more, or a hang after three more than the limit.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import statistics
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from slipstream.envs.rows import EnvFailure
from slipstream.envs.slot import Source
from slipstream.envs.toy import Chaos
from slipstream.envs.workers import WorkerEnvs
from slipstream.run.record import conditions, save

TIME_LIMIT = 1.0  # seconds for a step
MOST = {"kill": 1.0, "hang": 3.0}  # seconds


class Fails(Chaos):
    """Writes the time to a file in its third step, and fails.

    Args:
        file: For the time; whichever environment is first is the only one that fails.
        fault: `kill` or `hang`.
    """

    def __init__(self, file: Path, fault: str) -> None:
        super().__init__("none")
        self._file, self._fault_here = file, fault

    def step(self, action: np.int64) -> Any:
        if self._steps == 2:
            try:
                with self._file.open("x") as file:
                    file.write(str(time.monotonic()))
            except FileExistsError:
                return super().step(action)
            if self._fault_here == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            ctypes.PyDLL(None).sleep(1000)  # with the lock
        return super().step(action)


def noticed(fault: str) -> float:
    """Seconds from a fault to its error, less the time limit of a hang."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "time"
        source = Source(lambda: Fails(file, fault), "Fails")
        with closing(WorkerEnvs(source, 4, workers=2, timeout_seconds=TIME_LIMIT if fault == "hang" else 60.0)) as envs:
            envs.reset(1)
            envs.recv(0)
            try:
                while True:
                    envs.send(np.zeros(4, np.int64), 0)
                    envs.recv(0)
            except EnvFailure:
                now = time.monotonic()
        return now - float(file.read_text()) - (TIME_LIMIT if fault == "hang" else 0.0)


def main() -> int:
    """Measures as told; 1 if something was noticed too late."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the result")
    args = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    for fault in MOST:
        seconds = [noticed(fault) for _ in range(args.rounds if fault == "kill" else max(1, args.rounds // 4))]
        found[fault] = {"median": statistics.median(seconds), "most": max(seconds), "rounds": len(seconds)}
        print(f"{fault}: {found[fault]['median']:.3f} s, at most {found[fault]['most']:.3f}", flush=True)
    if args.output:
        save({**conditions("cpu"), "time_limit": TIME_LIMIT, "seconds": found}, args.output)
    return int(any(found[fault]["most"] >= most for fault, most in MOST.items()))


if __name__ == "__main__":
    sys.exit(main())
