"""EnvPool's families."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from slipstream.envs import AtariOptions, EnvError, EnvOptions, list_envs, make_envs
from slipstream.envs import envpool as adapter

from .playing import Played, assert_equal, assert_rule, play


def run(env: str, lanes: int = 1, threads: int = 1, steps: int = 67, seed: int = 5, decorrelate: int = 0) -> Played:
    options = EnvOptions(decorrelate_steps=decorrelate, max_episode_steps=23)
    return play(make_envs(env, 4, lanes, options, threads=threads), steps, seed)


@pytest.mark.parametrize(
    "env", ["CartPole-v1", "Pendulum-v1", "FrozenLake-v1", "HalfCheetah-v4", "MiniGrid-Empty-5x5-v0"]
)
@pytest.mark.parametrize("decorrelate", [0, 31])
def test_threads_and_lanes_change_no_bit(env: str, decorrelate: int) -> None:
    one = run(f"envpool:{env}", decorrelate=decorrelate)
    assert_equal(run(f"envpool:{env}", 2, 2, decorrelate=decorrelate), one)
    assert_equal(run(f"envpool:{env}", 4, 3, decorrelate=decorrelate), one)
    assert_rule(one)


def test_seed_decides_and_slots_differ() -> None:
    one, other = run("envpool:CartPole-v1"), run("envpool:CartPole-v1", seed=6)
    assert len({row.tobytes() for row in np.concatenate([one.obs[0], other.obs[0]])}) == 8


def test_reset_starts_over() -> None:
    envs = make_envs("envpool:Pendulum-v1", 3)
    assert_equal(play(envs, 13, close=False), play(envs, 13))


def test_the_time_limit_truncates() -> None:
    played = run("envpool:Pendulum-v1")
    assert np.flatnonzero(played.truncated[:, 0]).tolist() == [23, 47]
    assert not played.terminated.any()


def test_float64_arrives_as_float32_and_actions_leave_as_float64() -> None:
    envs = make_envs("envpool:HalfCheetah-v4", 2)
    assert envs.spec.observation_space.dtype == np.float64
    played = play(envs, 3)
    assert played.obs.dtype == np.float32
    assert (played.obs[1] != played.obs[0]).any()


def test_dict_observations() -> None:
    envs = make_envs("envpool:MiniGrid-Empty-5x5-v0", 2)
    envs.reset(0)
    obs = envs.recv(0).obs
    assert {key: (leaf.dtype, leaf.shape) for key, leaf in obs.items()} == {
        "direction": (np.int64, (2,)),
        "image": (np.uint8, (2, 7, 7, 3)),
        "mission": (np.uint8, (2, 96)),
    }
    envs.close()


def test_football_is_deterministic_for_a_seed() -> None:
    def football(threads: int, seed: int = 5) -> Played:
        env = "envpool:gfootball/academy_empty_goal_close-v1"
        return play(make_envs(env, 2, 2, EnvOptions(max_episode_steps=13), threads=threads), 29, seed)

    one = football(1)
    assert one.obs.shape == (30, 2, 72, 96, 4)
    assert_equal(football(2), one)
    assert_rule(one)
    assert make_envs("envpool:gfootball/academy_empty_goal_close-v1", 2).spec.family == "gfootball"


@pytest.mark.parametrize("life_loss", [True, False])
def test_atari_follows_the_options(life_loss: bool) -> None:
    options = EnvOptions(AtariOptions(life_loss=life_loss, frame_stack=2, noop_max=0, screen_size=42))
    envs = make_envs("envpool:Breakout-v5", 4, 2, options)
    assert envs.spec.observation_space.shape == (2, 42, 42)
    assert (envs.spec.frames_per_step, envs.spec.family) == (4, "atari")
    played = play(envs, 301)
    assert_rule(played, life_loss)
    assert (played.terminated & ~played.ended).any() == life_loss


def test_atari_rewards_are_raw() -> None:
    assert 10.0 in play(make_envs("envpool:MsPacman-v5", 2), 141).reward


def test_families_and_lists() -> None:
    families = list_envs()
    for family, id in [
        ("gfootball", "envpool:gfootball/academy_empty_goal_close-v1"),
        ("atari", "envpool:Pong-v5"),
        ("mujoco", "envpool:HalfCheetah-v4"),
        ("classic", "envpool:CartPole-v1"),
    ]:
        assert id in families[family]
        assert adapter.envpool_family(id) == family


@pytest.mark.parametrize(
    ("env", "options", "message"),
    [
        ("envpool:Pnog-v5", EnvOptions(), r"unknown environment 'envpool:Pnog-v5'; did you mean .*envpool:Pong-v5"),
        ("envpool:Pong-v5", EnvOptions(frame_stack=2), "frame_stack is for Gymnasium environments"),
        ("envpool:Pong-v5", EnvOptions(AtariOptions(maxpool=False)), "EnvPool always max-pools"),
        ("envpool:CartPole-v1", EnvOptions(kwargs={"seed": 3}), r"env kwargs \['seed'\] are set by num_envs, lanes"),
        (
            "envpool:HalfCheetah-v4",
            EnvOptions(kwargs={"frame_skp": 3}),
            r"unknown env kwarg 'frame_skp'; it has frame_",
        ),
    ],
)
def test_bad_input(env: str, options: EnvOptions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_envs(env, 2, 1, options)


def test_arguments_of_a_family() -> None:
    played = play(make_envs("envpool:FrozenLake-v1", 2, 1, EnvOptions(kwargs={"size": 8})), 2)
    assert played.obs.shape == (3, 2)
    assert make_envs("envpool:HalfCheetah-v4", 1, 1, EnvOptions(kwargs={"frame_stack": 2})).spec.num_envs == 1


def test_a_missing_package_is_one_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'envpool:Pong-v5 needs EnvPool: pip install "slipstream\[envpool\]"'):
        make_envs("envpool:Pong-v5", 2)
    assert adapter.list_envpool() == []


def test_wrong_shapes_are_noticed() -> None:
    envs = make_envs("envpool:CartPole-v1", 2)
    envs.reset(0)
    lane = envs._lanes[0]  # type: ignore[attr-defined]
    with pytest.raises(EnvError, match=r"expected observations float32 \[2, 4\], got float32 \[2, 3\]"):
        lane._convert(np.zeros((2, 3), np.float32))
    envs.close()
