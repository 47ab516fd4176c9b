"""A laboratory for waiting: an environment whose step time is drawn from a chosen distribution (`toy:step_time`).

How long a step takes is a function of (seed, slot, row), and so is what it shows; the one does not depend on the other.
Nothing here imports torch: worker processes do without.
"""

from __future__ import annotations

import time
from typing import Any, Literal, get_args

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

Distribution = Literal["exponential", "gamma", "uniform", "constant"]
Clock = Literal["sleep", "spin"]
Contents = tuple[NDArray[np.float32], NDArray[np.float64]]

_OBSERVED = 4


class StepTime(gymnasium.Env[NDArray[np.float32], np.int64]):
    """Steps take a random time that has nothing to do with what is shown and paid.

    Observation: uniform noise, float32 `[4]`. Reward: 1 for action 1 where the first number is above one half, and for
    action 0 where it is not. Terminates after `length` steps, so the optimal return is `length` and a random policy
    gets half of it. A reset takes its time as well.

    With `clock="sleep"`, `make_envs` has all slots of this process sleep in whoever waits for them (`SleepingEnvs`), so
    that they do so at the same time, without a thread for each. With `clock="spin"` a step burns processor time, as a
    simulator does, in this process or in worker processes.

    Args:
        mean_ms: Mean time of a step, in milliseconds.
        distribution: `exponential`; `gamma` of shape `shape`, the sum of so many exponentials where that is whole;
            `uniform` between 0 and twice the mean; `constant`.
        shape: Shape of the gamma distribution; its standard deviation is `mean_ms / sqrt(shape)`.
        clock: How the time passes: asleep, or in a loop that keeps a core busy.
        length: Steps per episode.
    """

    def __init__(
        self,
        mean_ms: float = 5.0,
        distribution: Distribution = "exponential",
        shape: float = 2.0,
        clock: Clock = "sleep",
        length: int = 100,
    ) -> None:
        for name, value, known in (("distribution", distribution, Distribution), ("clock", clock, Clock)):
            if value not in get_args(known):
                raise ValueError(f"toy:step_time: {name} must be one of {', '.join(get_args(known))}, got {value!r}")
        if mean_ms < 0 or shape <= 0 or length < 1:
            raise ValueError(
                "toy:step_time: expected mean_ms of at least 0, shape above 0 and length of at least 1, "
                f"got {mean_ms}, {shape} and {length}"
            )
        self.observation_space = spaces.Box(0.0, 1.0, (_OBSERVED,), np.float32)
        self.action_space = spaces.Discrete(2)
        self.length = length
        self._mean, self._distribution, self._shape, self._clock = mean_ms / 1000.0, distribution, shape, clock
        self._t = 0

    @property
    def optimal_return(self) -> float:
        """One per step."""
        return float(self.length)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Starts an episode, which `seed` decides from end to end."""
        super().reset(seed=seed)
        self._obs, self._seconds = self.episode(self.np_random)
        self._t = 0
        self._take_time()
        return self._obs[0], {}

    def step(self, action: np.int64) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Takes its time."""
        paid = float(int(action) == wanted(self._obs[self._t]))
        self._t += 1
        self._take_time()
        return self._obs[self._t], paid, self._t == self.length, False, {}

    def episode(self, generator: np.random.Generator) -> Contents:
        """Observations float32 `[length+1, 4]` and seconds float64 `[length+1]` of an episode; row 0 is the reset."""
        rows = self.length + 1
        obs = generator.random((rows, _OBSERVED), np.float32)
        if self._distribution == "exponential":
            return obs, generator.exponential(self._mean, rows)
        if self._distribution == "gamma":
            return obs, generator.gamma(self._shape, self._mean / self._shape, rows)
        if self._distribution == "uniform":
            return obs, generator.uniform(0.0, 2.0 * self._mean, rows)
        return obs, np.full(rows, self._mean)

    def _take_time(self) -> None:
        seconds = float(self._seconds[self._t])
        if self._clock == "sleep":
            time.sleep(seconds)
            return
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass


def wanted(obs: NDArray[np.float32]) -> NDArray[np.bool_]:
    """The action that is paid for, of observations `[..., 4]`."""
    return obs[..., 0] > 0.5
