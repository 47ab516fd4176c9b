"""Trains for minutes while environments fail again and again; looks at what the processes hold and how fast they are.

    python benchmarks/soak.py [--minutes 10] [--output benchmarks/results/soak.json]

PPO on Catch, its environments in two worker processes. After every 200 rows (800 steps of environments, those that are
played again included) comes a fault: an environment raises, its process is killed, or it hangs past the time limit of
two seconds, in turn. Every two seconds the memory of all processes, the driver's descriptors and threads, and the speed
are measured. After a warm-up of a fifth of the time memory must grow by less than 1 MB a minute, descriptors and
threads must not grow at all, and the last third must be at least 0.95 times as fast as the first. Ends with 1 where
not.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from slipstream.envs.toy import Catch
from slipstream.run.presets import configure
from slipstream.run.record import conditions, save
from slipstream.run.training import Training

SLOTS, ROWS = 4, 200
SETTINGS: dict[str, Any] = {
    "num_envs": SLOTS,
    "lanes": 2,
    "unroll": 50,
    "algo.batch_size": 100,
    "net.hidden": [32],
    "total_steps": 10**12,
    "env_options.timeout_seconds": 2.0,
    "placement.workers": 2,
    "placement.env_workers": 2,
    "placement.restarts": 20,
}
WARM_UP, SLOWEST, GROWTH = 0.2, 0.95, 1.0  # of the time; of the speed; MB a minute


class Failing(Catch):
    """Catch that fails in every so many steps of all environments, which a file counts: a byte for each.

    Args:
        counter: The file.
        every: Steps from one fault to the next.
    """

    def __init__(self, counter: Path, every: int) -> None:
        super().__init__()
        self._counter, self._every = os.open(counter, os.O_WRONLY | os.O_APPEND), every

    def step(self, action: np.int64) -> Any:
        os.write(self._counter, b".")
        number, rest = divmod(os.lseek(self._counter, 0, os.SEEK_CUR), self._every)
        if not rest:
            if number % 3 == 0:
                raise RuntimeError(f"fault {number}")
            if number % 3 == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            threading.Event().wait()
        return super().step(action)

    def close(self) -> None:
        os.close(self._counter)


@dataclass(frozen=True)
class Sample:
    """What was so at one time.

    Attributes:
        seconds: Since the start.
        steps: Agent decisions so far.
        restarts: Lanes that were brought back so far.
        megabytes: Resident memory of all processes.
        descriptors: Of the driver.
        threads: Of the driver.
    """

    seconds: float
    steps: int
    restarts: int
    megabytes: float
    descriptors: int
    threads: int


def soak(seconds: float, steps: float = math.inf, every: float = 2.0, rows: int = ROWS) -> list[Sample]:
    """Trains for so many seconds or steps, with a fault after so many rows, and measures that often."""
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory() as folder:
        counter = Path(folder) / "steps"
        counter.touch()
        training = Training(configure("ppo", "callable:failing", SETTINGS), lambda: Failing(counter, rows * SLOTS))
        start = time.perf_counter()
        try:
            for report in training:
                now = time.perf_counter() - start
                if now >= every * (len(samples) + 1):
                    samples.append(_sample(now, report.steps, int(report.metrics["faults/restarts"])))
                if now >= seconds or report.steps >= steps:
                    return samples
        finally:
            training.close()
    raise AssertionError("the run ended early")


def judge(samples: Sequence[Sample]) -> tuple[dict[str, Any], list[str]]:
    """What the samples say, and what is wrong with it."""
    warm = [sample for sample in samples if sample.seconds >= WARM_UP * samples[-1].seconds]
    slope = float(np.polyfit([each.seconds / 60.0 for each in warm], [each.megabytes for each in warm], 1)[0])
    third = len(warm) // 3
    first, last = (_speed(part) for part in (warm[: third + 1], warm[-third - 1 :]))
    held = {name: [getattr(each, name) for each in warm] for name in ("descriptors", "threads")}
    found = {
        "minutes": samples[-1].seconds / 60.0,
        "steps": samples[-1].steps,
        "restarts": samples[-1].restarts,
        "megabytes": {"first": warm[0].megabytes, "last": warm[-1].megabytes, "per_minute": slope},
        "steps_per_second": {"first_third": first, "last_third": last, "ratio": last / first},
        **{name: {"least": min(values), "greatest": max(values)} for name, values in held.items()},
    }
    problems = [f"memory grows by {slope:.2f} MB a minute"] if slope >= GROWTH else []
    problems += [f"the last third is {last / first:.2f} times as fast as the first"] if last < SLOWEST * first else []
    for name, values in held.items():
        before, after = (statistics.median(part) for part in (values[: third + 1], values[-third - 1 :]))
        problems += [f"{name} grew from {before} to {after}"] if after > before else []
    return found, problems


def _sample(seconds: float, steps: int, restarts: int) -> Sample:
    this = psutil.Process()
    resident = 0
    for process in (this, *this.children(recursive=True)):
        try:
            resident += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return Sample(seconds, steps, restarts, resident / 1e6, this.num_fds(), this.num_threads())


def _speed(samples: Sequence[Sample]) -> float:
    return (samples[-1].steps - samples[0].steps) / (samples[-1].seconds - samples[0].seconds)


def main() -> int:
    """Soaks as told; 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the result")
    args = parser.parse_args()
    logging.getLogger("slipstream").setLevel(logging.ERROR)  # of faults there are hundreds
    samples = soak(60.0 * args.minutes)
    found, problems = judge(samples)
    for name, value in found.items():
        print(f"{name}: {value}")
    print("; ".join(problems) or "nothing grows")
    if args.output:
        rows = [asdict(sample) for sample in samples]
        save({**conditions("cpu"), **found, "problems": problems, "samples": rows}, args.output)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
