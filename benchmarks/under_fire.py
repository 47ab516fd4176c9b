"""Learning under fire: CartPole whose environments crash, hang and show NaN, beside CartPole that is left alone.

    python benchmarks/under_fire.py [--seeds 3] [--every 2000] [--output benchmarks/results/under_fire.json]

One step in `every`, a function of the episode's seed and the step alone, kills its worker process, never returns, or
shows NaN, a third each. PPO trains on both until the mean return of 100 episodes is 475; runs take turns. A worker
that dies or hangs is replaced and its environments are played back, so these steps are not lost; an episode with NaN is
cut there. Ends with 1 if the median of steps under fire is above 1.5 times that of the clean runs.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import tempfile
import threading
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from rich.console import Console

from slipstream.run import loop, metrics, presets
from slipstream.run.config import CALLABLE
from slipstream.run.loop import Own
from slipstream.run.record import conditions, save

TARGET, MOST_STEPS, RATIO = 475.0, 400_000, 1.5
FAULTS = ("crash", "hang", "nan")
SETTINGS = {
    "total_steps": MOST_STEPS,
    "stop_at_return": TARGET,
    "placement.env_workers": 2,
    "placement.restarts": 20,
    "env_options.timeout_seconds": 2.0,
    "env_options.non_finite": "skip",
    "log.tensorboard": False,
}


class UnderFire(gymnasium.Wrapper[Any, Any, Any, Any]):
    """CartPole with faults; those that end a process happen once each.

    Args:
        folder: Where it is written down which faults have happened, for the environments that come after.
        every: Steps between two faults, on average.
    """

    def __init__(self, folder: Path, every: int) -> None:
        super().__init__(gymnasium.make("CartPole-v1"))
        self._folder, self._every = folder, every
        self._seed, self._t = 0, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        assert seed is not None, "every episode has a seed"
        self._seed, self._t = seed, 0
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> Any:
        self._t += 1
        answer = self.env.step(action)
        number = zlib.crc32(f"{self._seed} {self._t}".encode())
        if number % self._every:
            return answer
        fault = FAULTS[number // self._every % len(FAULTS)]
        if fault == "nan":
            self._note(fault)
            return answer[0] * np.float32(np.nan), *answer[1:]
        if self._note(fault):
            os._exit(1) if fault == "crash" else threading.Event().wait()
        return answer

    def _note(self, fault: str) -> bool:
        """Writes down that it happens; whether for the first time."""
        try:
            (self._folder / f"{fault}-{self._seed}-{self._t}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def run(seed: int, every: int | None, root: Path) -> dict[str, Any]:
    """Trains once; steps to the target, and the faults that happened."""
    folder = root / f"{seed}-{every}"
    folder.mkdir()
    changes = {**SETTINGS, "seed": seed, "log.dir": str(root / "runs")}
    config, own = presets.configure("ppo", "CartPole-v1", changes), Own()
    if every is not None:
        config, own = replace(config, env=f"{CALLABLE}UnderFire"), Own(env=partial(UnderFire, folder, every))
    trained = loop.train(config, own, ["under_fire"], Console(file=io.StringIO()))
    happened = [path.name.partition("-")[0] for path in folder.iterdir()]
    rows = metrics.read(trained.run.metrics)
    return {
        "steps": trained.progress.steps if trained.progress.solved else None,
        "minutes": round(rows[-1]["time/seconds"] / 60.0, 2),
        "faults": {fault: happened.count(fault) for fault in FAULTS},
        "restarts": rows[-1]["faults/restarts"],
        "mended_rows": sum(row["faults/mended_rows"] for row in rows),
    }


def main() -> int:
    """Trains all runs; 1 if fire costs more than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--every", type=int, default=2_000, help="steps between two faults, on average")
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the result")
    args = parser.parse_args()
    found: dict[str, dict[str, Any]] = {"clean": {}, "under fire": {}}
    with tempfile.TemporaryDirectory() as place:
        for seed in range(1, args.seeds + 1):
            for name, every in (("clean", None), ("under fire", args.every)):
                result = found[name][str(seed)] = run(seed, every, Path(place))
                print(f"{name}, seed {seed}: {result}", flush=True)
    clean, fire = (statistics.median(each["steps"] or float("inf") for each in found[name].values()) for name in found)
    print(f"steps to {TARGET:g}: {clean:,.0f} clean, {fire:,.0f} under fire, ratio {fire / clean:.2f}")
    if args.output:
        save({**conditions("cpu"), "every": args.every, "ratio": fire / clean, "runs": found}, args.output)
    return int(not fire <= RATIO * clean < float("inf"))


if __name__ == "__main__":
    sys.exit(main())
