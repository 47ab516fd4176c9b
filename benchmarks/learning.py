"""Learning curves: runs an algorithm on an environment for several seeds and says when it reached a target.

    python benchmarks/learning.py ppo CartPole-v1 --seeds 5 --target 475 [--total-steps 1e5] [--set algo.lr=1e-3]
    python benchmarks/learning.py ppo ALE/Pong-v5 --target 18 --of RUN RUN RUN      runs that are there already

A result is the mean return of the last 100 training episodes, as the run's metrics.jsonl has it. Runs are kept under
--runs; the summary goes to benchmarks/results/learning/ENV__ALGO.json, with a plot of the curves beside it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from pathlib import Path

import matplotlib as mpl
import torch

import slipstream
from slipstream.run.metrics import read
from slipstream.run.training import cores

mpl.use("Agg")
from matplotlib import pyplot as plt

Curve = list[tuple[int, float, float]]
"""(steps, mean return of the last 100 episodes, seconds since the start)."""


def curve(run: Path) -> Curve:
    """The learning curve of a run, from the first time that 100 episodes had ended."""
    rows = [row for row in read(run / "metrics.jsonl") if "rollout/ep_rew_mean" in row]
    whole = [row for row in rows if row["time/episodes"] >= 100]
    return [(row["time/steps"], row["rollout/ep_rew_mean"], row["time/seconds"]) for row in whole]


def summary(points: Curve, target: float) -> dict[str, float | None]:
    """Final and best return, and steps and seconds until the target was first reached (None if never)."""
    reached = next(((steps, seconds) for steps, value, seconds in points if value >= target), (None, None))
    return {
        "final": points[-1][1],
        "best": max(value for _, value, _ in points),
        "steps": points[-1][0],
        "seconds": points[-1][2],
        "steps_to_target": reached[0],
        "seconds_to_target": reached[1],
    }


def plot(curves: dict[int, Curve], title: str, target: float, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for seed, points in curves.items():
        axes.plot([point[0] for point in points], [point[1] for point in points], label=f"seed {seed}")
    axes.axhline(target, linestyle=":", color="grey", label=f"target {target:g}")
    axes.set(title=title, xlabel="steps (agent decisions)", ylabel="return, mean of the last 100 episodes")
    axes.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algo")
    parser.add_argument("env")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--target", type=float, required=True)
    parser.add_argument("--total-steps", type=float, default=None)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--eval-episodes", type=int, default=30)
    parser.add_argument("--of", nargs="+", type=Path, default=[], metavar="RUN")
    args = parser.parse_args()

    def train(seed: int) -> slipstream.Agent:
        total = args.total_steps
        return slipstream.train(args.algo, env=args.env, total_steps=total, seed=seed, config=settings, quiet=True)

    settings = {"log.dir": str(args.runs), **dict(item.split("=", 1) for item in args.settings)}
    name = f"{args.env.replace('/', '_').replace(':', '_')}__{args.algo}"
    folder = Path("benchmarks/results/learning")
    folder.mkdir(parents=True, exist_ok=True)
    curves: dict[int, Curve] = {}
    seeds: dict[int, dict[str, float | None]] = {}
    trained = (train(args.first_seed + number) for number in range(args.seeds))
    for agent in (slipstream.load(run) for run in args.of) if args.of else trained:
        seed = agent.config.seed
        assert agent.run is not None
        curves[seed] = curve(agent.run)
        seeds[seed] = summary(curves[seed], args.target)
        seeds[seed]["eval_mean"] = statistics.fmean(agent.evaluate(episodes=args.eval_episodes).returns)
        print(json.dumps({"seed": seed, **seeds[seed]}), flush=True)
        result = {
            "command": " ".join(["python", *sys.argv]),
            "machine": {"processor": platform.processor() or platform.machine(), "cores": cores()},
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "target": args.target,
            "eval_episodes": args.eval_episodes,
            "median_final": statistics.median(row["final"] or 0.0 for row in seeds.values()),
            "seeds": seeds,
        }
        (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
        plot(curves, f"{args.algo} on {args.env}", args.target, folder / f"{name}.png")


if __name__ == "__main__":
    main()
