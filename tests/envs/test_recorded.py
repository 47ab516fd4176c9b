"""Slots are brought back to where they were by playing their actions again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from slipstream import tree
from slipstream.envs import EnvOptions, atari, make_envs
from slipstream.envs.options import AtariOptions
from slipstream.envs.recorded import RecordedEnvs, bring_back
from slipstream.types import EnvStep

SEED = 7


class Play:
    """Random actions for two sets of environments, which must show the same rows."""

    def __init__(self, make: Callable[[], RecordedEnvs]) -> None:
        self.envs = make()
        self.envs.reset(SEED)
        self.space = self.envs.spec.action_space
        self.space.seed(3)
        self.ended = 0
        for lane in range(self.envs.spec.lanes):
            self.envs.recv(lane)

    def step(self, other: RecordedEnvs | None = None) -> None:
        spec = self.envs.spec
        for lane in range(spec.lanes):
            action = self._draw()
            for envs in (self.envs, other):
                if envs is not None:
                    envs.send(action, lane)
        for lane in range(spec.lanes):
            step = self.envs.recv(lane)
            self.ended += int(step.ended.sum())
            if other is not None:
                assert_same(other.recv(lane), step)

    def _draw(self) -> NDArray[Any]:
        return np.stack([np.asarray(self.space.sample()) for _ in range(self.envs.spec.lane_size)])


def assert_same(one: EnvStep, other: EnvStep) -> None:
    for left, right in zip(tree.leaves(tuple(one[:5])), tree.leaves(tuple(other[:5])), strict=True):
        np.testing.assert_array_equal(left, right)
        assert left.dtype == right.dtype


def assert_comes_back(make: Callable[[], RecordedEnvs], before: int, after: int, ends: int) -> RecordedEnvs:
    played = Play(make)
    for _ in range(before):
        played.step()
    history, other = played.envs.history(), make()
    assert bring_back(other, SEED, history, played.envs.seen()) == []
    for lane in range(played.envs.spec.lanes):
        assert_same(other.recv(lane), played.envs.recv(lane))
    for _ in range(after):
        played.step(other)
    assert played.ended >= ends
    for name in ("start", "count", "action"):
        np.testing.assert_array_equal(getattr(other.history(), name), getattr(played.envs.history(), name))
    other.close()
    played.envs.close()
    return played.envs


def maker(id: str, num_envs: int, lanes: int, options: EnvOptions | None = None, workers: int = 0) -> Any:
    return lambda: RecordedEnvs(make_envs(id, num_envs, lanes, options, workers=workers))


@pytest.mark.parametrize("before", [0, 1, 13, 90, 333])
def test_gymnasium(before: int) -> None:
    assert_comes_back(maker("CartPole-v1", 4, 2), before, 100, ends=10)


@pytest.mark.parametrize(
    ("id", "options", "workers"),
    [
        ("CartPole-v1", None, 3),
        ("Pendulum-v1", EnvOptions(decorrelate_steps=30, max_episode_steps=40), 0),
        ("CartPole-v1", EnvOptions(decorrelate_steps=90, frame_stack=3), 1),
        ("toy:step_time", EnvOptions(kwargs={"mean_ms": 0.01, "length": 20}), 0),
    ],
)
def test_more_of_gymnasium(id: str, options: EnvOptions | None, workers: int) -> None:
    assert_comes_back(maker(id, 4, 2, options, workers), 77, 60, ends=4)


@pytest.mark.parametrize(
    ("options", "before"),
    [
        (EnvOptions(max_episode_steps=40, decorrelate_steps=25), 133),
        (EnvOptions(), 30),
        (EnvOptions(atari=AtariOptions(life_loss=True, sticky_actions=0.25)), 230),
    ],
)
def test_atari(options: EnvOptions, before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atari, "SEED_EVERY", 50)
    envs = assert_comes_back(maker("ALE/Breakout-v5", 4, 2, options), before, 230, ends=4)
    assert envs.history().start.min() >= 1
    # An episode that began within 50 rows of the last seed has gone on with the emulator's own numbers.
    assert envs.history().count.max() > 50


def test_a_history_longer_than_its_first_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    options = EnvOptions(kwargs={"mean_ms": 0.01, "length": 1000})
    assert_comes_back(maker("toy:step_time", 2, 1, options), 700, 900, ends=2)


def test_what_does_not_come_back_is_named() -> None:
    played = Play(maker("CartPole-v1", 4, 2))
    for _ in range(20):
        played.step()
    seen = played.envs.seen()
    seen[2] += 1
    other = maker("CartPole-v1", 4, 2)()
    assert bring_back(other, SEED, played.envs.history(), seen) == [2]


def test_histories_travel() -> None:
    played = Play(maker("Pendulum-v1", 4, 2))
    for _ in range(5):
        played.step()
    history = played.envs.history()
    parsed = type(history).parse(history.dump())
    joined = type(history).join([parsed.part(slice(0, 1)), parsed.part(slice(1, 4))])
    for name in ("start", "count", "action"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(history, name))
        assert getattr(joined, name).dtype == getattr(history, name).dtype
    np.testing.assert_array_equal(joined.of(3), history.action[15:])
