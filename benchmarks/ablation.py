"""The RLDM 2019 system taken apart, on Pong: IMPALA, each of its additions alone, and all of them together.

    python benchmarks/ablation.py [--variants impala surrogate replay autoencoder all] [--seeds 1] [--device cuda]

Every run has a budget of 2 M steps and stops at a mean return of 18. Results are added, by variant and seed, to
benchmarks/results/learning/rldm_pong.json, with a plot of the curves beside it; the table that is printed at the end is
made of that file, so that it may be filled over several days. Runs that are there already are not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TABLE = Path("benchmarks/results/learning/rldm_pong.json")
BUDGET, ENOUGH = 2_000_000, 18.0

_SHARED = {"schedule": "async", "stop_at_return": ENOUGH, "net.precision": "auto"}
# One replayed unroll for each fresh one, drawn from the last 100,000 rows.
_REPLAY = {"algo.replay.proportion": 1.0, "algo.replay.capacity": 100_000}
# The newest frame is drawn from 256 numbers, which are all that policy and value see.
_AUTOENCODER = {"autoencoder.weight": 1.0, "autoencoder.frames": "newest", "net.latent": 256}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "impala": ("impala", {}),
    "surrogate": ("appo", {}),
    "replay": ("impala", _REPLAY),
    "autoencoder": ("impala", _AUTOENCODER),
    # Half the passes over twice the rows: as many gradient steps per collected row as without a replay.
    "all": ("appo", {**_REPLAY, **_AUTOENCODER, "algo.epochs": 2}),
}


def table() -> dict[str, dict[str, dict[str, Any]]]:
    """What is there: runs by variant and seed."""
    return json.loads(TABLE.read_text())["runs"] if TABLE.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    args = parser.parse_args()

    for variant in args.variants:
        algo, settings = VARIANTS[variant]
        place = {"placement.device": args.device, "placement.workers": args.workers}
        words = [f"{key}={value}" for key, value in {**_SHARED, **settings, **place}.items()]
        for seed in args.seeds:
            if str(seed) in table().get(variant, {}):
                continue
            command = [sys.executable, "benchmarks/learning.py", algo, "ALE/Pong-v5", "--total-steps", str(BUDGET)]
            command += ["--first-seed", str(seed), "--seeds", "1", "--targets", "0", "15", str(ENOUGH)]
            command += ["--name", variant, "--table", TABLE.stem, "--runs", str(args.runs)]
            subprocess.run([*command, *(word for each in words for word in ("--set", each))], check=True)

    print("| variant | seed | steps to 18 | minutes to 18 | best | steps | minutes | evaluation |")
    print("|---|---|---|---|---|---|---|---|")
    for variant, seeds in table().items():
        for seed, run in seeds.items():
            steps, minutes = (run["reached"][f"{ENOUGH:g}"][key] or "-" for key in ("steps", "minutes"))
            ends = f"{run['best']} | {run['steps']} | {run['minutes']} | {run['eval_mean']:.1f}"
            print(f"| {variant} | {seed} | {steps} | {minutes} | {ends} |")


if __name__ == "__main__":
    main()
