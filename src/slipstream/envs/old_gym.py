"""The Gym of before 2022, as far as packages that were written for it need it (`done` instead of two flags).

Such a package says `import gym`. Nobody has to install that: inside `stand_in()` the name means this module's few
classes, over Gymnasium's spaces. Nothing here imports torch.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from gymnasium import spaces


class Env:
    """`reset() -> observation`, `step(action) -> (observation, reward, done, info)`."""

    @property
    def unwrapped(self) -> Any:
        """The innermost environment."""
        return self


class Wrapper(Env):
    """Everything as in `env`."""

    def __init__(self, env: Any) -> None:
        self.env = env

    def __getattr__(self, name: str) -> Any:
        """What only `env` has."""
        if name == "env":  # asked for before `__init__`
            raise AttributeError(name)
        return getattr(self.env, name)

    @property
    def unwrapped(self) -> Any:
        """The innermost environment."""
        return self.env.unwrapped

    def reset(self) -> Any:
        """Starts an episode."""
        return self.env.reset()

    def step(self, action: Any) -> tuple[Any, Any, bool, dict[str, Any]]:
        """Observation, reward, whether the episode is over, and what else there is to say."""
        return self.env.step(action)


class ObservationWrapper(Wrapper):
    """Shows something else, by the method `observation`."""

    def reset(self) -> Any:
        """Starts an episode."""
        return self.observation(self.env.reset())

    def step(self, action: Any) -> tuple[Any, Any, bool, dict[str, Any]]:
        """As in `Wrapper`."""
        obs, reward, done, info = self.env.step(action)
        return self.observation(obs), reward, done, info


class RewardWrapper(Wrapper):
    """Pays something else, by the method `reward`."""

    def step(self, action: Any) -> tuple[Any, Any, bool, dict[str, Any]]:
        """As in `Wrapper`."""
        obs, reward, done, info = self.env.step(action)
        return obs, self.reward(reward), done, info


@contextmanager
def stand_in() -> Generator[None]:
    """Inside, `import gym` gives this module's classes, even where another `gym` is installed or imported."""
    former = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "gym"}
    for name in former:
        del sys.modules[name]
    gym, envs, registration = ModuleType("gym"), ModuleType("gym.envs"), ModuleType("gym.envs.registration")
    vars(gym).update(
        Env=Env,
        Wrapper=Wrapper,
        ObservationWrapper=ObservationWrapper,
        RewardWrapper=RewardWrapper,
        spaces=spaces,
        envs=envs,
    )
    vars(envs).update(registration=registration)
    vars(registration).update(register=_register)
    sys.modules |= {module.__name__: module for module in (gym, envs, registration)}
    try:
        yield
    finally:
        for module in (gym, envs, registration):
            sys.modules.pop(module.__name__, None)
        sys.modules |= former


def _register(id: str, entry_point: str = "", kwargs: dict[str, Any] | None = None) -> None:
    """Ids of the old interface are of no use to Gymnasium."""
