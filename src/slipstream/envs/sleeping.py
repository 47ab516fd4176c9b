"""`toy:step_time` asleep: environments without threads or processes that all take their time at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.utils import seeding
from numpy.typing import NDArray

from slipstream import dice
from slipstream.envs.options import EnvOptions
from slipstream.envs.slot import Source, check_lanes
from slipstream.envs.spaces import Actions
from slipstream.envs.step_time import StepTime, wanted
from slipstream.types import BoolArray, EnvSpec, EnvStep


class SleepingEnvs:
    """`num_envs` slots of `StepTime`, with the rows that `GymEnvs` would show.

    `send` notes when the lane will have answered: when its slowest slot has, as if all slots stepped at once. `recv`
    and `wait` sleep until then. Deadlines are absolute, so what the caller does meanwhile takes no time from the lane.

    Args:
        source: Makes the environment whose choices count; it is never stepped.
        num_envs: Slots.
        lanes: Lanes; divides `num_envs`.
        options: Those that would wrap the environment are refused.
        first_slot: Slot of column 0.

    Raises:
        EnvError: The environment could not be made.
        ValueError: An option that is refused, or lanes that don't divide `num_envs`.
    """

    def __init__(self, source: Source, num_envs: int, lanes: int, options: EnvOptions, first_slot: int = 0) -> None:
        size = num_envs // check_lanes(num_envs, lanes)
        refused = {
            "frame_stack": options.frame_stack - 1,
            "max_episode_steps": options.max_episode_steps,
            "decorrelate_steps": options.decorrelate_steps,
        }
        for name, value in refused.items():
            if value:
                raise ValueError(f"{source.id}: {name} is not for environments that sleep; set clock=spin, or length")
        env = source.make(first_slot)
        assert isinstance(env, StepTime)
        self._spec = EnvSpec(
            id=source.id,
            observation_space=env.observation_space,
            action_space=env.action_space,
            num_envs=num_envs,
            lanes=lanes,
            family=source.family,
            first_slot=first_slot,
        )
        self._actions = Actions(env.action_space, size, source.id)
        self._lanes = [_Lane(env, self._spec.slots(lane)) for lane in range(lanes)]

    @property
    def spec(self) -> EnvSpec:
        """Spaces, slots and lanes."""
        return self._spec

    def reset(self, seed: int) -> None:
        """Starts every slot from its own seed, a function of (seed, slot) only."""
        for lane in self._lanes:
            lane.reset(seed)

    def send(self, action: NDArray[np.int64], lane: int) -> None:
        """Starts the lane's step and returns at once.

        Raises:
            ValueError: Actions of the wrong shape, dtype or range.
        """
        self._lanes[lane].send(self._actions.encode(action))

    def wait(self, lanes: Sequence[int]) -> list[int]:
        """Sleeps until the first of `lanes` has answered."""
        while True:
            now = time.monotonic()
            ready = [lane for lane in lanes if self._lanes[lane].due <= now]
            if ready:
                return ready
            time.sleep(min(self._lanes[lane].due for lane in lanes) - now)

    def recv(self, lane: int) -> EnvStep:
        """Sleeps until the lane has answered its last `reset` or `send`."""
        while (left := self._lanes[lane].due - time.monotonic()) > 0:
            time.sleep(left)
        return self._lanes[lane].row

    def close(self) -> None:
        """Nothing to release."""


class _Lane:
    """Slots that go through their episodes in step, since all are equally long.

    Attributes:
        due: When the lane has answered, on the monotonic clock.
        row: What it answers.
    """

    due: float
    row: EnvStep

    def __init__(self, env: StepTime, slots: Sequence[int]) -> None:
        self._env, self._slots = env, slots
        self._never: BoolArray = np.zeros(len(slots), np.bool_)
        self._over: BoolArray = np.ones(len(slots), np.bool_)
        self._nothing = np.zeros(len(slots), np.float32)

    def reset(self, seed: int) -> None:
        self._seed, self._episode = seed, 0
        self._begin()

    def send(self, action: NDArray[Any]) -> None:
        if self._t == self._env.length:
            self._episode += 1
            self._begin()
            return
        reward = (action == self._wanted[self._t]).astype(np.float32)
        self._t += 1
        ended = self._over if self._t == self._env.length else self._never
        self.row = EnvStep(self._obs[self._t], reward, ended, self._never, ended)
        self.due = time.monotonic() + self._seconds[self._t]

    def _begin(self) -> None:
        seeds = (dice.env_seed(self._seed, "env", slot, self._episode) for slot in self._slots)
        episodes = [self._env.episode(seeding.np_random(seed)[0]) for seed in seeds]
        self._obs = np.stack([obs for obs, _ in episodes], axis=1)
        self._wanted = wanted(self._obs)
        self._seconds: list[float] = np.max([seconds for _, seconds in episodes], axis=0).tolist()
        self._t = 0
        self.row = EnvStep(self._obs[0], self._nothing, self._never, self._never, self._never)
        self.due = time.monotonic() + self._seconds[0]
