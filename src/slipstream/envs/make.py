"""From what users type to running environments: `make_envs` and the errors of those who typed something else."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import gymnasium
from gymnasium.vector import VectorEnv

# Importing ale_py registers its ids with Gymnasium.
from slipstream.envs import atari, envpool, toy
from slipstream.envs.gym import GymEnvs
from slipstream.envs.options import AtariProtocol, EnvOptions
from slipstream.envs.slot import Source
from slipstream.envs.vector import VectorEnvs
from slipstream.envs.workers import WorkerEnvs
from slipstream.types import Envs

Env = gymnasium.Env[Any, Any]
EnvFactory = Callable[[], Env]

_log = logging.getLogger(__name__)

# The module of an environment's class tells its family.
_FAMILIES = {"classic_control": "classic", "mujoco": "mujoco", "box2d": "box2d", "toy_text": "toy"}


def make_envs(
    env: str | EnvFactory,
    num_envs: int,
    lanes: int = 1,
    options: EnvOptions | None = None,
    workers: int = 0,
    threads: int = 0,
) -> Envs:
    """Environments behind the one protocol, chosen by what `env` is.

    `ALE/Pong-v5` and `PongNoFrameskip-v4` run on ALE's native threads (the protocol is `options.atari`'s, whatever the
    id ends in); `envpool:ID` on EnvPool's; `toy:ID`, Gymnasium ids and callables in this process, or in worker
    processes with the same bits.

    Args:
        env: An id, or a callable that makes one environment, or one `gymnasium.vector.VectorEnv` per lane (`vector`).
        num_envs: Slots.
        lanes: Lanes; divides `num_envs`.
        options: Choices; defaults if None.
        workers: Worker processes for Gymnasium environments; 0 steps them in this process. Others ignore it.
        threads: Native threads per lane for ALE and EnvPool; 0 chooses. Others ignore it.

    Raises:
        ValueError: An unknown id (the nearest ones are named), an option that the environment does not have, an
            unsupported space, or lanes that don't divide `num_envs`.
        ImportError: The id needs a package that is not installed; the message has the pip line.
        EnvError: An environment could not be made.
    """
    options = options or EnvOptions()
    if not isinstance(env, str):
        vector = _vector(env)
        if vector is not None:
            return _vector_envs(env, vector, num_envs, lanes, options, workers)
    elif env.startswith(envpool.PREFIX):
        return envpool.EnvPoolEnvs(env, num_envs, lanes, options, threads)
    else:
        game = atari.atari_game(env)
        if game is not None:
            protocol = atari_protocol(env, options)
            return atari.AtariEnvs(env, game, protocol, num_envs, lanes, threads, options.decorrelate_steps)
    source = gym_source(env, options)
    if workers:
        return WorkerEnvs(source, num_envs, lanes, workers, options.timeout_seconds)
    return GymEnvs(source, num_envs, lanes)


def _vector(env: Callable[[], object]) -> VectorEnv[Any, Any, Any] | None:
    """The vector environment that a callable makes, or None if it makes something else, which is closed again."""
    made = Source(env, _name(env)).call(0)
    if isinstance(made, VectorEnv):
        return made
    if isinstance(made, gymnasium.Env):
        made.close()
    return None


def _vector_envs(
    env: Callable[[], object],
    first: VectorEnv[Any, Any, Any],
    num_envs: int,
    lanes: int,
    options: EnvOptions,
    workers: int,
) -> Envs:
    refused = {
        "workers": workers,
        "frame_stack": options.frame_stack - 1,
        "max_episode_steps": options.max_episode_steps,
        "decorrelate_steps": options.decorrelate_steps,
        "kwargs": options.kwargs,
    }
    for name, value in refused.items():
        if value:
            raise ValueError(f"{_name(env)}: {name} is not for vector environments; build it into the callable")
    return VectorEnvs(env, first, _name(env), num_envs, lanes)


def _name(env: Callable[[], object]) -> str:
    return getattr(env, "__qualname__", type(env).__name__)


def atari_protocol(id: str, options: EnvOptions) -> AtariProtocol:
    """The spelled-out protocol of an Atari id.

    Raises:
        ValueError: The id and the options contradict each other.
    """
    if options.kwargs:
        raise ValueError(f"{id}: unknown env kwargs {sorted(options.kwargs)}; Atari's choices are the fields of atari")
    if options.frame_stack != 1:
        raise ValueError(f"{id}: set atari.frame_stack (here {options.frame_stack}), not frame_stack")
    if id.endswith("NoFrameskip-v4"):
        if options.atari.protocol != "v4":
            raise ValueError(f"{id} means protocol v4, but atari.protocol is {options.atari.protocol}; type ALE/...-v5")
        _log.info("%s: Atari protocol v4 with frame skip and preprocessing, see AtariOptions", id)
    protocol = options.atari.spelled_out()
    if options.max_episode_steps is None:
        return protocol
    return replace(protocol, max_frames=min(protocol.max_frames, options.max_episode_steps * protocol.frame_skip))


def gym_source(env: str | EnvFactory, options: EnvOptions) -> Source:
    """What one slot of a Gymnasium id, a toy or a callable is made of.

    Raises:
        ValueError: An unknown id.
    """
    if not isinstance(env, str):
        if options.kwargs:
            raise ValueError(f"env kwargs {sorted(options.kwargs)} are for ids; put them into the callable")
        return Source(GymFactory(env, options), _name(env), decorrelate_steps=options.decorrelate_steps)
    if env.startswith("toy:"):
        toy_class(env)
        return Source(GymFactory(env, options), env, "toy", decorrelate_steps=options.decorrelate_steps)
    spec = gym_spec(env)
    return Source(
        GymFactory(env, options),
        env,
        _family(str(spec.entry_point)),
        deterministic=not spec.nondeterministic,
        decorrelate_steps=options.decorrelate_steps,
    )


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
            ImportError: A package is missing; the message has the pip line.
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
            family = _family(str(gymnasium.spec(self.env).entry_point))
            line = f': pip install "slipstream[{family}]"' if family in ("mujoco", "box2d") else ""
            raise ImportError(f"{self.env} needs a package that is not installed ({error}){line}") from error


def toy_class(id: str) -> Callable[..., Env]:
    """The class of a `toy:` id.

    Raises:
        ValueError: There is none of that name.
    """
    name = id.removeprefix("toy:")
    if name not in toy.TOYS:
        raise ValueError(_unknown(id, [f"toy:{known}" for known in toy.TOYS]))
    return toy.TOYS[name]


def gym_spec(id: str) -> Any:
    """Gymnasium's registration of `id`.

    Raises:
        ValueError: Unknown id.
        ImportError: The id names a module that is not installed.
    """
    try:
        return gymnasium.spec(id)
    except ModuleNotFoundError as error:
        raise ImportError(f"{id}: the module before the colon cannot be imported: {error}") from error
    except gymnasium.error.Error as error:
        raise ValueError(_unknown(id, [known for ids in list_envs().values() for known in ids])) from error


def list_envs() -> dict[str, list[str]]:
    """Ids that can be typed, by family, sorted. Gymnasium's own are listed even if a package they need is missing."""
    families: dict[str, list[str]] = {"atari": [], "toy": [f"toy:{name}" for name in toy.TOYS]}
    for id, spec in gymnasium.registry.items():
        if atari.atari_game(id) is not None:
            families["atari"].append(id)
        elif not str(spec.entry_point).startswith("ale_py"):
            families.setdefault(_family(str(spec.entry_point)), []).append(id)
    for id in envpool.list_envpool():
        families.setdefault(envpool.envpool_family(id), []).append(id)
    return {family: sorted(ids) for family, ids in families.items()}


def _family(entry_point: str) -> str:
    return next((family for part, family in _FAMILIES.items() if f".{part}" in entry_point), "other")


def _unknown(id: str, known: list[str]) -> str:
    near = difflib.get_close_matches(id, known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    return f"unknown environment '{id}'; {hint}`slipstream envs` lists all"
