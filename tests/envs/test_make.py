"""From what users type to environments, and the errors of those who typed something else."""

from __future__ import annotations

import logging
from typing import Any

import gymnasium
import numpy as np
import pytest

from slipstream.envs import EnvError, EnvOptions, list_envs, make_envs
from slipstream.envs.atari import AtariEnvs
from slipstream.envs.envpool import EnvPoolEnvs
from slipstream.envs.gym import GymEnvs
from slipstream.envs.make import env_family, env_spec
from slipstream.envs.vector import VectorEnvs
from slipstream.envs.workers import WorkerEnvs

from .playing import Played, assert_equal, play


class Bare(gymnasium.Env[Any, Any]):
    """Has the spaces that it is given; counts, in the class, how many were closed."""

    closed = 0

    def __init__(self, **spaces: gymnasium.Space[Any]) -> None:
        vars(self).update(spaces)

    def close(self) -> None:
        Bare.closed += 1


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ([], "observation_space and no action_space"),
        (["action_space"], "observation_space"),
        (["observation_space"], "action_space"),
    ],
)
def test_an_environment_without_spaces_is_refused_and_closed(given: list[str], missing: str, workers: int) -> None:
    Bare.closed = 0
    with pytest.raises(EnvError, match=rf"the environment of slot 0 \(<Bare.*>\) has no {missing}$"):
        make_envs(lambda: Bare(**dict.fromkeys(given, gymnasium.spaces.Discrete(2))), 1, workers=workers)
    assert Bare.closed == 2, "after a look at what the callable makes too"


@pytest.mark.parametrize(
    ("env", "workers", "backend"),
    [
        ("ALE/Pong-v5", 0, AtariEnvs),
        ("PongNoFrameskip-v4", 0, AtariEnvs),
        ("envpool:CartPole-v1", 0, EnvPoolEnvs),
        ("CartPole-v1", 0, GymEnvs),
        ("toy:catch", 0, GymEnvs),
        ("CartPole-v1", 1, WorkerEnvs),
        (lambda: gymnasium.make("CartPole-v1"), 0, GymEnvs),
        (lambda: gymnasium.make_vec("CartPole-v1", 2), 0, VectorEnvs),
    ],
)
def test_the_id_chooses_the_backend(env: Any, workers: int, backend: type) -> None:
    envs = make_envs(env, 2, 1, workers=workers)
    assert isinstance(envs, backend)
    assert envs.spec.num_envs == 2
    envs.close()


def vector() -> gymnasium.vector.VectorEnv[Any, Any, Any]:
    return gymnasium.make_vec("CartPole-v1", 2, vectorization_mode="sync")


@pytest.mark.parametrize(
    ("env", "workers", "options"),
    [
        ("CartPole-v1", 0, EnvOptions(decorrelate_steps=7, max_episode_steps=11)),
        ("CartPole-v1", 2, EnvOptions(decorrelate_steps=7, max_episode_steps=11)),
        ("ALE/Pong-v5", 0, EnvOptions(decorrelate_steps=3)),
        ("envpool:CartPole-v1", 0, EnvOptions(decorrelate_steps=7)),
        (vector, 0, EnvOptions()),
    ],
    ids=["gym", "workers", "atari", "envpool", "vector"],
)
def test_a_part_of_the_environments_plays_as_in_the_whole(env: Any, workers: int, options: EnvOptions) -> None:
    whole = play(make_envs(env, 6, 3, options, workers=workers), 23)
    part = make_envs(env, 4, 2, options, workers=workers, first_slot=2)
    assert (part.spec.slots(1), part.spec.columns(1)) == (range(4, 6), slice(2, 4))
    assert_equal(play(part, 23), Played(*(value[:, 2:] for value in vars(whole).values())))


@pytest.mark.parametrize("workers", [0, 1])
def test_messages_name_the_slot_of_the_whole(workers: int) -> None:
    envs = make_envs("toy:chaos", 4, 2, EnvOptions(kwargs={"fault": "nan", "at": 1}), workers=workers, first_slot=6)
    envs.reset(0)
    envs.recv(1)
    envs.send(np.zeros(2, np.int64), 1)
    with pytest.raises(EnvError, match=r"slot 8, step 1, episode 0: expected finite numbers"):
        envs.recv(1)
    envs.close()


@pytest.mark.parametrize("env", ["CartPole-v1", "toy:counter", "ALE/Pong-v5", "envpool:CartPole-v1", vector])
def test_the_spec_is_known_without_all_the_environments(env: Any) -> None:
    envs = make_envs(env, 4, 2)
    assert env_spec(env, 4, 2) == envs.spec
    envs.close()


@pytest.mark.parametrize(
    ("env", "family"),
    [
        ("ALE/Pong-v5", "atari"),
        ("CartPole-v1", "classic"),
        ("HalfCheetah-v5", "mujoco"),
        ("LunarLander-v3", "box2d"),
        ("FrozenLake-v1", "toy"),
        ("toy:lqr", "toy"),
        ("envpool:gfootball/academy_corner-v1", "gfootball"),
    ],
)
def test_families(env: str, family: str) -> None:
    assert env_family(env) == family
    assert env in list_envs()[family]


def test_families_in_the_spec() -> None:
    assert make_envs("CartPole-v1", 1).spec.family == "classic"
    assert make_envs("toy:lqr", 1).spec.family == "toy"
    assert make_envs(lambda: gymnasium.make("CartPole-v1"), 1).spec.family == "other"


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ("CartPol-v1", r"unknown environment 'CartPol-v1'; did you mean CartPole-v1, .*`slipstream envs` lists all"),
        ("ALE/Pog-v5", r"unknown environment 'ALE/Pog-v5'; did you mean ALE/Pong-v5"),
        ("toy:cacth", r"unknown environment 'toy:cacth'; did you mean toy:catch"),
        ("xyzzy", r"unknown environment 'xyzzy'; `slipstream envs` lists all"),
    ],
)
def test_unknown_ids_name_the_nearest(env: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_envs(env, 2)


def test_a_missing_package_is_one_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise gymnasium.error.DependencyNotInstalled("Box2D is not installed, run `pip install swig`")

    monkeypatch.setattr(gymnasium, "make", missing)
    with pytest.raises(ImportError, match=r'^LunarLander-v3 needs [^`]*: pip install "slipstream\[box2d\]"$'):
        make_envs("LunarLander-v3", 2)


def test_a_module_that_is_not_there() -> None:
    with pytest.raises(ImportError, match="the module before the colon cannot be imported"):
        make_envs("no_such_module:Env-v0", 2)


@pytest.mark.parametrize(("num_envs", "lanes"), [(3, 2), (0, 1), (2, 0), (2, 4)])
@pytest.mark.parametrize("env", ["CartPole-v1", "ALE/Pong-v5", "envpool:CartPole-v1"])
def test_lanes_divide_the_slots(env: str, num_envs: int, lanes: int) -> None:
    with pytest.raises(ValueError, match=f"lanes must divide num_envs, got num_envs {num_envs} and lanes {lanes}"):
        make_envs(env, num_envs, lanes)


def test_arguments_that_the_environment_does_not_have() -> None:
    with pytest.raises(EnvError, match="unexpected keyword argument 'gravitas'"):
        make_envs("CartPole-v1", 2, 1, EnvOptions(kwargs={"gravitas": 3}))
    with pytest.raises(ValueError, match=r"env kwargs \['a'\] are for ids; put them into the callable"):
        make_envs(lambda: gymnasium.make("CartPole-v1"), 2, 1, EnvOptions(kwargs={"a": 3}))
    assert make_envs("toy:catch", 1, 1, EnvOptions(kwargs={"columns": 7})).spec.observation_space.shape == (10, 7)


def test_callables_that_make_something_else() -> None:
    with pytest.raises(EnvError, match=r"expected a gymnasium\.Env for slot 0, got int"):
        make_envs(lambda: 3, 2)  # type: ignore[arg-type, return-value]


def test_the_spec_names_a_callable() -> None:
    assert make_envs(named, 1).spec.id == "named"


def named() -> gymnasium.Env[Any, Any]:
    return gymnasium.make("CartPole-v1")


def test_no_frameskip_ids_say_what_they_mean(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "slipstream.envs"):
        make_envs("PongNoFrameskip-v4", 1)
    assert "protocol v4" in caplog.text


def test_lists_name_only_what_can_be_made() -> None:
    families = list_envs()
    assert "toy:recall" in families["toy"]
    assert "ALE/Pong-v5" in families["atari"]
    assert all(ids == sorted(ids) and len(set(ids)) == len(ids) for ids in families.values())
    assert not [id for ids in families.values() for id in ids if id.startswith("Pong-ram")]


@pytest.mark.parametrize("id", ["Pong-v4", "Pong-v0", "PongNoFrameskip-v0"])
def test_raw_games_are_refused_and_the_id_to_type_is_named(id: str) -> None:
    words = rf"{id} is the raw game.*: type ALE/Pong-v5,"
    with pytest.raises(ValueError, match=words):
        env_family(id)
    with pytest.raises(ValueError, match=words):
        make_envs(id, 1)
