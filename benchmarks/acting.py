"""What collecting costs on top of its least: stepping the environments, and one forward per row.

    python benchmarks/acting.py [--rounds 5] [--seconds 5] [--envs 64] [--output benchmarks/results/acting.json]

CartPole with two layers of 64, for policy and value each. The least is Gymnasium's own vector environment in a loop
with plain networks of that shape and the actions of a coin: nothing is drawn by the policy, recorded or bootstrapped.
Ours is the time in which a run under `sync`, in this process, collects, with a policy that does not learn, so that
episodes are as short; the one takes turns with the other, and what counts is the median of the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from torch import nn

from slipstream.arithmetic import adopted
from slipstream.run.presets import configure
from slipstream.run.record import conditions, save
from slipstream.run.training import Training

UNROLL = 128


def bare(envs: int, seconds: float) -> float:
    """Rows per second of environments and forwards in a loop."""

    def network(outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))

    policy, value = network(2), network(1)
    coins = np.random.default_rng(1).integers(0, 2, (UNROLL, envs))
    env = gym.make_vec("CartPole-v1", num_envs=envs, vectorization_mode="vector_entry_point")
    obs, _ = env.reset(seed=1)
    rows, start = 0, time.perf_counter()
    with torch.no_grad():
        while (passed := time.perf_counter() - start) < seconds:
            for coin in coins:
                shown = torch.from_numpy(obs)
                policy(shown)
                value(shown)
                obs, *_ = env.step(coin)
            rows += UNROLL
    env.close()
    return rows * envs / passed


def ours(envs: int, seconds: float) -> float:
    """Rows per second of a run while it collects, those included that only reset, as in the loop."""
    changes = {"num_envs": envs, "lanes": 1, "unroll": UNROLL, "net.hidden": (64, 64), "algo.lr": 0.0, "algo.epochs": 1}
    place = {"placement.collectors": "inline", "placement.workers": 1, "placement.device": "cpu"}
    training = Training(configure("ppo", "vector:CartPole-v1", {**changes, **place, "total_steps": 10**9}))
    try:
        reports = iter(training)
        next(reports)  # warms up
        start, spent = time.perf_counter(), 0.0
        for updates, report in enumerate(reports, 1):
            spent += report.seconds["collect"]
            if time.perf_counter() - start >= seconds:
                return updates * UNROLL * envs / spent
    finally:
        training.close()
    raise AssertionError("the run ended early")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--envs", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/acting.json"))
    args = parser.parse_args()

    found: dict[str, list[float]] = {"bare loop": [], "slipstream": []}
    with adopted():  # one thread per operator for both
        for number in range(args.rounds):
            found["bare loop"].append(bare(args.envs, args.seconds))
            found["slipstream"].append(ours(args.envs, args.seconds))
            print(f"round {number + 1}: {', '.join(f'{name} {each[-1]:,.0f}' for name, each in found.items())}")
    share = statistics.median(own / least for least, own in zip(*found.values(), strict=True))
    print(f"acting alone reaches {share:.2f} of the bare loop")
    medians = {name: statistics.median(speeds) for name, speeds in found.items()}
    save({**conditions("cpu"), "share": share, "steps_per_second": medians, "rounds": found}, args.output)


if __name__ == "__main__":
    main()
