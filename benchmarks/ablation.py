"""The RLDM 2019 system taken apart, on Pong: IMPALA, each of its additions alone, and all of them together.

    python benchmarks/ablation.py [--variants impala surrogate replay autoencoder all] [--seeds 1] [--device cuda]
    python benchmarks/ablation.py --speeds 3 [--device cuda]        then, with nothing beside it: minutes

Every run has a budget of 2 M steps and stops at a mean return of 18. Results are added, by variant and seed, to
benchmarks/results/learning/rldm_pong.json, with a plot of the curves beside it; the table that is printed at the end is
made of that file, so that it may be filled over several days. Runs that are there already are not run again.

Days and machines differ in speed, so the minutes of the table are steps over the speed of the variant in short runs of
all variants in turn, medians over the rounds: benchmarks/results/learning/rldm_pong_speeds.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from slipstream.run.presets import configure
from slipstream.run.record import conditions, save
from slipstream.run.speed import measure_speed

TABLE = Path("benchmarks/results/learning/rldm_pong.json")
SPEEDS = TABLE.with_name("rldm_pong_speeds.json")
BUDGET, ENOUGH = 2_000_000, 18.0
SECONDS = 60.0  # of a run that is only timed

# The network of 2013, which is nearest to the library's that the paper built on, and one learning rate.
_SHARED = {
    "schedule": "async",
    "stop_at_return": ENOUGH,
    "net.precision": "auto",
    "net.torso": "nips_cnn",
    "algo.lr": 1e-3,
}
# One replayed unroll for each fresh one, drawn from the last 100,000 rows.
_REPLAY = {"algo.replay.proportion": 1.0, "algo.replay.capacity": 100_000}
# The newest frame is drawn from 256 numbers, which are all that policy and value see.
_AUTOENCODER = {"autoencoder.weight": 1.0, "autoencoder.frames": "newest", "net.latent": 256}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "impala": ("impala", {}),
    "surrogate": ("appo", {}),
    "replay": ("impala", _REPLAY),
    "autoencoder": ("impala", _AUTOENCODER),
    # Half the passes over twice the rows: as many gradient steps per collected row as without a replay. Of replayed
    # rows a third of the surrogate is clipped away and none of the entropy bonus: at 0.01 (with nature_cnn) the entropy
    # was still at 1.2 nats after 1 M steps, and the return at 17 since 0.65 M; with 0.003 from there on it was at 17.97
    # after 0.12 M more. One replayed unroll for two fresh ones, of the last 25,000 rows (the 100 samples of 5
    # environments that the library of 2018 kept), in three passes was sooner at 0 in a seed that was stopped at 0.87 M,
    # and stood at 13.4 there.
    "all": ("appo", {**_REPLAY, **_AUTOENCODER, "algo.epochs": 2, "algo.ent_coef": 0.003}),
}


def table() -> dict[str, dict[str, dict[str, Any]]]:
    """What is there: runs by variant and seed."""
    return json.loads(TABLE.read_text())["runs"] if TABLE.exists() else {}


def measure(rounds: int, device: str) -> None:
    """Times all variants in turn, and writes down the medians."""
    found: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant, speeds in found.items():
            algo, settings = VARIANTS[variant]
            changes = {**_SHARED, **settings, "placement.device": device, "total_steps": BUDGET}
            speeds.append(measure_speed(configure(algo, "ALE/Pong-v5", changes), SECONDS).steps_per_second)
            print(f"{variant}: {speeds[-1]:,.0f} steps/s", flush=True)
    medians = {variant: statistics.median(speeds) for variant, speeds in found.items()}
    save({**conditions(device), "steps_per_second": medians, "rounds": found}, SPEEDS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--speeds", type=int, default=0, metavar="ROUNDS", help="time the variants, and train nothing")
    args = parser.parse_args()
    if args.speeds:
        measure(args.speeds, args.device)
        args.variants = []

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

    speeds: dict[str, Any] = json.loads(SPEEDS.read_text()) if SPEEDS.exists() else {"device": None}
    print("| variant | seed | steps to 18 | steps/s | minutes to 18 | best | steps | evaluation |")
    print("|---|---|---|---|---|---|---|---|")
    for variant in VARIANTS:
        for seed, run in table().get(variant, {}).items():
            steps = run["reached"][f"{ENOUGH:g}"]["steps"]
            pace = speeds["steps_per_second"][variant] if run["device"] == speeds["device"] else None
            minutes = f"{steps / pace / 60:.0f}" if steps and pace else "-"
            shown = f"{steps or '-'} | {f'{pace:.0f}' if pace else '-'} | {minutes}"
            print(f"| {variant} | {seed} | {shown} | {run['best']} | {run['steps']} | {run['eval_mean']:.1f} |")


if __name__ == "__main__":
    main()
