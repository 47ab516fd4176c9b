"""The model behind `slipstream doctor --plan`, held against runs: predicted and measured speed and lag.

    python benchmarks/plan.py [--actors 1 2 4 8] [--seconds 15] [--output benchmarks/results/plan.json]

IMPALA under `async` in actors of a private Ray cluster, one lane of one environment each, whose steps sleep (5 ms in
the mean, uniform), so that the cores are nearly free and every actor is like one on a machine of its own. The model
takes the step's mean time, and what an update took in the run; what an actor needs beside the sleeping is measured with
one actor alone, so that the row of one actor is a fit and the others are predictions.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from slipstream.run import presets
from slipstream.run.plan import Times, forecast
from slipstream.run.record import conditions, save
from slipstream.run.training import Training

MEAN_MS, UNROLL, MAX_LAG, WARM_UP = 5.0, 50, 2, 4
SPREAD = (1 / 3 / UNROLL) ** 0.5  # of a sum of uniform times


def measured(actors: int, seconds: float) -> dict[str, float]:
    """Steps per second, lag, and seconds of an update."""
    settings = {
        "schedule": "async",
        "max_lag": MAX_LAG,
        "num_envs": actors,
        "lanes": actors,
        "unroll": UNROLL,
        "total_steps": 10**9,
        "net.hidden": (16,),
        "placement.collectors": "ray",
        "env_options.kwargs": {"mean_ms": MEAN_MS, "distribution": "uniform", "length": 1000},
    }
    training = Training(presets.configure("impala", "toy:step_time", settings))
    try:
        reports = iter(training)
        for _ in range(WARM_UP):
            before = next(reports)
        start, lags, learned = time.perf_counter(), list[float](), list[float]()
        report, elapsed = before, 0.0
        for report in reports:
            lags.append(float(report.metrics["lag/mean"]))
            learned.append(report.seconds["learn"])
            if (elapsed := time.perf_counter() - start) >= seconds:
                break
        speed = (report.steps - before.steps) / elapsed
        return {"steps_per_second": speed, "lag": statistics.mean(lags), "learn": statistics.mean(learned)}
    finally:
        training.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=15.0, help="of each run")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/plan.json"))
    args = parser.parse_args()
    alone = measured(1, args.seconds)
    unroll = UNROLL / alone["steps_per_second"]
    rows: list[dict[str, Any]] = []
    print(f"an unroll takes {unroll:.3f} s, of which {UNROLL * MEAN_MS / 1000.0:.3f} s asleep")
    print("| actors | steps/s: predicted | measured | ratio | lag: predicted | measured |\n|---|---|---|---|---|---|")
    for actors in args.actors:
        found = alone if actors == 1 else measured(actors, args.seconds)
        said = forecast("async", actors, Times(unroll, 0.0, found["learn"], 0.0, SPREAD), MAX_LAG)
        speed = said.slabs_per_second * actors * UNROLL
        ratio = found["steps_per_second"] / speed
        rows.append({"actors": actors, "predicted": speed, "predicted_lag": said.lag, "ratio": ratio, **found})
        cells = f"{speed:,.0f} | {found['steps_per_second']:,.0f} | {ratio:.2f} | {said.lag:.2f} | {found['lag']:.2f}"
        print(f"| {actors} | {cells} |", flush=True)
    save({**conditions("cpu"), "unroll_seconds": unroll, "rows": rows}, args.output)


if __name__ == "__main__":
    main()
