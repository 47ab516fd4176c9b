"""Reports and specs for tests of what watches a run."""

from __future__ import annotations

from functools import cache

import numpy as np
from gymnasium import spaces

from slipstream.types import EnvSpec, Episode, Report, Trajectory
from tests.algos import rows


@cache
def _slab() -> Trajectory:
    """What no observer of these tests reads, made once."""
    return rows.trajectory(rows.policy())


def report(update: int, steps: int, returns: tuple[float, ...] = (), **metrics: float) -> Report:
    episodes = tuple(Episode(slot, update, 7, reward, None, False) for slot, reward in enumerate(returns))
    named = {name.replace("__", "/"): value for name, value in metrics.items()}
    seconds = {"collect": 0.5, "learn": 0.25, "env": 0.3, "infer": 0.1}
    return Report(update, steps, named, episodes, seconds, _slab())


def spec(actions: int = 2, size: int = 3) -> EnvSpec:
    box = spaces.Box(-1.0, np.inf, (size,), np.float32)
    return EnvSpec(
        "made-up-v1", box, spaces.Discrete(actions), num_envs=6, lanes=2, frames_per_step=4, family="classic"
    )
