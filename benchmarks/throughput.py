"""PPO and A2C on Pong with the nature CNN: training speed against the sum of the stages measured alone.

    python benchmarks/throughput.py [--rounds 3] [--seconds 20] [--device cpu] [--output benchmarks/results/...json]

Each round measures, for each algorithm, the stages alone and then training itself; medians over the rounds are
reported, since other programs share the machine.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from record import conditions, save

from slipstream.run import limit
from slipstream.run.presets import configure
from slipstream.run.speed import measure_speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="ALE/Pong-v5")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/throughput.json"))
    args = parser.parse_args()

    rounds: dict[str, list[dict[str, float]]] = {"ppo": [], "a2c": []}
    for number in range(args.rounds):
        for algo, rows in rounds.items():
            config = configure(algo, args.env, {"net.torso": "nature_cnn", "placement.device": args.device})
            stages = limit.measure(config, args.seconds / 6)
            speed = measure_speed(config, args.seconds).steps_per_second
            rows.append({**stages.metrics(), "steps_per_second": speed, "efficiency": speed / stages.limit})
            print(f"round {number + 1} {algo}: {speed:.0f} of {stages.limit:.0f} steps/s, {speed / stages.limit:.2f}")
    result = {
        **conditions(args.device),
        "env": args.env,
        "torso": "nature_cnn",
        "median": {
            algo: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for algo, rows in rounds.items()
        },
        "rounds": rounds,
    }
    save(result, args.output)


if __name__ == "__main__":
    main()
