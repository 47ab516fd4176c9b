"""How one Gymnasium environment is made, here and in worker processes.

Nothing here imports torch: workers start without it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import gymnasium
import gymnasium.vector

from slipstream.envs import toy
from slipstream.envs.options import EnvOptions

Env = gymnasium.Env[Any, Any]
EnvFactory = Callable[[], Env]

# The module of an environment's class tells its family.
_FAMILIES = {"classic_control": "classic", "mujoco": "mujoco", "box2d": "box2d", "toy_text": "toy"}


@dataclass(frozen=True)
class GymFactory:
    """Makes one environment with its wrappers; picklable, so that workers can make their own.

    Attributes:
        env: Gymnasium id, `toy:` id, or callable.
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
        limit, stack = self.options.max_episode_steps, self.options.frame_stack
        made = self._bare(limit)
        if limit is not None and not (isinstance(self.env, str) and not self.env.startswith("toy:")):
            made = gymnasium.wrappers.TimeLimit(made, limit)
        if stack > 1:
            made = gymnasium.wrappers.FrameStackObservation(made, stack)
        return made

    def _bare(self, limit: int | None) -> Env:
        arguments: dict[str, Any] = dict(self.options.kwargs)
        if self.render_mode is not None:
            arguments["render_mode"] = self.render_mode
        if not isinstance(self.env, str):
            return self.env()
        if self.env.startswith("toy:"):
            return toy_class(self.env)(**arguments)
        try:
            return gymnasium.make(self.env, max_episode_steps=limit, disable_env_checker=True, **arguments)
        except (gymnasium.error.DependencyNotInstalled, ModuleNotFoundError) as error:
            family = gym_family(str(gymnasium.spec(self.env).entry_point))
            remedy = f'pip install "slipstream[{family}]"' if family in ("mujoco", "box2d") else str(error)
            raise ImportError(f"{self.env} needs a package that is not installed: {remedy}") from error


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


def toy_class(id: str) -> Callable[..., Env]:
    """The class of a `toy:` id.

    Raises:
        ValueError: There is none of that name.
    """
    name = id.removeprefix("toy:")
    if name not in toy.TOYS:
        raise ValueError(unknown_id(id, [f"toy:{known}" for known in toy.TOYS]))
    return toy.TOYS[name]


def gym_family(entry_point: str) -> str:
    """The preset family of an environment class, by its module."""
    return next((family for part, family in _FAMILIES.items() if f".{part}" in entry_point), "other")


def unknown_id(id: str, known: Iterable[str]) -> str:
    """What to say about an id that nobody knows."""
    near = difflib.get_close_matches(id, known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    return f"unknown environment '{id}'; {hint}`slipstream envs` lists all"
