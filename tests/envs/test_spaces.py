"""Spaces: what is supported, and the messages for what is not."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces as gym

from slipstream.envs import spaces


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (gym.Text(5), r"env: observation space Text.* is not supported; expected Box, Discrete"),
        (gym.Dict({"a": gym.Tuple((gym.Discrete(2), gym.Text(3)))}), r"at 'a\.1' is not supported"),
        (gym.Sequence(gym.Discrete(2)), "Sequence"),
    ],
)
def test_unsupported_observations_are_named(space: gymnasium.Space[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spaces.check_observation_space(space, "env")


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (gym.MultiBinary(3), r"env: action space MultiBinary\(3\) is not supported; expected Discrete, MultiDiscrete"),
        (gym.Dict({"a": gym.Discrete(2)}), "action space Dict"),
        (gym.Box(0, 5, (2,), np.int64), "must be of floats"),
        (gym.Box(-1, 1, ()), r"has no dimension; declare Box\(low, high, \(1,\)\), take action\[0\]"),
        (gym.MultiDiscrete(np.array([[2, 3], [4, 5]])), "2-dimensional nvec"),
    ],
)
def test_unsupported_actions_are_named(space: gymnasium.Space[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spaces.check_action_space(space, "env")


def write(space: gymnasium.Space[Any], value: Any) -> Any:
    arrays = spaces.empty_observations(space, 2)
    spaces.observation_writer(space, arrays)(1, value)
    return arrays


@pytest.mark.parametrize(
    ("space", "value", "message"),
    [
        (gym.Box(0, 1, (2,), np.float32), np.zeros(3, np.float32), r"expected float32 \[2\], got float32 \[3\]"),
        (gym.Box(0, 1, (2,), np.float32), np.zeros(2, np.float16), r"got float16 \[2\]"),
        (gym.Box(0, 255, (2,), np.uint8), np.zeros(2, np.int64), r"expected uint8 \[2\], got int64"),
        (gym.Box(0, 1, (2,), np.float32), [0.0, None], r"got list \[0\.0, None\]"),
        (gym.Discrete(3), 3, r"expected an integer in \[0, 2\], got int 3"),
        (gym.Discrete(3), 1.0, r"got float 1\.0"),
        (gym.Discrete(3, start=-1), -2, r"expected an integer in \[-1, 1\]"),
        (gym.Dict({"a": gym.Discrete(2)}), {"b": 1}, r"expected a dict with keys \['a'\], got \['b'\]"),
        (gym.Dict({"a": gym.Discrete(2)}), 1, "got int"),
        (gym.Tuple((gym.Discrete(2), gym.Discrete(2))), (1,), "expected a tuple of 2 entries, got 1 entries"),
        (gym.Dict({"a": gym.Tuple((gym.Discrete(2),))}), {"a": (5,)}, r"observation 'a\.0'"),
    ],
)
def test_wrong_observations_are_refused(space: gymnasium.Space[Any], value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(space, value)


def test_float64_is_the_one_cast() -> None:
    written = write(gym.Box(0, 1, (2,), np.float64), np.array([0.1, 0.2]))
    assert written.dtype == np.float32
    assert (written[1] == np.array([0.1, 0.2], np.float32)).all()
    assert (written[0] == 0).all()
    assert (write(gym.Box(0, 1, (2,), np.float32), np.array([0.1, 0.2]))[1] == np.float32([0.1, 0.2])).all()


def test_random_actions_stay_inside_and_are_spread() -> None:
    space = gym.Box(np.array([-2.0, -np.inf], np.float32), np.array([3.0, np.inf], np.float32))
    actions = spaces.Actions(space, 1, "env")
    generator = np.random.default_rng(0)
    drawn = np.stack([actions.sample(generator) for _ in range(1000)])
    assert drawn[:, 0].min() >= -2.0
    assert drawn[:, 0].max() <= 3.0
    assert abs(drawn[:, 0].mean() - 0.5) < 0.15
    assert abs(drawn[:, 1].std() - 1.0) < 0.1
    counts = np.bincount([int(spaces.Actions(gym.Discrete(3, start=7), 1, "e").sample(generator)) for _ in range(300)])
    assert len(counts) == 3
    assert counts.min() > 60


def test_policies_see_integers_from_zero() -> None:
    assert spaces.policy_action_space(gym.Discrete(3, start=5)) == gym.Discrete(3)
    assert spaces.policy_action_space(gym.MultiDiscrete([2, 3], start=[4, 5])) == gym.MultiDiscrete([2, 3])
