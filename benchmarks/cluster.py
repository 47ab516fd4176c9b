"""Collectors on a Ray cluster of several nodes, all on this machine: speed, lag, and bytes per step over the wire.

    python benchmarks/cluster.py [--rounds 3] [--seconds 20] [--nodes 2] [--output benchmarks/results/cluster.json]

Every node is a raylet with an object store of its own (`ray.cluster_utils.Cluster`), so that what an actor of the
second node sends goes through both, as between machines, but over this machine's own network. In a round each of PPO
(`sync`) and APPO (`async`) trains on Pong with collector processes and with Ray actors, in turn. `over the least` is
what came through the object stores over what a step can't do without: one frame, action, reward, flags and what the
algorithm needs of acting. For actors beside processes on one node: `slipstream bench ppo --env ALE/Pong-v5 --placements
process:2 ray:2`.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from slipstream import tree
from slipstream.run import presets
from slipstream.run.config import Config
from slipstream.run.limit import learning_at_once
from slipstream.run.record import conditions, save
from slipstream.run.training import Training
from slipstream.run.verify import placement_of
from slipstream.types import Report

ENV = "ALE/Pong-v5"
RUNS = {"ppo": {"schedule": "sync"}, "appo": {"schedule": "async"}}
WARM_UP = 2


def configured(algo: str, placement: str) -> Config:
    """The preset, on as many lanes as there are to be collectors on both nodes."""
    changes = {**RUNS[algo], "num_envs": 16, "lanes": 4, "net.torso": "nature_cnn"}
    config = presets.configure(algo, ENV, changes)
    config = replace(config, placement=placement_of(placement, config.placement), stop_at_return=None)
    return learning_at_once(config)


def least(report: Report) -> float:
    """Bytes of a valid row of one slot if each frame came once, dead rows being of no use."""
    rows = report.trajectory
    frames = rows.obs.shape[2]
    columns = [leaf for name, leaf in tree.items(vars(rows)) if name not in ("obs", "slot")]
    cells = rows.rows * rows.columns
    return rows.obs[0, 0].nbytes / frames + sum(leaf.nbytes for leaf in columns) / cells


def measured(config: Config, seconds: float) -> dict[str, float]:
    """Speed, lag and bytes of a training."""
    training = Training(config)
    try:
        reports = iter(training)
        for _ in range(WARM_UP):
            before = next(reports)
        start, lags, greatest = time.perf_counter(), list[float](), 0.0
        first = dict(before.metrics)
        report, elapsed = before, 0.0
        for report in reports:
            lags.append(float(report.metrics["lag/mean"]))
            greatest = max(greatest, float(report.metrics["lag/max"]))
            if (elapsed := time.perf_counter() - start) >= seconds:
                break
        steps = report.steps - before.steps
        found = {"steps_per_second": steps / elapsed, "lag_mean": statistics.mean(lags), "lag_max": greatest}
        if "cluster/megabytes" in first:
            brought = _steps(report.metrics) - _steps(first)
            size = 1e6 * float(report.metrics["cluster/megabytes"] - first["cluster/megabytes"]) / brought
            found |= {"bytes_per_step": size, "over_the_least": size / least(report)}
        return found
    finally:
        training.close()


def _steps(metrics: Mapping[str, Any]) -> float:
    return sum(float(value) for name, value in metrics.items() if name.startswith("cluster/steps_"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each training")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cluster.json"))
    args = parser.parse_args()
    import ray
    from ray.cluster_utils import Cluster

    os.environ |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    cluster = Cluster(initialize_head=True, connect=True, head_node_args={"num_cpus": 2})
    rounds: list[dict[str, dict[str, float]]] = []
    try:
        for _ in range(args.nodes - 1):
            cluster.add_node(num_cpus=2)
        cluster.wait_for_nodes()
        for number in range(args.rounds):
            rounds.append({})
            for algo in RUNS:
                for kind in ("process", "ray"):
                    name = f"{algo} {RUNS[algo]['schedule']} {kind}:{2 * args.nodes}"
                    rounds[-1][name] = found = measured(configured(algo, name.split()[-1]), args.seconds)
                    print(f"round {number + 1}, {name}: {found}", flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()
    names = list(rounds[0])
    medians = {
        name: {key: statistics.median(row[name][key] for row in rounds) for key in rounds[0][name]} for name in names
    }
    print(f"| {args.nodes} nodes on {platform.node()} | steps/s | lag: mean | max | bytes per step | over the least |")
    print("|---|---|---|---|---|---|")
    for name, row in medians.items():
        wire = f"{row['bytes_per_step']:,.0f} | {row['over_the_least']:.2f}" if "bytes_per_step" in row else " | "
        print(f"| {name} | {row['steps_per_second']:,.0f} | {row['lag_mean']:.2f} | {row['lag_max']:.0f} | {wire} |")
    save({**conditions("cpu"), "nodes": args.nodes, "medians": medians, "rounds": rounds}, args.output)


if __name__ == "__main__":
    main()
