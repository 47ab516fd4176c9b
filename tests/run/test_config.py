from __future__ import annotations

import pytest
import yaml

from slipstream.algos import A2C, ALGORITHMS, PPO
from slipstream.run import presets, settings
from slipstream.run.config import Config, ConfigError, Log, Placement, from_plain, override
from slipstream.run.directory import to_yaml


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lanes": 2, "num_envs": 9}, "lanes=2 must divide num_envs=9; nearest that fit: lanes=1, or num_envs=10"),
        ({"group": 3, "lanes": 8}, "group=3 must divide lanes=8; nearest that fit: group=2, or lanes=9"),
        ({"lanes": 5, "num_envs": 12}, "lanes=5 must divide num_envs=12; nearest that fit: lanes=4, or num_envs=15"),
        ({"shards": 3, "num_envs": 8}, "shards=3 must divide num_envs=8; nearest that fit: shards=2, or num_envs=9"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
        ({"placement": {"workers": -1}}, "placement.workers must be at least 0, got -1"),
        ({"log": {"keep_last": 0}}, "log.keep_last must be at least 1, got 0"),
        ({"net.torso": "nature"}, "net.torso: expected one of"),
        ({"algo.epochs": 0}, "algo.epochs must be at least 1, got 0"),
        ({"algo.lr": "-1"}, "algo.lr must be at least 0, got -1.0"),
        ({"net.hidden": "64,0"}, "net.hidden must be sizes of at least 1, got (64, 0)"),
        ({"env_options.frame_stack": 0}, "env_options: frame_stack must be at least 1, got 0"),
    ],
)
def test_contradictions(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override(Config(env="x", algo=PPO()), changes)
    assert str(caught.value).startswith(message)


def test_validation_guards_the_constructor_too() -> None:
    with pytest.raises(ConfigError, match="lanes=2 must divide"):
        Config(env="x", algo=PPO(), num_envs=3, lanes=2)
    with pytest.raises(ConfigError, match=r"log\.metrics_every"):
        Log(metrics_every=0)
    with pytest.raises(ConfigError, match=r"placement\.env_threads"):
        Placement(env_threads=-2)


def test_settings_that_only_fit_together_can_be_changed_together() -> None:
    config = override(Config(env="x", algo=A2C(), num_envs=8, lanes=4), {"num_envs": 6, "lanes": "3"})
    assert (config.num_envs, config.lanes) == (6, 3)


def test_yaml_holds_the_whole_configuration() -> None:
    config = presets.configure("ppo", "ALE/Pong-v5", {"env_options.atari.sticky_actions": 0.25, "seed": 3})
    assert from_plain(yaml.safe_load(to_yaml(config))) == config
    assert set(settings.flatten(yaml.safe_load(to_yaml(config)))) >= set(settings.keys(Config, algo=PPO)) - {
        "env_options.kwargs"
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"env": "x"}, f"algo.name is missing. Known: {', '.join(sorted(ALGORITHMS))}."),
        ({"env": "x", "algo": {"name": "pppo"}}, "unknown algorithm 'pppo'. Did you mean ppo?"),
        ({"algo": {"name": "ppo"}}, "env is missing"),
        ({"env": "x", "algo": {"name": "ppo", "lrr": 1}}, "unknown setting algo.lrr. Did you mean algo.lr?"),
    ],
)
def test_from_plain_says_what_is_wrong(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_plain(values)
    assert str(caught.value) == message
