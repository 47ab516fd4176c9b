"""What checkpoints and checks cost: the same training with many checkpoints and without any, taking turns.

    python benchmarks/checkpoint_cost.py [--rounds 4] [--steps 60000] [--every 10000] [--output FILE]

PPO on Pong under `concurrent`, whose checkpoints hold the slab that is ahead as well. Both trainings start anew in
every round; their speed is that between the first checkpoint and the end, so that neither start counts. Says by how
much the one with checkpoints is slower, and what follows for the default distance. Machines that others use differ by
more than that from one minute to the next, so that the processor time of a checkpoint is measured too, in the
training's thread and in its own, as a share of what all cores have from one to the next at the default distance. Added
to it is the time that it takes to check a row of a lane: that its actions are some of the environment's, and, which
rows of ALE need not be asked for, that rewards and observations are finite.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
import timeit
from collections.abc import Generator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from rich.console import Console

from slipstream.envs import make_envs
from slipstream.envs.rows import RowCheck
from slipstream.envs.spaces import Actions
from slipstream.run import checkpoint, loop, metrics, presets
from slipstream.run.checkpoint import newest
from slipstream.run.config import Config
from slipstream.run.loop import Own
from slipstream.run.machine import cores
from slipstream.run.record import conditions, save
from slipstream.run.saving import Checkpoints

NEVER = 10**9


@contextmanager
def timed(seconds: list[float]) -> Generator[None]:
    """Context that adds the processor time of every checkpoint, in two parts: where it is copied and where written."""
    begin, write = Checkpoints._begin, checkpoint.save  # pyright: ignore[reportPrivateUsage]

    def begun(self: Checkpoints) -> None:
        start = time.thread_time()
        begin(self)
        seconds.append(time.thread_time() - start)

    def written(*arguments: Any) -> None:
        start = time.thread_time()
        write(*arguments)
        seconds.append(time.thread_time() - start)

    with mock.patch.object(Checkpoints, "_begin", begun), mock.patch.object(checkpoint, "save", written):
        yield


def speed(every: int, steps: int, first: int, root: Path) -> tuple[float, int]:
    """Steps per second after step `first`, and the bytes of a checkpoint."""
    changes: dict[str, Any] = {
        "total_steps": steps,
        "schedule": "concurrent",
        "log.checkpoint_every": every,
        "log.metrics_every": 2_000,
        "log.tensorboard": False,
        "log.dir": str(root),
        "algo.desired_kl": 0.0,
    }
    config = presets.configure("ppo", "ALE/Pong-v5", changes)
    trained = loop.train(config, Own(), ["checkpoint_cost"], Console(file=io.StringIO()))
    rows = [row for row in metrics.read(trained.run.metrics) if row["time/steps"] >= first]
    taken = rows[-1]["time/steps"] - rows[0]["time/steps"]
    size = sum(file.stat().st_size for file in newest(trained.run.checkpoints).path.iterdir())
    return taken / (rows[-1]["time/seconds"] - rows[0]["time/seconds"]), size


def check_seconds(config: Config) -> float:
    """What it takes to check a row of a lane; without a limit to what is measured, since it is microseconds."""
    with closing(make_envs(config.env, config.num_envs, config.lanes, config.env_options)) as envs:
        spec = envs.spec
        envs.reset(config.seed)
        row = envs.recv(0)
    actions = Actions(spec.action_space, spec.lane_size, spec.id)
    check, action = RowCheck(actions, spec.observation_space, 0), np.zeros(spec.lane_size, np.int64)

    def both() -> None:
        actions.encode(action)
        check(row)

    calls = 10_000
    return min(timeit.repeat(both, number=calls)) / calls


def main() -> int:
    """Measures as told; 1 if checks, and checkpoints at the default distance, cost 2 % or more together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60_000, help="of each training")
    parser.add_argument("--every", type=int, default=10_000, help="steps between two checkpoints, where there are any")
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the result")
    args = parser.parse_args()
    found: dict[str, list[float]] = {"with": [], "without": []}
    processor: list[float] = []
    size = 0
    with tempfile.TemporaryDirectory() as root:
        for number in range(args.rounds):
            order = ("with", "without") if number % 2 == 0 else ("without", "with")
            for name in order:
                every = args.every if name == "with" else NEVER
                with timed(processor) if name == "with" else nullcontext():
                    rate, size = speed(every, args.steps, args.every, Path(root))
                found[name].append(round(rate, 1))
                print(f"round {number + 1}, {name} checkpoints: {rate:,.0f} steps/s", flush=True)
    ratios = [one / other for one, other in zip(found["with"], found["without"], strict=True)]
    cost = 1.0 - statistics.median(ratios)
    config = presets.configure("ppo", "ALE/Pong-v5", {})
    default = config.log.checkpoint_every
    usual = cost * args.every / default
    print(
        f"one every {args.every:,} steps, of {size / 1e6:.0f} MB: {cost:.1%} slower (median; ratios "
        f"{', '.join(f'{ratio:.3f}' for ratio in ratios)}); every {default:,}: {usual:.2%}"
    )
    check = check_seconds(config)
    share = check * statistics.median(found["without"]) / (config.num_envs // config.lanes)
    print(f"checks: {1e6 * check:.1f} microseconds for a row of a lane, {share:.2%} of the time")
    each = 2.0 * statistics.mean(processor)  # of two parts
    own = each * statistics.median(found["without"]) / default / cores()
    print(f"a checkpoint: {each:.2f} s of a core, {own:.2%} of what there is from one to the next")
    if args.output:
        result = {
            "every": args.every,
            "default_every": default,
            "bytes": size,
            "speed": found,
            "cost": cost,
            "cost_at_default": usual,
            "processor_seconds": each,
            "processor_share": own,
            "check_seconds": check,
            "check_share": share,
        }
        save({**conditions("cpu"), **result}, args.output)
    return int(own + share >= 0.02)


if __name__ == "__main__":
    sys.exit(main())
