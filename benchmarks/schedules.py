"""Speed of the schedules: steps per second of training, on Pong unless told.

    python benchmarks/schedules.py [--env ENV] [--of "ppo sync" "ppo concurrent"] [--rounds 3] [--seconds 20]
                                   [--device cpu] [--set KEY=VALUE] [--output benchmarks/results/...json]

In each round every schedule runs once, in turn, since other programs share the machine; what counts is the ratio to the
first one of the same algorithm in the same round, and for an algorithm with one only to the very first.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from record import conditions, save

from slipstream.run.presets import configure
from slipstream.run.speed import measure_speed

VARIANTS = ("ppo sync", "ppo concurrent", "appo sync", "appo concurrent", "appo async", "a2c sync", "a2c concurrent")


def reference(key: str, keys: Sequence[str]) -> str:
    """What a variant is compared with."""
    alike = [other for other in keys if other.split()[0] == key.split()[0]]
    return alike[0] if len(alike) > 1 else keys[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="ALE/Pong-v5")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/schedules.json"))
    parser.add_argument("--of", nargs="+", default=VARIANTS, metavar="'ALGO SCHEDULE'")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    args = parser.parse_args()

    fixed = {"net.torso": "nature_cnn", "placement.device": args.device}
    fixed |= dict(item.split("=", 1) for item in args.settings)
    speeds: dict[str, list[float]] = {key: [] for key in args.of}
    references = {key: reference(key, args.of) for key in args.of}
    for number in range(args.rounds):
        for key, found in speeds.items():
            algo, schedule = key.split()
            config = configure(algo, args.env, {**fixed, "schedule": schedule})
            found.append(measure_speed(config, args.seconds).steps_per_second)
            print(f"round {number + 1} {key}: {found[-1]:.0f} steps/s", flush=True)
    ratios = {
        key: statistics.median(a / b for a, b in zip(found, speeds[references[key]], strict=True))
        for key, found in speeds.items()
    }
    for key, ratio in ratios.items():
        print(f"{key}: {ratio:.2f} of {references[key]}")
    result = {
        **conditions(args.device),
        "env": args.env,
        "settings": fixed,
        "median_ratio_to": {key: [references[key], ratio] for key, ratio in ratios.items()},
        "steps_per_second": speeds,
    }
    save(result, args.output)


if __name__ == "__main__":
    main()
