"""Options: the two Atari protocols and their overrides."""

from __future__ import annotations

from typing import Any

import pytest
import tyro

from slipstream.envs.make import atari_protocol
from slipstream.envs.options import PROTOCOLS, AtariOptions, EnvOptions


def test_protocols_differ_where_the_literature_says() -> None:
    v4, v5 = PROTOCOLS["v4"], PROTOCOLS["ale_v5"]
    assert (v4.sticky_actions, v4.noop_max, v4.life_loss, v4.fire_on_reset) == (0.0, 30, True, True)
    assert (v5.sticky_actions, v5.noop_max, v5.life_loss, v5.fire_on_reset) == (0.25, 0, False, False)
    for shared in (v4, v5):
        assert (shared.frame_skip, shared.frame_stack, shared.screen_size, shared.max_frames) == (4, 4, 84, 108_000)
        assert not shared.full_action_set


def test_no_sticky_actions_by_default() -> None:
    assert AtariOptions().spelled_out() == PROTOCOLS["v4"]


def test_an_override_changes_one_choice() -> None:
    chosen = AtariOptions(protocol="ale_v5", life_loss=True, sticky_actions=0.0).spelled_out()
    assert (chosen.life_loss, chosen.sticky_actions, chosen.noop_max) == (True, 0.0, 0)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"sticky_actions": 1.5}, "atari.sticky_actions is a probability"),
        ({"noop_max": -1}, "atari.noop_max must be 0 or more"),
        ({"frame_skip": 0}, "atari.frame_skip must be at least 1"),
    ],
)
def test_bad_atari_choices(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AtariOptions(**choice).spelled_out()


@pytest.mark.parametrize("choice", [{"frame_stack": 0}, {"max_episode_steps": 0}, {"decorrelate_steps": -1}])
def test_bad_env_choices(choice: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(choice))):
        EnvOptions(**choice)


def test_options_are_flags() -> None:
    words = [
        "--atari.protocol",
        "ale_v5",
        "--atari.noop-max",
        "7",
        "--max-episode-steps",
        "9",
        "--kwargs",
        "size",
        "3",
        "slow",
        "True",
        "name",
        "abc",
    ]
    options = tyro.cli(EnvOptions, args=words)
    assert options.atari.spelled_out().noop_max == 7
    assert options.atari.spelled_out().sticky_actions == 0.25
    assert options.max_episode_steps == 9
    assert options.kwargs == {"size": 3, "slow": True, "name": "abc"}


def test_ids_and_protocols() -> None:
    assert atari_protocol("PongNoFrameskip-v4", EnvOptions()) == PROTOCOLS["v4"]
    assert atari_protocol("ALE/Pong-v5", EnvOptions()) == PROTOCOLS["v4"]
    assert atari_protocol("ALE/Pong-v5", EnvOptions(atari=AtariOptions("ale_v5"))) == PROTOCOLS["ale_v5"]
    assert atari_protocol("ALE/Pong-v5", EnvOptions(max_episode_steps=100)).max_frames == 400
    with pytest.raises(ValueError, match=r"PongNoFrameskip-v4 means protocol v4, but atari\.protocol is ale_v5"):
        atari_protocol("PongNoFrameskip-v4", EnvOptions(atari=AtariOptions("ale_v5")))
    with pytest.raises(ValueError, match=r"atari\.frame_stack"):
        atari_protocol("ALE/Pong-v5", EnvOptions(frame_stack=2))
    with pytest.raises(ValueError, match=r"unknown env kwargs \['mode'\]"):
        atari_protocol("ALE/Pong-v5", EnvOptions(kwargs={"mode": 1}))
