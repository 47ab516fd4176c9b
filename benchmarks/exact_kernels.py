"""What it costs to have the same bits every time: training with PyTorch's deterministic kernels, and with any, in turn.

    python benchmarks/exact_kernels.py [--algos ppo dqn] [--env ALE/Pong-v5] [--device cuda] [--rounds 3] [--seconds 15]
                                       [--set KEY=VALUE ...] [--output benchmarks/results/exact_kernels.json]

Slipstream asks for deterministic kernels on a GPU, always (`device.py`). Here every other training does without, and
lets cuDNN choose by trying; each runs in a process of its own. On a CPU both are the same.
"""

from __future__ import annotations

import argparse
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from slipstream import device
from slipstream.run import presets
from slipstream.run.config import Config
from slipstream.run.record import conditions, save
from slipstream.run.speed import measure_speed


def speed(config: Config, seconds: float, exact: bool) -> float:
    """Steps per second, in this process."""
    if not exact:
        device.exact_kernels = lambda device: None
        torch.backends.cudnn.benchmark = True
    found = measure_speed(config, seconds).steps_per_second
    if config.placement.device == "cuda":
        assert torch.are_deterministic_algorithms_enabled() == exact, "the switch was not where it is looked for"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algos", nargs="+", default=["ppo", "dqn"])
    parser.add_argument("--env", default="ALE/Pong-v5")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/exact_kernels.json"))
    args = parser.parse_args()

    given: dict[str, Any] = dict(item.split("=", 1) for item in args.settings)  # `configure` reads words as they are
    given |= {"placement.device": args.device, "total_steps": 10**9}
    found: dict[str, dict[str, float]] = {}
    print("| algorithm | deterministic kernels: steps/s | any | any over deterministic |\n|---|---|---|---|")
    for algo in args.algos:
        config = presets.configure(algo, args.env, given)
        speeds: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(args.rounds):
            for exact, measured in speeds.items():
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    measured.append(pool.submit(speed, config, args.seconds, exact).result())
        ratio = statistics.median(other / exact for exact, other in zip(speeds[True], speeds[False], strict=True))
        own, other = (statistics.median(speeds[exact]) for exact in (True, False))
        found[algo] = {"deterministic": own, "any": other, "any_over_deterministic": ratio}
        print(f"| {algo} | {own:,.0f} | {other:,.0f} | {ratio:.2f} |", flush=True)
    save({**conditions(args.device), "env": args.env, "steps_per_second": found}, args.output)


if __name__ == "__main__":
    main()
