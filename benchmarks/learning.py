"""Learning curves: trains for several seeds, or takes runs that are there, and says when they reached what.

    python benchmarks/learning.py ppo CartPole-v1 --seeds 5 --targets 475 [--total-steps 1e5] [--set algo.lr=1e-3]
    python benchmarks/learning.py --of RUN RUN RUN --targets 15 18 [--name ppo]

A result is the mean return of the last 100 training episodes, as the run's metrics.jsonl has it; with --by evaluation
it is that of the evaluations on the way (--set log.eval_every=1000), for runs of few episodes. Runs are kept under
--runs. The table of an environment is benchmarks/results/learning/ENV.json, with a plot of the curves beside it: every
call adds its runs to those of other algorithms, schedules and seeds, which is how long runs of several days meet.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shlex
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

import slipstream
from slipstream.run.metrics import read
from slipstream.run.record import made, save

mpl.use("Agg")
from matplotlib import pyplot as plt

FOLDER = Path("benchmarks/results/learning")
POINTS = 200  # kept of a curve

Curve = list[list[float]]
"""[steps, mean return of the last 100 episodes, seconds of training] each."""
Table = dict[str, dict[str, dict[str, Any]]]
"""What was reached, by name of the variant and seed."""


MEASURES = {"training": "rollout/ep_rew_mean", "evaluation": "eval/mean_reward"}


def curve(run: Path, by: str = "training") -> Curve:
    """The learning curve of a run; that of training from the first time that 100 episodes had ended."""
    name, rows = MEASURES[by], read(run / "metrics.jsonl")
    counted = [row for row in rows if name in row and (by == "evaluation" or row["time/episodes"] >= 100)]
    return [[row["time/steps"], row[name], round(row["time/seconds"], 1)] for row in counted]


def reached(points: Curve, target: float) -> dict[str, float | None]:
    """Steps and minutes until the mean was first at the target; None if it never was."""
    steps, _, seconds = next((point for point in points if point[1] >= target), [None, None, None])
    return {"steps": steps, "minutes": None if seconds is None else round(seconds / 60.0, 1)}


def entry(agent: slipstream.Agent, targets: list[float], eval_episodes: int, by: str) -> dict[str, Any]:
    """What the table says of a run."""
    assert agent.run is not None
    points, last = curve(agent.run, by), read(agent.run / "metrics.jsonl")[-1]
    kept = sorted({int(place) for place in np.linspace(0, len(points) - 1, POINTS)}) if points else []
    words = shlex.split((agent.run / "command.txt").read_text())
    facts = json.loads((agent.run / "env.json").read_text())
    device = "cuda" if facts["gpus"] and agent.config.placement.device != "cpu" else "cpu"
    return {
        "by": by,
        "final": points[-1][1] if points else None,  # 100 episodes have not ended
        "best": max((value for _, value, _ in points), default=None),
        "steps": last["time/steps"],
        "minutes": round(last["time/seconds"] / 60.0, 1),
        "reached": {f"{target:g}": reached(points, target) for target in targets},
        "eval_episodes": eval_episodes,
        "eval_mean": statistics.fmean(agent.evaluate(episodes=eval_episodes).returns) if eval_episodes else None,
        **made(words, facts, device),
        "curve": [points[place] for place in kept],
    }


def plot(table: Table, env: str, targets: list[float], path: Path) -> None:
    """One colour per variant, one line per seed."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for number, (name, seeds) in enumerate(table.items()):
        lines = [run["curve"] for run in seeds.values() if run["curve"]]
        for first, points in enumerate(lines):
            label = f"{name} ({len(seeds)})" if first == 0 else None
            axes.plot([p[0] for p in points], [p[1] for p in points], color=f"C{number}", label=label, alpha=0.8)
    for target in targets:
        axes.axhline(target, linestyle=":", color="grey")
    axes.set(
        title=env,
        xlabel="steps (agent decisions)",
        ylabel="mean return of 100 episodes, or of evaluations",
    )
    axes.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def agents(args: argparse.Namespace) -> Iterator[slipstream.Agent]:
    """The runs of `--of`, or new ones, each as soon as it is there."""
    for run in args.of:
        yield slipstream.load(run)
    settings = {"log.dir": str(args.runs), **dict(item.split("=", 1) for item in args.settings)}
    for seed in range(args.first_seed, args.first_seed + (0 if args.of else args.seeds)):
        yield slipstream.train(
            args.algo, env=args.env, total_steps=args.total_steps, seed=seed, config=settings, quiet=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algo", nargs="?")
    parser.add_argument("env", nargs="?")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--targets", type=float, nargs="+", required=True)
    parser.add_argument("--total-steps", type=float, default=None)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--eval-episodes", type=int, default=30)
    parser.add_argument("--of", nargs="+", type=Path, default=[], metavar="RUN")
    parser.add_argument("--name", default="", help="of the variant, in the table; else algorithm, schedule, --set")
    parser.add_argument("--by", choices=MEASURES, default="training")
    parser.add_argument("--table", default="", help="file of results that is added to; else the environment's")
    parser.add_argument("--replace", action="store_true", help="a run of the same name and seed in the table")
    args = parser.parse_args()
    if bool(args.of) == bool(args.env):
        parser.error("give either ALGO and ENV, or runs with --of")

    left_out = 0
    for agent in agents(args):
        env = agent.config.env
        file = FOLDER / f"{args.table or env.replace('/', '_').replace(':', '_')}.json"
        name = args.name or " ".join([agent.config.algo.name, agent.config.schedule, *args.settings])
        found = entry(agent, args.targets, args.eval_episodes, args.by)
        print(name, json.dumps({"seed": agent.config.seed, **found, "curve": len(found["curve"])}), flush=True)
        with alone(file.parent):  # another process may add its runs at the same time
            table: Table = json.loads(file.read_text())["runs"] if file.exists() else {}
            seeds = table.setdefault(name, {})
            if str(agent.config.seed) in seeds and not args.replace:
                print(f"{file} has {name!r} of this seed: add {agent.run} with --name or --replace", flush=True)
                left_out += 1
                continue
            seeds[str(agent.config.seed)] = found
            save({"env": env, "runs": table}, file)
            plot(table, env, args.targets, file.with_suffix(".png"))
    if left_out:
        parser.exit(1, f"runs that are not in the table: {left_out}\n")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time is inside, for each folder."""
    folder.mkdir(parents=True, exist_ok=True)
    place = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)


if __name__ == "__main__":
    main()
