"""What waiting for environments costs: lanes of several sizes, collecting and training, against a simulation.

    python benchmarks/waiting.py [--seconds 8] [--updates 20] [--mean-ms 5] [--parts collect train]

Environments sleep for exponential times (`toy:step_time`), so that two cores are enough for sixty-four of them. Lanes
that have answered share one forward (`group`), and all wait for each other every T rows.

collect     efficiency = mean step time / time per row, 1 if nobody ever waited. `simulated` is what the very times that
            were slept would give if everything but sleeping took no time, `table` the same for many other draws.
            `sync` is one lane of all environments: every row waits for the slowest.
train       the same number of updates of the same algorithm under several schedules.

Results go to benchmarks/results/waiting.json, with a plot beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from gymnasium.utils import seeding
from numpy.typing import NDArray

from slipstream import arithmetic, dice, slab
from slipstream.collector import Assignment, home
from slipstream.envs import EnvOptions, make_envs
from slipstream.envs.step_time import StepTime
from slipstream.nets.actor_critic import make_actor_critic
from slipstream.nets.trunk import Network
from slipstream.ready import make_collector
from slipstream.run.presets import configure
from slipstream.run.record import conditions, save
from slipstream.run.training import Training

mpl.use("Agg")
from matplotlib import pyplot as plt

Cell = dict[str, Any]

ENVS, UNROLLS, LANE_SIZES = (4, 16, 64), (1, 4, 16, 64, 128), (1, 4, 16)
LENGTH, SEED, WARM_UP = 1000, 7, 2
HIDDEN = (32,)  # small, so that inference takes little of a step

# Efficiency of lanes of one slot, by number of environments and T: SYSTEMS.md C.2.
PUBLISHED = {
    4: {1: 0.48, 4: 0.65, 16: 0.79, 64: 0.88, 128: 0.92, 512: 0.96},
    16: {1: 0.30, 4: 0.49, 16: 0.67, 64: 0.81, 128: 0.86, 512: 0.93},
    64: {1: 0.21, 4: 0.39, 16: 0.59, 64: 0.76, 128: 0.82, 512: 0.90},
    256: {1: 0.16, 4: 0.33, 16: 0.54, 64: 0.72, 128: 0.79, 512: 0.89},
}


def intervals(steps: NDArray[np.float64], lane_size: int, unroll: int) -> NDArray[np.float64]:
    """Seconds between barriers, of the step times `[n, rows]`: the slowest lane's sum of its slowest slots' steps."""
    lanes = steps.reshape(-1, lane_size, steps.shape[1]).max(axis=1)
    whole = lanes[:, : steps.shape[1] // unroll * unroll]
    return whole.reshape(len(lanes), -1, unroll).sum(axis=2).max(axis=0)


def table(n: int, lane_size: int, unroll: int, numbers: int = 20_000_000) -> float:
    """Efficiency in simulation, from about so many exponential step times."""
    generator = np.random.Generator(np.random.Philox(SEED))
    batch = max(1, 2_000_000 // (n * unroll)) * unroll
    drawn = [
        intervals(generator.exponential(1.0, (n, batch)), lane_size, unroll)
        for _ in range(math.ceil(numbers / n / batch))
    ]
    return float(unroll / np.mean(np.concatenate(drawn)))


def step_times(env: StepTime, n: int, rows: int) -> NDArray[np.float64]:
    """The seconds that rows of `n` slots of `env` take, `[n, rows]`, the first reset left out."""

    def life(slot: int) -> NDArray[np.float64]:
        count = rows // (env.length + 1) + 1
        seeds = [dice.env_seed(SEED, "env", slot, episode) for episode in range(count)]
        return np.concatenate([env.episode(seeding.np_random(seed)[0])[1] for seed in seeds])[1 : rows + 1]

    return np.stack([life(slot) for slot in range(n)])


def collecting(n: int, lane_size: int, unroll: int, expected: float, mean_ms: float, seconds: float) -> Cell:
    """Collects for about `seconds` and compares with the simulation of the same step times."""
    kwargs: dict[str, Any] = {"mean_ms": mean_ms, "length": LENGTH}
    lanes, mean = n // lane_size, mean_ms / 1000.0
    envs = make_envs("toy:step_time", n, lanes, EnvOptions(kwargs=kwargs))
    policy = make_actor_critic(envs.spec, Network(hidden=HIDDEN), None, SEED)
    trajectory = slab.allocate(envs.spec, policy, unroll)
    envs.reset(SEED)
    collector = make_collector(Assignment(envs, range(lanes), policy, [trajectory], SEED, int), lanes)
    places = home(collector.lanes, lane_size, 0)
    for _ in range(WARM_UP):
        collector.collect(places)
    count = max(3, math.ceil(seconds * expected / (unroll * mean)))
    start = time.perf_counter()
    for _ in range(count):
        collector.collect(places)
    elapsed = time.perf_counter() - start
    envs.close()
    slept = intervals(step_times(StepTime(**kwargs), n, (WARM_UP + count) * unroll), lane_size, unroll)[WARM_UP:]
    ideal = count * unroll * mean
    return {
        "envs": n,
        "lane_size": lane_size,
        "unroll": unroll,
        "intervals": count,
        "measured": ideal / elapsed,
        "simulated": ideal / float(slept.sum()),
        "table": expected,
        "ratio": float(slept.sum()) / elapsed,
        "ratio_to_table": ideal / elapsed / expected,
    }


def training(algo: str, n: int, name: str, unroll: int, mean_ms: float, updates: int) -> Cell:
    """Trains for so many updates after the first and takes the time."""
    lanes = 1 if name == "sync" else n
    schedule = {"sync": "sync", "sync, lanes of one": "sync"}.get(name, name)
    # One collector for all lanes, also under `async`, where several would not wait for each other at the end of an
    # unroll: with four that was 1.7 times as fast as `sync` instead of 3, since threads of small forwards are in each
    # other's way.
    settings = {
        "placement.device": "cpu",
        "schedule": schedule,
        "num_envs": n,
        "lanes": lanes,
        "group": lanes,
        "shards": 1,  # operations of so small a network are too short for a second thread to get Python's lock
        "unroll": unroll,
        "total_steps": 10**9,
        "net.hidden": HIDDEN,
        "env_options.kwargs": {"mean_ms": mean_ms, "length": LENGTH},
    }
    run = Training(configure(algo, "toy:step_time", settings))
    try:
        reports = iter(run)
        first = next(reports)
        start = time.perf_counter()
        last = first
        for last in reports:
            if last.update - first.update >= updates:
                break
        seconds = time.perf_counter() - start
    finally:
        run.close()
    steps = last.steps - first.steps
    return {"envs": n, "schedule": name, "seconds": seconds, "updates": updates, "steps_per_second": steps / seconds}


def collect_all(mean_ms: float, seconds: float) -> list[Cell]:
    """Every cell; `sync` is the one whose lane holds all environments."""
    cells: list[Cell] = []
    for n in ENVS:
        for lane_size in [*(size for size in LANE_SIZES if size < n), n]:
            for unroll in UNROLLS:
                expected = table(n, lane_size, unroll)
                cells.append(collecting(n, lane_size, unroll, expected, mean_ms, seconds))
                told = " ".join(f"{key} {value:.3f}" for key, value in cells[-1].items() if isinstance(value, float))
                print(f"n {n:3} lanes of {lane_size:2} T {unroll:3}: {told}", flush=True)
    return cells


def train_all(algo: str, unroll: int, mean_ms: float, updates: int) -> list[Cell]:
    """Every schedule, with its speed-up over per-step synchronous training."""
    cells: list[Cell] = []
    for n in (16, 64):
        for name in ("sync", "sync, lanes of one", "concurrent", "async"):
            cells.append(training(algo, n, name, unroll, mean_ms, updates))
            slowest = next(cell for cell in cells if cell["envs"] == n)
            cells[-1]["speedup"] = slowest["seconds"] / cells[-1]["seconds"]
            print(f"n {n:3} {name}: {cells[-1]['seconds']:.1f} s, {cells[-1]['speedup']:.2f} x", flush=True)
    return cells


def published() -> list[Cell]:
    """The table of SYSTEMS.md beside the same simulation here."""
    return [
        {"envs": n, "unroll": unroll, "published": value, "simulated": table(n, 1, unroll)}
        for n, row in PUBLISHED.items()
        for unroll, value in row.items()
    ]


def plot(result: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(1, len(ENVS) + 1, figsize=(15, 4), layout="constrained")
    for n, axis in zip(ENVS, axes, strict=False):
        mine = [cell for cell in result["collect"] if cell["envs"] == n]
        for number, size in enumerate(sorted({cell["lane_size"] for cell in mine})):
            cells = [cell for cell in mine if cell["lane_size"] == size]
            unrolls = [cell["unroll"] for cell in cells]
            label = "sync (one lane)" if size == n else f"lanes of {size}"
            axis.plot(unrolls, [cell["table"] for cell in cells], color=f"C{number}", label=f"{label}, simulated")
            axis.plot(
                unrolls, [cell["measured"] for cell in cells], "o", color=f"C{number}", label=f"{label}, measured"
            )
        axis.set(title=f"{n} environments", xlabel="rows between barriers", ylim=(0, 1))
        axis.set_xscale("log", base=2)
        axis.legend(fontsize=7)
    axes[0].set_ylabel("efficiency: mean step time / time per row")
    bars: list[Cell] = result["train"]
    names = [f"{cell['envs']} envs, {cell['schedule']}" for cell in bars]
    axes[-1].barh(
        names, [cell["speedup"] for cell in bars], color=["C0" if cell["envs"] == 16 else "C1" for cell in bars]
    )
    axes[-1].invert_yaxis()
    axes[-1].set(title="training, same updates", xlabel="times as fast as sync")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="of collecting, for each cell")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--mean-ms", type=float, default=5.0)
    parser.add_argument("--unroll", type=int, default=128, help="rows between two updates in training")
    parser.add_argument("--algo", default="appo", help="one that may learn under every schedule")
    parser.add_argument("--parts", nargs="+", choices=["collect", "train"], default=["collect", "train"])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/waiting.json"))
    args = parser.parse_args()

    arithmetic.adopt()
    result: dict[str, Any] = {"collect": [], "train": [], "published": []}
    if args.output.exists():
        result |= json.loads(args.output.read_text())
    result["made"] = result.get("made", {}) | {part: conditions("cpu") for part in args.parts}
    if "collect" in args.parts:
        result["published"] = published()
        result["collect"] = collect_all(args.mean_ms, args.seconds)
        ratios = [cell["ratio_to_table"] for cell in result["collect"]]
        print(f"measured / table between {min(ratios):.3f} and {max(ratios):.3f}")
    if "train" in args.parts:
        result["train"] = train_all(args.algo, args.unroll, args.mean_ms, args.updates)
    save(result, args.output)
    plot(result, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
