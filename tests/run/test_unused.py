from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from slipstream.run.preset_table import PRESETS
from slipstream.run.presets import configure
from slipstream.run.unused import warn_unused
from slipstream.types import EnvSpec

IMAGE, VECTOR = spaces.Box(0, 255, (4, 84, 84), np.uint8), spaces.Box(-1.0, 1.0, (3,))
DISCRETE, CONTINUOUS = spaces.Discrete(3), spaces.Box(-1.0, 1.0, (2,))


def _lines(
    env: str,
    family: str,
    obs: Any,
    actions: Any,
    changes: dict[str, Any],
    torso: bool = False,
    policy: bool = False,
    algo: str = "ppo",
) -> list[str]:
    config = configure(algo, env, changes)
    spec = EnvSpec(env, obs, actions, num_envs=config.num_envs, family=family)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_unused(config, spec, torso, policy)
    return [str(each.message) for each in caught]


def _cartpole(changes: dict[str, Any], torso: bool = False, policy: bool = False) -> list[str]:
    return _lines("CartPole-v1", "classic", VECTOR, DISCRETE, changes, torso, policy)


def _pong(changes: dict[str, Any], torso: bool = False, policy: bool = False) -> list[str]:
    return _lines("ALE/Pong-v5", "atari", IMAGE, DISCRETE, changes, torso, policy)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"net.torso": "nature_cnn"}, "net.torso=nature_cnn (no observation of CartPole-v1 is an image)"),
        (
            {"env_options.atari.noop_max": 3},
            "env_options.atari.noop_max=3 (CartPole-v1 is no Atari game)",
        ),
        (
            {"num_envs": 4, "placement.env_workers": 5},
            "placement.env_workers=5 (only 4 have an environment to step, by num_envs)",
        ),
        (
            {"placement.env_threads": 2},
            "placement.env_threads=2 (CartPole-v1 is stepped in Python; see placement.env_workers)",
        ),
        (
            {"num_envs": 4, "lanes": 2, "placement.workers": 3},
            "placement.workers=3 (only 2 have a lane or a shard to work on)",
        ),
        ({"net.core_size": 7}, "net.core_size=7 (net.core is none, so that there is no memory)"),
        ({"net.log_std_init": -1.0}, "net.log_std_init=-1.0 (the actions of CartPole-v1 are not continuous)"),
        ({"algo.surrogate": "acting"}, "algo.surrogate=acting (under schedule=sync both are the same)"),
        ({"log.eval_episodes": 7}, "log.eval_episodes=7 (log.eval_every is 0, so that nothing is evaluated)"),
        (
            {"env_options.timeout_seconds": 7},
            "env_options.timeout_seconds=7.0 (it is for processes: placement.env_workers or collectors)",
        ),
    ],
)
def test_a_setting_without_effect_is_said(changes: dict[str, Any], line: str) -> None:
    assert _cartpole(changes) == [f"no effect: {line}"]


@pytest.mark.parametrize(
    "changes",
    [
        {"net.hidden": [7], "net.activation": "relu", "net.normalize_obs": True},
        {"num_envs": 4, "placement.env_workers": 4, "env_options.timeout_seconds": 7},
        {"num_envs": 4, "lanes": 2, "shards": 4, "placement.workers": 4},
        {"net.core": "gru", "net.core_size": 7, "algo.batch_size": 64},
        {"log.eval_every": 100, "log.eval_episodes": 7},
        {"schedule": "concurrent", "algo.surrogate": "acting"},
    ],
)
def test_a_setting_with_an_effect_is_not(changes: dict[str, Any]) -> None:
    assert _cartpole(changes) == []


def test_on_atari() -> None:
    assert _pong({"env_options.atari.noop_max": 3, "placement.env_threads": 2, "net.torso": "mlp"}) == []
    assert _pong({"placement.env_workers": 2, "net.hidden": [7], "net.normalize_obs": True}) == [
        "no effect: placement.env_workers=2 (ALE/Pong-v5 is stepped by native threads; see placement.env_threads)",
        "no effect: net.hidden=(7,) (all that ALE/Pong-v5 shows are images, seen by nature_cnn)",
        "no effect: net.normalize_obs=True (no observation of ALE/Pong-v5 is a vector of floats)",
    ]


def test_parts_of_ones_own() -> None:
    """A preset's settings are nobody's mistake: on Atari it sets a torso."""
    assert _pong({}, torso=True) == _pong({}, policy=True) == []
    assert _cartpole({"net.hidden": [7], "net.core": "gru"}, torso=True) == [
        "no effect: net.hidden=(7,) (the torso is your own)"
    ]
    assert _cartpole({"net.hidden": [7], "net.core": "gru"}, policy=True) == [
        "no effect: net.hidden=(7,), net.core=gru (the policy is your own)"
    ]


def test_networks_of_algorithms_with_a_replay() -> None:
    changes = {"net.share_torso": False, "net.log_std_init": -1.0}
    own = "networks of its own for policy and values"
    assert _lines("HalfCheetah-v5", "mujoco", VECTOR, CONTINUOUS, changes, algo="sac") == [
        f"no effect: net.share_torso=False, net.log_std_init=-1.0 (sac has {own})"
    ]
    assert _lines("CartPole-v1", "classic", VECTOR, DISCRETE, changes, algo="dqn") == [
        "no effect: net.log_std_init=-1.0 (the actions of CartPole-v1 are not continuous)",
        "no effect: net.share_torso=False (there is one network, that of Q)",
    ]


def test_a_file_for_another_environment_is_one_line() -> None:
    atari = configure("ppo", "ALE/Pong-v5").env_options.atari
    settings = {f"env_options.atari.{name}": value for name, value in vars(atari).items()}
    (line,) = _cartpole(settings)
    assert line.startswith("no effect: env_options.atari.sticky_actions=0.0, env_options.atari.noop_max=30, ")
    assert line.endswith(" and 8 more (CartPole-v1 is no Atari game)")


@pytest.mark.parametrize(
    ("env", "family", "obs", "actions"),
    [
        ("ALE/Pong-v5", "atari", IMAGE, DISCRETE),
        ("CartPole-v1", "classic", VECTOR, DISCRETE),
        ("HalfCheetah-v5", "mujoco", VECTOR, CONTINUOUS),
        ("LunarLander-v3", "box2d", VECTOR, DISCRETE),
        ("toy:catch", "toy", VECTOR, DISCRETE),
    ],
)
def test_no_preset_is_warned_of(env: str, family: str, obs: Any, actions: Any) -> None:
    assert any(each == family for _, each in PRESETS)
    assert _lines(env, family, obs, actions, {}) == []
