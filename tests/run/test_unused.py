from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from rich.console import Console

from slipstream.run import loop, metrics
from slipstream.run.directory import RunDirectory
from slipstream.run.loop import Own, Trained
from slipstream.run.preset_table import PRESETS
from slipstream.run.presets import configure
from slipstream.run.unused import warn_slow_target, warn_unused
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
        ({"placement.cuda_graphs": True}, "placement.cuda_graphs=True (networks run on the CPU)"),
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
        (
            {"placement.collectors": "inline", "placement.loaders": 3},
            "placement.loaders=3 (placement.collectors is inline, so that all is done in one thread)",
        ),
        ({"reduction": "all_reduce"}, "reduction=all_reduce (there is one learner, by placement.learners)"),
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
        {"reduction": "all_reduce", "placement.learners": 2},
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


@pytest.mark.parametrize(
    ("algo", "changes", "line"),
    [
        (
            "dqn",
            {"algo.replay.beta": 0.5},
            "algo.replay.beta=0.5 (algo.replay.alpha is 0, so that there are no priorities)",
        ),
        ("dqn", {"algo.replay.alpha": 0.6, "algo.replay.beta": 0.5}, ""),
        (
            "r2d2",
            {"algo.replay.alpha": 0.0, "algo.eta": 0.5},
            "algo.eta=0.5 (algo.replay.alpha is 0, so that there are no priorities)",
        ),
        ("r2d2", {"algo.eta": 0.5, "algo.replay.beta": 0.5}, ""),
        (
            "rainbow",
            {"algo.noisy": False, "algo.sigma0": 0.1},
            "algo.sigma0=0.1 (algo.noisy is off, so that no layer is noisy)",
        ),
        ("rainbow", {"algo.sigma0": 0.1}, ""),
        (
            "rainbow",
            {"algo.exploration.final": 0.1, "algo.exploration.least": 0.05, "algo.exploration.steps": 7},
            "algo.exploration.final=0.1, algo.exploration.least=0.05, algo.exploration.steps=7 (with algo.noisy "
            "epsilon is 0 once learning has begun)",
        ),
        ("rainbow", {"algo.noisy": False, "algo.exploration.final": 0.1}, ""),
        ("rainbow", {"algo.exploration.initial": 0.5, "algo.exploration.evaluation": 0.1}, ""),
        ("dqn", {"algo.exploration.final": 0.1}, ""),
        (
            "impala",
            {"algo.replay.capacity": 7_000, "algo.replay.memory_map": True},
            "algo.replay.capacity=7000, algo.replay.memory_map=True (algo.replay.proportion is 0: nothing is replayed)",
        ),
        ("appo", {"algo.replay.trust_region": 0.1}, ""),
        ("appo", {"algo.replay.proportion": 1.0, "algo.replay.capacity": 7_000, "algo.replay.memory_map": True}, ""),
    ],
)
def test_settings_of_replays(algo: str, changes: dict[str, Any], line: str) -> None:
    found = _lines("CartPole-v1", "classic", VECTOR, DISCRETE, changes, algo=algo)
    assert found == [f"no effect: {line}"] * bool(line)


@pytest.mark.parametrize("adapts", [False, True])
def test_a_target_entropy_is_for_a_temperature_that_adapts(adapts: bool) -> None:
    changes = {"algo.adapt_alpha": adapts, "algo.target_entropy": -2.0}
    line = "no effect: algo.target_entropy=-2.0 (algo.adapt_alpha is off: alpha stays as it is)"
    assert _lines("HalfCheetah-v5", "mujoco", VECTOR, CONTINUOUS, changes, algo="sac") == [line] * (not adapts)


@pytest.mark.parametrize("algo", ["c51", "dqn", "qrdqn", "r2d2", "rainbow", "impala", "appo"])
def test_no_preset_of_a_replay_is_warned_of(algo: str) -> None:
    assert _lines("CartPole-v1", "classic", VECTOR, DISCRETE, {}, algo=algo) == []
    assert _lines("ALE/Pong-v5", "atari", IMAGE, DISCRETE, {}, algo=algo) == []


def test_a_run_that_ends_before_its_first_gradient_step_is_said(tmp_path: Path) -> None:
    """And one that is resumed for fewer steps than its replay is filled with."""
    small = {"num_envs": 2, "unroll": 3, "lanes": 1, "net.hidden": [8], "placement.workers": 1, "algo.batch_size": 2}
    small |= {"log.dir": str(tmp_path), "log.tensorboard": False, "total_steps": 60, "algo.replay.ratio": 0.25}

    def said(act: Callable[[], Trained]) -> tuple[list[str], Trained]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trained = act()
        return [str(each.message) for each in caught], trained

    def train(starts: int, **more: Any) -> tuple[list[str], Trained]:
        config = configure("dqn", "toy:catch", {**small, "algo.replay.learning_starts": starts, **more})
        return said(lambda: loop.train(config, Own(), [], Console(quiet=True)))

    def resume(run: RunDirectory, total_steps: int) -> list[str]:
        return said(lambda: loop.resume(run.path, Own(), {"total_steps": total_steps}, Console(quiet=True)))[0]

    lines, trained = train(60)
    assert lines == [
        "nothing will be learned up to total_steps=60: the next gradient step is due at step 64, by "
        "algo.replay.learning_starts=60 and algo.replay.ratio=0.25; raise total_steps, or lower "
        "algo.replay.learning_starts"
    ]
    assert metrics.read(trained.run.metrics)[-1]["train/gradient_steps"] == 0
    lines, trained = train(50)
    assert lines == []
    assert metrics.read(trained.run.metrics)[-1]["train/gradient_steps"] > 0
    _, trained = train(50, **{"log.save_replay": False})
    (line,) = resume(trained.run, 90)
    assert line.startswith("nothing will be learned up to total_steps=90: the next gradient step is due at step 11")
    assert resume(trained.run, 150) == []
    assert train(0, **{"algo.batch_size": 1})[0] == [], "nobody waits for more than the slab"
    assert train(12, **{"algo.batch_size": 14})[0] == []
    lines, trained = train(6, **{"algo.batch_size": 14})
    assert lines == [
        "the first gradient step waits until step 16, for a batch of algo.batch_size=14, while actions are random up "
        "to algo.replay.learning_starts=6 only; set that to 16"
    ]
    assert metrics.read(trained.run.metrics)[-1]["train/gradient_steps"] > 0
    (line,) = train(6, **{"algo.batch_size": 64, "algo.replay.capacity": 200})[0]
    assert line.endswith(
        "by algo.batch_size=64 and algo.replay.ratio=0.25; raise total_steps, or lower algo.batch_size"
    )


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({}, False),
        ({"target_update_interval": 500}, True),
        ({"target_update_interval": 500, "tau": 1.0}, False),
        ({"tau": 0.005}, False),
    ],
)
def test_a_target_that_would_hardly_move_is_said(changes: dict[str, Any], warned: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_slow_target(configure("dqn", "CartPole-v1", changes))
        warn_slow_target(configure("dqn", "ALE/Pong-v5", changes))  # its preset copies
    line = (
        "every algo.target_every=500 steps the target takes in algo.tau=0.01 of the network, by the preset: "
        "--algo.tau 1 copies it"
    )
    assert [str(each.message) for each in caught] == [line] * warned


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
