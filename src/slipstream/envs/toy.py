"""Small environments with a known optimum (Catch, Chain, LQR, Bandit, Recall) or known contents (Counter, Chaos).

`toy:step_time` is the laboratory for waiting: its steps take a time that is drawn from a chosen distribution, asleep or
spinning, and not known to what it shows (`step_time.StepTime`).

They are typed as `toy:catch`, `toy:chain` and so on; nothing is registered with Gymnasium.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from slipstream.envs.step_time import StepTime

Options = dict[str, Any] | None
Info = dict[str, Any]


class Counter(gymnasium.Env[NDArray[np.int64], np.int64]):
    """Every number it shows is known in advance, for the laws of plumbing.

    Observation int64 `[3]`: seed of the last seeded reset, episode (resets so far, from 0), steps within the episode.
    Reward: `100 * episode + t`, with t the steps within the episode after the action.

    Args:
        script: Lengths of the episodes and how they end, repeated: `t` terminated, `c` truncated (cut), `b` both.
    """

    def __init__(self, script: str = "3t 5c 2t") -> None:
        self.observation_space = spaces.Box(0, 2**62, (3,), np.int64)
        self.action_space = spaces.Discrete(3)
        self._ends = [(int(word[:-1]), word[-1]) for word in script.split()]
        self._tag, self._episode, self._t = 0, -1, 0

    def reset(self, *, seed: int | None = None, options: Options = None) -> tuple[NDArray[np.int64], Info]:
        """Starts the next episode."""
        super().reset(seed=seed)
        self._tag = self._tag if seed is None else seed
        self._episode, self._t = self._episode + 1, 0
        return self._obs(), {}

    def step(self, action: np.int64) -> tuple[NDArray[np.int64], float, bool, bool, Info]:
        """Counts; the action does not matter."""
        self._t += 1
        length, how = self._ends[self._episode % len(self._ends)]
        over = self._t >= length
        reward = float(100 * self._episode + self._t)
        return self._obs(), reward, over and how in "tb", over and how in "cb", {}

    def _obs(self) -> NDArray[np.int64]:
        return np.array([self._tag, self._episode, self._t], np.int64)


class Catch(gymnasium.Env[NDArray[np.float32], np.int64]):
    """A ball falls from a random column; a paddle in the last row must be under it (bsuite's Catch).

    Observation: the board float32 `[rows, columns]`, 1 at ball and paddle. Actions: left, stay, right. Reward: +1 or -1
    at the end, after `rows - 1` steps. The optimal return is 1; a random policy gets about -0.6 on 10 x 5.
    """

    optimal_return = 1.0

    def __init__(self, rows: int = 10, columns: int = 5) -> None:
        self.observation_space = spaces.Box(0.0, 1.0, (rows, columns), np.float32)
        self.action_space = spaces.Discrete(3)
        self._rows, self._columns = rows, columns
        self._ball, self._row, self._paddle = 0, 0, columns // 2

    def reset(self, *, seed: int | None = None, options: Options = None) -> tuple[NDArray[np.float32], Info]:
        """Drops the next ball."""
        super().reset(seed=seed)
        self._ball, self._row, self._paddle = int(self.np_random.integers(self._columns)), 0, self._columns // 2
        return self._board(), {}

    def step(self, action: np.int64) -> tuple[NDArray[np.float32], float, bool, bool, Info]:
        """Moves the paddle; the ball falls by one row."""
        self._paddle = min(max(self._paddle + int(action) - 1, 0), self._columns - 1)
        self._row += 1
        landed = self._row == self._rows - 1
        reward = (1.0 if self._paddle == self._ball else -1.0) if landed else 0.0
        return self._board(), reward, landed, False, {}

    def _board(self) -> NDArray[np.float32]:
        board = np.zeros((self._rows, self._columns), np.float32)
        board[self._row, self._ball] = 1.0
        board[self._rows - 1, self._paddle] = 1.0
        return board


class Chain(gymnasium.Env[NDArray[np.float32], np.int64]):
    """A corridor with a small lure at the left door and the prize at the far right.

    Observation: the place, one-hot float32 `[length]`. Actions: left, right. Leaving by the left door pays 0.1,
    reaching the last place pays 1; both terminate. Truncated after `4 * length` steps. The optimal return is 1.
    """

    optimal_return = 1.0

    def __init__(self, length: int = 7) -> None:
        self.observation_space = spaces.Box(0.0, 1.0, (length,), np.float32)
        self.action_space = spaces.Discrete(2)
        self._length, self._place, self._t = length, 1, 0

    def reset(self, *, seed: int | None = None, options: Options = None) -> tuple[NDArray[np.float32], Info]:
        """Starts one place from the left door."""
        super().reset(seed=seed)
        self._place, self._t = 1, 0
        return self._obs(), {}

    def step(self, action: np.int64) -> tuple[NDArray[np.float32], float, bool, bool, Info]:
        """Goes left (0) or right (1)."""
        self._place += 1 if action == 1 else -1
        self._t += 1
        left, prize = self._place == 0, self._place == self._length - 1
        over = left or prize
        return self._obs(), 0.1 * left + 1.0 * prize, over, not over and self._t >= 4 * self._length, {}

    def _obs(self) -> NDArray[np.float32]:
        return np.eye(self._length, dtype=np.float32)[self._place]


class LQR(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """One-dimensional linear dynamics with quadratic cost: x' = x + u, reward -(x^2 + u^2), u in [-1, 1].

    Observation: x, float32 `[1]`; x starts uniform in [-1, 1]. Terminates after `horizon` steps. The best gain tends to
    1/phi = 0.618 (u = -0.618 x) away from the end, and never leaves the bounds. A policy that does nothing gets
    `-horizon / 3` on average.
    """

    def __init__(self, horizon: int = 11) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self._horizon, self._x, self._t = horizon, 0.0, 0

    @property
    def optimal_return(self) -> float:
        """Expected return of the optimal policy: -p_H E[x0^2], with the Riccati recursion p <- 1 + p / (1 + p)."""
        p = 0.0
        for _ in range(self._horizon):
            p = 1.0 + p / (1.0 + p)
        return -p / 3.0

    def reset(self, *, seed: int | None = None, options: Options = None) -> tuple[NDArray[np.float32], Info]:
        """Draws the starting point."""
        super().reset(seed=seed)
        self._x, self._t = float(self.np_random.uniform(-1.0, 1.0)), 0
        return np.array([self._x], np.float32), {}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, Info]:
        """Pushes by u."""
        u = float(action[0])
        reward = -(self._x**2 + u**2)
        self._x += u
        self._t += 1
        return np.array([self._x], np.float32), reward, self._t >= self._horizon, False, {}


class Bandit(gymnasium.Env[NDArray[np.float32], np.int64]):
    """Episodes of one step: arm a of `arms` pays a / (arms - 1). The optimal return is 1, a random policy gets 0.5."""

    optimal_return = 1.0

    def __init__(self, arms: int = 5) -> None:
        self.observation_space = spaces.Box(0.0, 1.0, (1,), np.float32)
        self.action_space = spaces.Discrete(arms)
        self._arms = arms

    def reset(self, *, seed: int | None = None, options: Options = None) -> tuple[NDArray[np.float32], Info]:
        """Nothing to see."""
        super().reset(seed=seed)
        return np.ones(1, np.float32), {}

    def step(self, action: np.int64) -> tuple[NDArray[np.float32], float, bool, bool, Info]:
        """Pulls an arm."""
        return np.ones(1, np.float32), float(action) / (self._arms - 1), True, False, {}


class Recall(gymnasium.Env[NDArray[np.float32], np.int64]):
    """A cue is shown at the start and must be named after a delay: a policy without memory cannot beat chance.

    Observation float32 `[cues + 1]`: the cue one-hot in the first row, zeros during the delay, the last entry 1 when
    the answer counts. Reward at the answer: +1 if the action is the cue, else -1; then the episode terminates, after
    `delay + 2` steps. The optimal return is 1; without memory the expected return is `2 / cues - 1`.
    """

    optimal_return = 1.0

    def __init__(self, cues: int = 2, delay: int = 3) -> None:
        self.observation_space = spaces.Box(0.0, 1.0, (cues + 1,), np.float32)
        self.action_space = spaces.Discrete(cues)
        self._cues, self._delay = cues, delay
        self._cue, self._t = 0, 0

    def reset(self, *, seed: int | None = None, options: Options = None) -> tuple[NDArray[np.float32], Info]:
        """Draws and shows the cue."""
        super().reset(seed=seed)
        self._cue, self._t = int(self.np_random.integers(self._cues)), 0
        return self._obs(), {}

    def step(self, action: np.int64) -> tuple[NDArray[np.float32], float, bool, bool, Info]:
        """Waits, or answers when the last entry of the observation is 1."""
        asked = self._t == self._delay + 1
        reward = (1.0 if action == self._cue else -1.0) if asked else 0.0
        self._t += 1
        return self._obs(), reward, asked, False, {}

    def _obs(self) -> NDArray[np.float32]:
        obs = np.zeros(self._cues + 1, np.float32)
        if self._t == 0:
            obs[self._cue] = 1.0
        obs[-1] = self._t == self._delay + 1
        return obs


Fault = Literal[
    "none", "raise", "leave", "hang", "exit", "kill", "segfault", "nan", "shape", "dtype", "reward", "old_api"
]


class Chaos(gymnasium.Env[NDArray[np.float32], np.int64]):
    """Four floats and a fault at a step that is known in advance, for tests of failure.

    Args:
        fault: `raise`: raises in `step`; `leave`: `sys.exit()`; `hang`: never returns; `exit`: `os._exit(0)`; `kill`:
            SIGKILL to its own process; `segfault`: reads address 0; `nan`, `shape`, `dtype`: an observation with NaN,
            of the wrong shape, of the wrong dtype; `reward`: None as reward; `old_api`: four values; `none`: no fault.
        at: The step of the fault, counted from 1 over all episodes of this environment.
        length: Steps per episode.
    """

    def __init__(self, fault: Fault = "raise", at: int = 3, length: int = 5) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (4,), np.float32)
        self.action_space = spaces.Discrete(2)
        self._fault, self._at, self._length = fault, at, length
        self._t = self._steps = 0

    def reset(self, *, seed: int | None = None, options: Options = None) -> tuple[NDArray[np.float32], Info]:
        """Starts the next episode."""
        super().reset(seed=seed)
        self._t = 0
        return self._obs(), {}

    def step(self, action: np.int64) -> Any:
        """One step, or the fault."""
        self._t += 1
        self._steps += 1
        answer = (self._obs(), 1.0, self._t >= self._length, False, {})
        if self._steps != self._at or self._fault == "none":
            return answer
        return _FAULTS[self._fault](answer)

    def _obs(self) -> NDArray[np.float32]:
        return self.np_random.random(4, np.float32)


Answer = tuple[NDArray[np.float32], float, bool, bool, Info]


def _raise(answer: Answer) -> Any:
    raise RuntimeError("Chaos was told to raise")


_FAULTS: dict[str, Callable[[Answer], Any]] = {
    "raise": _raise,
    "leave": lambda answer: sys.exit(),
    "hang": lambda answer: threading.Event().wait(),
    "exit": lambda answer: os._exit(0),
    "kill": lambda answer: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": lambda answer: ctypes.string_at(0),
    "nan": lambda answer: (answer[0] * np.float32(np.nan), *answer[1:]),
    "shape": lambda answer: (answer[0][:3], *answer[1:]),
    "dtype": lambda answer: (answer[0].astype(np.int32), *answer[1:]),
    "reward": lambda answer: (answer[0], None, *answer[2:]),
    "old_api": lambda answer: (*answer[:3], {}),
}

PREFIX = "toy:"
TOYS: dict[str, Callable[..., gymnasium.Env[Any, Any]]] = {
    "bandit": Bandit,
    "catch": Catch,
    "chain": Chain,
    "chaos": Chaos,
    "counter": Counter,
    "lqr": LQR,
    "recall": Recall,
    "step_time": StepTime,
}


def settings_line(id: str) -> str:
    """What can be set of a toy, `name=default`, as `env_options.kwargs` takes it; nothing for other ids."""
    make = TOYS.get(id.removeprefix(PREFIX)) if id.startswith(PREFIX) else None
    parameters = inspect.signature(make).parameters.values() if make else ()
    return ", ".join(f"{each.name}={each.default}" for each in parameters)
