"""How one Gymnasium environment is made, here and in worker processes.

Nothing here imports torch: workers start without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import gymnasium
import gymnasium.vector

from slipstream.envs import football, toy
from slipstream.envs.ids import unknown_id
from slipstream.envs.options import EnvOptions

Env = gymnasium.Env[Any, Any]
EnvFactory = Callable[[], Env]

# The module of an environment's class tells its family.
_FAMILIES = {"classic_control": "classic", "mujoco": "mujoco", "box2d": "box2d", "toy_text": "toy"}


@dataclass(frozen=True)
class GymFactory:
    """Makes one environment with its wrappers; picklable, so that workers can make their own.

    Attributes:
        env: Gymnasium id, `toy:` id, `gfootball:` id, or callable.
        options: Choices.
        render_mode: Passed to the environment if not None.
    """

    env: str | EnvFactory
    options: EnvOptions
    render_mode: str | None = None

    def __call__(self) -> Env:
        """One environment.

        Raises:
            ImportError: A package is missing; the message has the pip line if we have an extra for it.
        """
        made, stack = self._limited(self.options.max_episode_steps), self.options.frame_stack
        return gymnasium.wrappers.FrameStackObservation(made, stack) if stack > 1 else made

    def _limited(self, limit: int | None) -> Env:
        make = self.env
        if isinstance(make, str):
            own = own_env(make)
            if own is None:
                return self._registered(make, limit)
            make = partial(own.make, **self._arguments())
        return make() if limit is None else gymnasium.wrappers.TimeLimit(make(), limit)

    def _arguments(self) -> dict[str, Any]:
        render = {} if self.render_mode is None else {"render_mode": self.render_mode}
        return {**self.options.kwargs, **render}

    def _registered(self, id: str, limit: int | None) -> Env:
        try:
            return gymnasium.make(id, max_episode_steps=limit, disable_env_checker=True, **self._arguments())
        except (gymnasium.error.DependencyNotInstalled, ModuleNotFoundError) as error:
            family = gym_family(str(gymnasium.spec(id).entry_point))
            remedy = f'pip install "slipstream[{family}]"' if family in ("mujoco", "box2d") else str(error)
            raise ImportError(f"{id} needs a package that is not installed: {remedy}") from error


def require_maker(env: object) -> None:
    """Refuses what is neither an id nor a callable.

    Raises:
        ValueError: An environment was given, or something else; it says what to pass instead.
    """
    if isinstance(env, gymnasium.Env | gymnasium.vector.VectorEnv):
        raise ValueError(
            f"expected an id or a callable that makes an environment, got an environment ({env}): every slot needs one "
            "of its own. Pass the id, the class, or a function: env=lambda: gymnasium.make(...)"
        )
    if not isinstance(env, str) and not callable(env):
        raise ValueError(f"expected an id or a callable that makes an environment, got {type(env).__name__} {env!r}")


class OwnEnv(NamedTuple):
    """An environment that Slipstream makes without Gymnasium's registry.

    Attributes:
        make: Makes one, given its keyword arguments.
        family: As in `EnvSpec`.
        score_key: As in `EnvOptions`, where that is None.
    """

    make: Callable[..., Env]
    family: str
    score_key: str = ""


def own_env(id: str) -> OwnEnv | None:
    """The environment of a `toy:` or `gfootball:` id; None for other ids.

    Raises:
        ImportError: The package of the id is not installed; the message says how to install it.
        ValueError: There is none of that name.
    """
    if id.startswith(football.PREFIX):
        scenario = id.removeprefix(football.PREFIX)
        football.require_scenario(scenario)
        return OwnEnv(partial(football.Football, scenario), "gfootball", football.SCORE_KEY)
    if not id.startswith(toy.PREFIX):
        return None
    name = id.removeprefix(toy.PREFIX)
    if name not in toy.TOYS:
        raise ValueError(unknown_id(id, [toy.PREFIX + known for known in toy.TOYS]))
    return OwnEnv(toy.TOYS[name], "toy")


def gym_family(entry_point: str) -> str:
    """The preset family of an environment class, by its module."""
    return next((family for part, family in _FAMILIES.items() if f".{part}" in entry_point), "other")
