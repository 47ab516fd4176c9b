"""Speed of the schedules on Pong: PPO sync and concurrent, APPO sync, concurrent and async, A2C sync and concurrent.

    python benchmarks/schedules.py [--rounds 3] [--seconds 20] [--device cpu] [--output benchmarks/results/...json]

In each round every schedule runs once, in turn, since other programs share the machine; what counts is the ratio to
`sync` of the same algorithm in the same round.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from record import conditions, save
from throughput import training_speed

from slipstream.run.presets import configure

SCHEDULES = {
    "ppo": ("sync", "concurrent"),
    "appo": ("sync", "concurrent", "async"),
    "a2c": ("sync", "concurrent"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="ALE/Pong-v5")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/schedules.json"))
    args = parser.parse_args()

    speeds: dict[str, list[float]] = {f"{algo} {name}": [] for algo, names in SCHEDULES.items() for name in names}
    for number in range(args.rounds):
        for key, found in speeds.items():
            algo, schedule = key.split()
            settings = {"net.torso": "nature_cnn", "schedule": schedule, "placement.device": args.device}
            found.append(training_speed(configure(algo, args.env, settings), args.seconds))
            print(f"round {number + 1} {key}: {found[-1]:.0f} steps/s")
    ratios = {
        key: statistics.median(a / b for a, b in zip(found, speeds[f"{key.split()[0]} sync"], strict=True))
        for key, found in speeds.items()
    }
    for key, ratio in ratios.items():
        print(f"{key}: {ratio:.2f} of sync")
    result = {
        **conditions(args.device),
        "env": args.env,
        "torso": "nature_cnn",
        "median_ratio_to_sync": ratios,
        "steps_per_second": speeds,
    }
    save(result, args.output)


if __name__ == "__main__":
    main()
