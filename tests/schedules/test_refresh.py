"""When collectors take over new weights under `async`: before every unroll, or before every row."""

from __future__ import annotations

import os
import select
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from numpy.typing import NDArray

from slipstream.run.presets import configure
from slipstream.run.training import Training

SECONDS = 20.0  # a limit for what nothing delays
ROWS, HALF, UPDATES = 8, 3, 5


class Midway(gymnasium.Env[NDArray[np.float32], np.int64]):
    """Within every unroll but the first it says how far it is, and goes on when it is told to; never ends.

    Args:
        folder: Has the named pipes `reached` and `go`, which lead to any process.
    """

    def __init__(self, folder: Path) -> None:
        self.observation_space, self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32), spaces.Discrete(2)
        self._folder, self._steps, self._pipes = folder, 0, list[int]()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action: np.int64) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._pipes = self._pipes or [pipe(self._folder / name) for name in ("reached", "go")]
        self._steps += 1
        if self._steps > ROWS and self._steps % ROWS == HALF:
            os.write(self._pipes[0], b".")
            wait(self._pipes[1])
        return np.zeros(2, np.float32), 1.0, False, False, {}

    def close(self) -> None:
        for fd in self._pipes:
            os.close(fd)
        self._pipes = []


def pipe(path: Path) -> int:
    """A named pipe, for reading or writing; neither end waits for the other to be opened."""
    return os.open(path, os.O_RDWR)


def wait(fd: int) -> None:
    """Waits for a byte, and takes it."""
    assert select.select([fd], [], [], SECONDS)[0], "nothing was said"
    os.read(fd, 1)


@pytest.mark.parametrize("collectors", ["thread", "process"])
@pytest.mark.parametrize("refresh", ["unroll", "row"])
def test_new_weights_are_taken_over_before_every_unroll_or_before_every_row(
    refresh: str, collectors: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Update k is made when row 2 of unroll k has been acted on, and row 3 is acted on when it is published."""
    for name in ("reached", "go"):
        os.mkfifo(tmp_path / name)
    reached, go = (pipe(tmp_path / name) for name in ("reached", "go"))
    size = {"num_envs": 1, "lanes": 1, "unroll": ROWS, "total_steps": UPDATES * ROWS}
    how = {"schedule": "async", "max_lag": 1, "refresh": refresh, "placement.collectors": collectors}
    config = configure("impala", "callable:midway", {**size, **how, "placement.workers": 1})
    with closing(Training(config, partial(Midway, tmp_path))) as run:
        step = run.learner.step

        def after_the_collector(*arguments: Any, **options: Any) -> Any:
            wait(reached)
            return step(*arguments, **options)

        monkeypatch.setattr(run.learner, "step", after_the_collector)
        found: list[list[int]] = []
        for report in run:
            found.append(report.trajectory.version[:, 0].tolist())
            os.write(go, b"." if report.update < UPDATES else b"....")  # at the end nobody is to be left waiting
    os.close(reached)
    os.close(go)
    before = [max(unroll - 1, 0) for unroll in range(UPDATES)]
    after = list(range(UPDATES)) if refresh == "row" else before
    assert found == [[one] * HALF + [other] * (ROWS - HALF) for one, other in zip(before, after, strict=True)]
