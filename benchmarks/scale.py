"""How speed grows with cores, lanes and environments on one machine, beside what `slipstream doctor` predicts.

    python benchmarks/scale.py [--algo ppo] [--env ALE/Pong-v5] [--rounds 3] [--seconds 10] [--set KEY=VALUE ...]
                               [--output benchmarks/results/scale.json]

Every shape (environments x lanes) under every schedule trains for some seconds on 1, 2, 4, ... of the cores that there
are, in a process that may use those only; the numbers of cores take turns, and what counts is the median. What the
stages of a shape cost is measured once, on one core, and `run/scale.py` makes a prediction of that.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from slipstream.run import presets
from slipstream.run.config import Config, override
from slipstream.run.limit import measure
from slipstream.run.record import conditions, save
from slipstream.run.scale import CORES, predicted
from slipstream.run.speed import measure_speed

Result = TypeVar("Result")

SHAPES = ((8, 2), (16, 2), (16, 4), (32, 4), (64, 4))
"""Environments and lanes; a shard per lane."""


def confined(cores: int, function: Callable[..., Result], *words: Any) -> Result:
    """What a function returns in a process that may use so many cores."""
    mine = sorted(os.sched_getaffinity(0))[:cores]
    with ProcessPoolExecutor(1, get_context("spawn"), os.sched_setaffinity, (0, mine)) as pool:
        return pool.submit(function, *words).result()


def row(config: Config, counts: list[int], rounds: int, seconds: float) -> dict[str, Any]:
    """What a configuration does on each number of cores."""
    stages = confined(1, measure, override(config, {"placement.env_workers": 0}), seconds / 3)
    found: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(rounds):
        for count, speeds in found.items():
            speeds.append(confined(count, measure_speed, config, seconds).steps_per_second)
    speeds = {count: statistics.median(each) for count, each in found.items()}
    said = {count: predicted(config, stages, count) for count in counts}
    return {
        **{"schedule": config.schedule, "num_envs": config.num_envs, "lanes": config.lanes},
        **{"stages": stages.metrics(), "steps_per_second": speeds, "predicted": said},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algo", default="ppo")
    parser.add_argument("--env", default="ALE/Pong-v5")
    parser.add_argument("--schedules", nargs="+", default=["sync", "concurrent"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/scale.json"))
    args = parser.parse_args()

    given: dict[str, Any] = dict(item.split("=", 1) for item in args.settings)  # `configure` reads words as they are
    given |= {"placement.device": "cpu", "total_steps": 10**9}
    most = len(os.sched_getaffinity(0))
    counts = [count for count in CORES if count < most] + [most]
    rows: list[dict[str, Any]] = []
    print(
        f"| schedule | envs | lanes | {' | '.join(f'{count} cores: steps/s | predicted | ratio' for count in counts)} |"
    )
    print("|---" * (3 + 3 * len(counts)) + "|")
    for schedule in args.schedules:
        for envs, lanes in SHAPES:
            shape = {"schedule": schedule, "num_envs": envs, "lanes": lanes, "shards": lanes}
            config = presets.configure(args.algo, args.env, {**given, **shape})
            rows.append(found := row(config, counts, args.rounds, args.seconds))
            pairs = [(found["steps_per_second"][count], found["predicted"][count]) for count in counts]
            cells = (f"{speed:,.0f} | {said:,.0f} | {speed / said:.2f}" for speed, said in pairs)
            print(f"| {schedule} | {envs} | {lanes} | {' | '.join(cells)} |", flush=True)
    save({**conditions("cpu"), "algo": args.algo, "env": args.env, "rows": rows}, args.output)


if __name__ == "__main__":
    main()
