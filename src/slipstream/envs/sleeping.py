"""`toy:step_time` asleep: environments without threads or processes that all take their time at once."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Sequence

import numpy as np
from gymnasium.utils import seeding
from numpy.typing import NDArray

from slipstream import dice
from slipstream.envs.options import EnvOptions
from slipstream.envs.slot import Source, check_lanes
from slipstream.envs.step_time import StepTime, wanted
from slipstream.history import History
from slipstream.types import BoolArray, EnvSpec, EnvStep

_PR_SET_TIMERSLACK, _SLACK_NANOSECONDS = 29, 1_000


class SleepingEnvs:
    """`num_envs` slots of `StepTime`, with the rows that `GymEnvs` would show.

    `send` notes when the lane will have answered: when its slowest slot has, as if all slots stepped at once. `recv`
    and `wait` sleep until then. Deadlines are absolute, so what the caller does meanwhile takes no time from the lane.
    Actions are not checked, which would take longer than all else that is done here. On Linux, threads that wait here
    are told to wake within a microsecond of their time; the kernel takes 50 for itself otherwise.

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
        refused = {
            "frame_stack": options.frame_stack - 1,
            "max_episode_steps": options.max_episode_steps,
            "decorrelate_steps": options.decorrelate_steps,
            "score_key": options.score_key,
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
            lanes=check_lanes(num_envs, lanes),
            family=source.family,
            first_slot=first_slot,
            seeded_every=1,
        )
        self._due = [0.0] * lanes
        self._punctual: set[int] = set()  # threads
        self._lanes = [_Lane(env, self._spec.slots(lane)) for lane in range(lanes)]

    @property
    def spec(self) -> EnvSpec:
        """Spaces, slots and lanes."""
        return self._spec

    def reset(self, seed: int) -> None:
        """Starts every slot from its own seed, a function of (seed, slot) only."""
        for number, lane in enumerate(self._lanes):
            self._due[number] = time.monotonic() + lane.reset(seed)

    def restore(self, lane: int, seed: int, history: History) -> None:
        """Brings the slots of `lane` to where their histories lead, without taking the time for it."""
        self._lanes[lane].restore(seed, history)
        self._due[lane] = 0.0

    def send(self, action: NDArray[np.int64], lane: int) -> None:
        """Starts the lane's step and returns at once."""
        self._due[lane] = time.monotonic() + self._lanes[lane].step(action)

    def wait(self, lanes: Sequence[int]) -> list[int]:
        """Sleeps until the first of `lanes` has answered."""
        due = self._due
        while True:
            now = time.monotonic()
            ready = [lane for lane in lanes if due[lane] <= now]
            if ready:
                return ready
            self._sleep(min(map(due.__getitem__, lanes)) - now)

    def recv(self, lane: int) -> EnvStep:
        """Sleeps until the lane has answered its last `reset` or `send`."""
        while (left := self._due[lane] - time.monotonic()) > 0:
            self._sleep(left)
        return self._lanes[lane].row

    def close(self) -> None:
        """Nothing to release."""

    def _sleep(self, seconds: float) -> None:
        thread = threading.get_ident()
        if thread not in self._punctual:
            self._punctual.add(thread)
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, _SLACK_NANOSECONDS, 0, 0, 0)
        time.sleep(seconds)


class _Lane:
    """Slots that go through their episodes in step, since all are equally long.

    Attributes:
        row: The newest answer.
    """

    row: EnvStep

    def __init__(self, env: StepTime, slots: Sequence[int]) -> None:
        self._env, self._slots = env, slots
        self._never: BoolArray = np.zeros(len(slots), np.bool_)
        self._over: BoolArray = np.ones(len(slots), np.bool_)
        self._paid, self._nothing = np.zeros(len(slots), np.float32), np.zeros(len(slots), np.float32)

    def reset(self, seed: int) -> float:
        """Starts episode 0 of run `seed`; returns the seconds that it takes."""
        self._seed, self._episode = seed, 0
        return self._begin()

    def restore(self, seed: int, history: History) -> None:
        """Plays the slots' episode, which all are at the same place of."""
        self._seed, self._episode = seed, int(history.start[0])
        self._begin()
        for action in history.action.reshape(len(self._slots), -1).T:
            self.step(action)

    def step(self, action: NDArray[np.int64]) -> float:
        """Steps all slots, or resets them; returns the seconds that it takes."""
        if self._t == self._env.length:
            self._episode += 1
            return self._begin()
        np.equal(action, self._wanted[self._t], out=self._paid)
        self._t += 1
        ended = self._over if self._t == self._env.length else self._never
        self.row = EnvStep(self._obs[self._t], self._paid, ended, self._never, ended)
        return self._seconds[self._t]

    def _begin(self) -> float:
        seeds = (dice.env_seed(self._seed, "env", slot, self._episode) for slot in self._slots)
        episodes = [self._env.episode(seeding.np_random(seed)[0]) for seed in seeds]
        self._obs = np.stack([obs for obs, _ in episodes], axis=1)
        self._wanted = wanted(self._obs)
        self._seconds: list[float] = np.max([seconds for _, seconds in episodes], axis=0).tolist()
        self._t = 0
        self.row = EnvStep(self._obs[0], self._nothing, self._never, self._never, self._never)
        return self._seconds[0]
