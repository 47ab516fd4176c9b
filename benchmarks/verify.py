"""The determinism contract in a table: algorithms x schedules x environments x lanes x seven placements.

    python benchmarks/verify.py [--updates 20] [--delay 0.002] [--only TEXT] [--output benchmarks/results/verify.json]

Every cell is one configuration, run inline without delays and then under the other placements with random delays in
environments, workers and loaders; after every update all cells of the trajectory, all tensors of the learner and the
priorities of its replay are compared.
The output is written after every cell, and cells that are in it already are not run again. They run in a process that
is replaced every few cells, since EnvPool does not give back all memory of football's engines.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from slipstream.run.options import PLACEMENTS
from slipstream.run.presets import configure
from slipstream.run.record import conditions, save
from slipstream.run.verify import verify

ALGORITHMS: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo": ("ppo", {"algo.epochs": 2, "algo.batch_size": 32}),
    "a2c": ("a2c", {}),
    # Items are whole columns of 8 rows, and there are up to 8 shards.
    "recurrent ppo": ("ppo", {"algo.epochs": 2, "algo.batch_size": 64, "net.core": "lstm", "net.core_size": 32}),
    "impala": ("impala", {}),
    "appo": ("appo", {"algo.epochs": 2, "algo.batch_size": 32}),
}
ENVS: dict[str, dict[str, Any]] = {
    "ALE/Pong-v5": {"net.torso": "nips_cnn"},
    "CartPole-v1": {"placement.env_workers": 2},
    "envpool:gfootball/academy_empty_goal_close-v1": {"net.torso": "nips_cnn"},
}
LANES = (1, 2, 4, 8)
SLOTS, ROWS = 8, 8
SMALL = {"algo.replay.learning_starts": 100, "algo.replay.capacity": 2_000, "algo.batch_size": 32}
REPLAYS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dqn": ("dqn", "CartPole-v1", {**SMALL, "placement.env_workers": 2}),
    "dqn, images": ("dqn", "ALE/Pong-v5", {**SMALL, "net.torso": "nips_cnn"}),
    "rainbow": ("rainbow", "CartPole-v1", {**SMALL, "placement.env_workers": 2}),
    "rainbow, images": ("rainbow", "ALE/Pong-v5", {**SMALL, "net.torso": "nips_cnn"}),
    "r2d2": ("r2d2", "CartPole-v1", {**SMALL, "algo.burn_in": 8, "algo.length": 16, "placement.env_workers": 2}),
    "sac": ("sac", "Pendulum-v1", {**SMALL, "placement.env_workers": 2}),
    "td3": ("td3", "Pendulum-v1", {**SMALL, "placement.env_workers": 2}),
    "appo with replay": (
        "appo",
        "ALE/Pong-v5",
        {"algo.epochs": 2, "algo.batch_size": 32, "algo.replay.proportion": 1.0, "net.torso": "nips_cnn"},
    ),
}


def cells() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, environment and settings of every cell."""
    for env, env_settings in ENVS.items():
        for name, (algo, settings) in ALGORITHMS.items():
            for schedule in ("sync", "concurrent"):
                for lanes in LANES:
                    # One shard per lane: the gradient of a minibatch must share out over them.
                    size = {"num_envs": SLOTS, "unroll": ROWS, "lanes": lanes, "shards": 0, "schedule": schedule}
                    yield (
                        f"{name}, {schedule}, {env}, {lanes} lanes",
                        algo,
                        {"env": env, **size, **env_settings, **settings},
                    )
    for name, (algo, env, settings) in REPLAYS.items():
        for schedule in ("sync", "concurrent"):
            size = {"num_envs": SLOTS, "unroll": ROWS, "lanes": 2, "schedule": schedule}
            yield f"{name}, {schedule}, {env}, 2 lanes", algo, {"env": env, **size, **settings}


def verdicts_of(algo: str, env: str, settings: dict[str, Any], updates: int, delay: float) -> tuple[Any, str]:
    """What became of every placement, and the hash of the reference's last weights."""
    config = configure(algo, env, {"placement.device": "cpu", **settings})
    outcomes = list(verify(config, updates, PLACEMENTS, delay))
    verdicts = {
        outcome.placement: outcome.difference or outcome.refused or f"identical, {outcome.updates} updates"
        for outcome in outcomes
    }
    return verdicts, outcomes[0].digest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--delay", type=float, default=0.002)
    parser.add_argument("--only", default="")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/verify.json"))
    args = parser.parse_args()

    result = json.loads(args.output.read_text()) if args.output.exists() else {"cells": {}}
    wanted = [cell for cell in cells() if args.only in cell[0] and cell[0] not in result["cells"]]
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=4) as worker:
        for name, algo, settings in wanted:
            start = time.perf_counter()
            env = settings.pop("env")
            verdicts, digest = worker.submit(verdicts_of, algo, env, settings, args.updates, args.delay).result()
            seconds = round(time.perf_counter() - start)
            made = {"placements": verdicts, "digest": digest, "seconds": seconds}
            result["cells"][name] = {**made, **conditions("cpu")}
            print(f"{name}: {'; '.join(sorted(set(verdicts.values())))} ({seconds} s)", flush=True)
            save(result, args.output)


if __name__ == "__main__":
    main()
