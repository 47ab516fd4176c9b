"""Small real runs for tests."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from slipstream.run import loop, presets
from slipstream.run.config import Config
from slipstream.run.loop import Own, Trained

SMALL = {
    "num_envs": 3,
    "lanes": 1,
    "unroll": 7,
    "algo.batch_size": 21,
    "algo.epochs": 2,
    "net.hidden": [8],
    "placement.workers": 1,
}


def configuration(root: Path, env: str = "CartPole-v1", algo: str = "ppo", **changes: Any) -> Config:
    """PPO on CartPole for 210 steps at most, unless told otherwise; dots in keys are written as two underscores."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    values = {"total_steps": 200, "log.dir": str(root), "log.metrics_every": 40, "log.tensorboard": False}
    small = SMALL if algo == "ppo" else {key: value for key, value in SMALL.items() if not key.startswith("algo.")}
    return presets.configure(algo, env, {**small, **values, **dotted})


def train(root: Path, own: Own | None = None, **changes: Any) -> Trained:
    return loop.train(configuration(root, **changes), own or Own(), ["a", "test it"], Console(file=io.StringIO()))


def resume(path: Path, total_steps: int | None = None, own: Own | None = None, **changes: Any) -> Trained:
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    total = {} if total_steps is None else {"total_steps": total_steps}
    return loop.resume(path, own or Own(), dotted | total, Console(file=io.StringIO()))


def stop_after(updates: int, error: Callable[[], BaseException]) -> Callable[..., None]:
    """A replacement of `Progress.__call__` that raises in the given update."""
    from slipstream.run.progress import Progress

    original = Progress.__call__

    def counted(self: Progress, report: Any) -> None:
        original(self, report)
        if report.update == updates:
            raise error()

    return counted
