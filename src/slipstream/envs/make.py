"""From what users type to running environments: `make_envs` and the errors of those who typed something else."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import gymnasium
from gymnasium.vector import VectorEnv

# Importing ale_py registers its ids with Gymnasium.
from slipstream.envs import atari, envpool, football, toy
from slipstream.envs.factory import EnvFactory, GymFactory, gym_family, own_env, require_maker
from slipstream.envs.gym import GymEnvs
from slipstream.envs.ids import unknown_id
from slipstream.envs.options import AtariProtocol, EnvOptions
from slipstream.envs.rows import require_single_resets
from slipstream.envs.sleeping import SleepingEnvs
from slipstream.envs.slot import Source, check_lanes, close_all
from slipstream.envs.vector import VectorEnvs
from slipstream.envs.workers import WorkerEnvs
from slipstream.types import Envs, EnvSpec

VECTOR = "vector:"

_log = logging.getLogger(__name__)


def make_envs(
    env: str | EnvFactory,
    num_envs: int,
    lanes: int = 1,
    options: EnvOptions | None = None,
    workers: int = 0,
    threads: int = 0,
    first_slot: int = 0,
    played: Callable[[], object] = bool,
) -> Envs:
    """Environments behind the one protocol, chosen by what `env` is.

    `ALE/Pong-v5` and `PongNoFrameskip-v4` run on ALE's native threads (the protocol is `options.atari`'s, whatever the
    id ends in); `envpool:ID` on EnvPool's; `vector:ID` is the vector environment that is registered with Gymnasium for
    an id, one per lane; `toy:ID`, `gfootball:SCENARIO`, Gymnasium ids and callables in this process,
    or in worker processes with the same bits.

    Args:
        env: An id, or a callable that makes one environment, or one `gymnasium.vector.VectorEnv` per lane (`vector`).
        num_envs: Slots.
        lanes: Lanes; divides `num_envs`.
        options: Choices; defaults if None.
        workers: Worker processes for Gymnasium environments; 0 steps them in this process. Others ignore it.
        threads: Native threads per lane for ALE and EnvPool; 0 chooses. Others ignore it.
        first_slot: Slot of the first environment, if they are a part of a run's environments.
        played: Called now and then while slots are brought back, as a sign of life.

    Raises:
        ValueError: Neither an id nor a callable, an unknown id (the nearest ones are named), an option that the
            environment does not have, an unsupported space, or lanes that don't divide `num_envs`.
        ImportError: The id needs a package that is not installed; the message has the pip line.
        EnvError: An environment could not be made.
    """
    require_maker(env)
    options = options or EnvOptions()
    if not isinstance(env, str):
        vector = _vector(env, first_slot)
        if vector is not None:
            return _vector_envs(env, _name(env), vector, num_envs, lanes, options, workers, first_slot)
    elif env.startswith(VECTOR):
        make, rest = _registered_vector(env, num_envs // check_lanes(num_envs, lanes), options)
        vector: Any = Source(make, env).call(first_slot)
        return _vector_envs(make, env, vector, num_envs, lanes, rest, workers, first_slot)
    elif env.startswith(envpool.PREFIX):
        return envpool.EnvPoolEnvs(env, num_envs, lanes, options, threads, first_slot)
    else:
        game = atari.atari_game(env)
        if game is not None:
            protocol = atari_protocol(env, options)
            steps = options.decorrelate_steps
            return atari.AtariEnvs(env, game, protocol, num_envs, lanes, threads, steps, first_slot, played)
    source = gym_source(env, options)
    if workers:
        return WorkerEnvs(source, num_envs, lanes, workers, options.timeout_seconds, first_slot, played)
    if env == "toy:step_time" and options.kwargs.get("clock", "sleep") == "sleep":
        return SleepingEnvs(source, num_envs, lanes, options, first_slot)
    return GymEnvs(source, num_envs, lanes, first_slot, played)


def env_spec(env: str | EnvFactory, num_envs: int, lanes: int = 1, options: EnvOptions | None = None) -> EnvSpec:
    """The spec that `make_envs` would give, from one environment (or one lane's vector environment) that is closed.

    Args and errors are those of `make_envs`.
    """
    require_maker(env)
    lane, size = 1, num_envs // check_lanes(num_envs, lanes)
    if not isinstance(env, str) and (vector := _vector(env, 0)) is not None:
        close_all(_name(env), {0: vector})
        lane = size
    with closing(make_envs(env, lane, 1, options, threads=1)) as envs:
        return replace(envs.spec, num_envs=num_envs, lanes=lanes)


def _vector(env: Callable[[], object], first_slot: int) -> VectorEnv[Any, Any, Any] | None:
    """The vector environment that a callable makes, or None if it makes something else, which is closed again."""
    source = Source(env, _name(env))
    made = source.call(first_slot)
    if isinstance(made, VectorEnv):
        return made
    if isinstance(made, gymnasium.Env):
        close_all(source.id, {first_slot: made})
    return None


def _registered_vector(id: str, size: int, options: EnvOptions) -> tuple[Callable[[], Any], EnvOptions]:
    """What makes the vector environment of a `vector:` id, and the options that are left."""
    plain = id.removeprefix(VECTOR)
    others = native_threads(plain) or own_env(plain) is not None
    if others or gym_spec(plain).vector_entry_point is None:
        raise ValueError(f"{id}: no vector environment is registered for {plain}; type {plain}")
    limit = {} if options.max_episode_steps is None else {"max_episode_steps": options.max_episode_steps}
    mode = gymnasium.VectorizeMode.VECTOR_ENTRY_POINT
    make = partial(gymnasium.make_vec, plain, size, mode, **options.kwargs, **limit)
    return make, replace(options, kwargs={}, max_episode_steps=None)


def _vector_envs(
    env: Callable[[], object],
    name: str,
    first: VectorEnv[Any, Any, Any],
    num_envs: int,
    lanes: int,
    options: EnvOptions,
    workers: int,
    first_slot: int,
) -> Envs:
    refused = {
        "env_workers": workers,
        "frame_stack": options.frame_stack - 1,
        "max_episode_steps": options.max_episode_steps,
        "decorrelate_steps": options.decorrelate_steps,
        "score_key": options.score_key,
        "kwargs": options.kwargs,
    }
    registered = name.startswith(VECTOR)
    for option, value in refused.items():
        if value:
            close_all(name, {first_slot: first})
            instead = f"type {name.removeprefix(VECTOR)}" if registered else "build it into the callable"
            raise ValueError(f"{name}: {option} is not for vector environments; {instead}")
    try:
        require_single_resets(name, options)
    except ValueError:
        close_all(name, {first_slot: first})
        raise
    family = env_family(name) if registered else "other"
    return VectorEnvs(env, first, name, num_envs, lanes, first_slot, options.non_finite, family)


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
    """What one slot of an id that is stepped by Python, or of a callable, is made of.

    Raises:
        ImportError: The package of the id is not installed.
        ValueError: An unknown id.
    """
    every: dict[str, Any] = {
        "decorrelate_steps": options.decorrelate_steps,
        "score_key": score_key(env, options),
        "non_finite": options.non_finite,
    }
    if not isinstance(env, str):
        if options.kwargs:
            raise ValueError(f"env kwargs {sorted(options.kwargs)} are for ids; put them into the callable")
        return Source(GymFactory(env, options), _name(env), **every)
    own = own_env(env)
    if own is not None:
        return Source(GymFactory(env, options), env, own.family, **every)
    spec = gym_spec(env)
    return Source(
        GymFactory(env, options),
        env,
        gym_family(str(spec.entry_point)),
        deterministic=not spec.nondeterministic,
        **every,
    )


def score_key(env: str | EnvFactory, options: EnvOptions) -> str:
    """`options.score_key`, or what the environment has where that is None."""
    if options.score_key is not None:
        return options.score_key
    own = own_env(env) if isinstance(env, str) else None
    return own.score_key if own else ""


def env_family(env: str) -> str:
    """The preset family of an id, as in `EnvSpec`, found without making an environment.

    Raises:
        ValueError: An unknown id.
        ImportError: Its package is missing.
    """
    if env.startswith(envpool.PREFIX):
        return envpool.envpool_family(env)
    env = env.removeprefix(VECTOR)
    own = own_env(env)
    if own is not None:
        return own.family
    return "atari" if atari.atari_game(env) is not None else gym_family(str(gym_spec(env).entry_point))


def native_threads(env: str) -> bool:
    """Whether an id is stepped by the threads of ALE or EnvPool, so that worker processes have no part in it."""
    return env.startswith(envpool.PREFIX) or atari.atari_game(env) is not None


def gym_spec(id: str) -> Any:
    """Gymnasium's registration of `id`.

    Raises:
        ValueError: Unknown id, or one that ale-py registers for a raw game.
        ImportError: The id names a module that is not installed.
    """
    module, colon, name = id.rpartition(":")
    if colon and not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(f"{id}: before the colon stands no module, as it does in package:CartPole-v1")
    try:
        if colon:
            importlib.import_module(module)
        spec = gymnasium.spec(name)
    except ModuleNotFoundError as error:
        raise ImportError(f"{id}: the module before the colon cannot be imported: {error}") from error
    except gymnasium.error.Error as error:
        raise ValueError(unknown_id(id, [known for ids in list_envs().values() for known in ids])) from error
    if str(spec.entry_point).startswith("ale_py"):
        game = re.sub(r"(Deterministic|NoFrameskip)?-v\d$", "", name)
        raise ValueError(
            f"{id} is the raw game, without the preprocessing that agents learn it with: type ALE/{game}-v5, and "
            "choose the protocol by --env-options.atari.*"
        )
    return spec


def list_envs() -> dict[str, list[str]]:
    """Ids that can be typed, by family, sorted. Gymnasium's own are listed even if a package they need is missing."""
    families: dict[str, list[str]] = {"atari": [], "toy": [toy.PREFIX + name for name in toy.TOYS]}
    families["gfootball"] = [football.PREFIX + scenario for scenario in football.scenarios()]
    for id, spec in gymnasium.registry.items():
        if atari.atari_game(id) is not None:
            families["atari"].append(id)
        elif not str(spec.entry_point).startswith("ale_py"):
            ids = [id] if spec.vector_entry_point is None else [id, VECTOR + id]
            families.setdefault(gym_family(str(spec.entry_point)), []).extend(ids)
    for id in envpool.list_envpool():
        families.setdefault(envpool.envpool_family(id), []).append(id)
    return {family: sorted(ids) for family, ids in families.items() if ids}
