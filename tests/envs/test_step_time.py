"""The laboratory for waiting: rows that do not know about time, and times that are what they were chosen to be."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from slipstream import dice
from slipstream.envs import EnvError, EnvOptions, make_envs, sleeping, step_time
from slipstream.envs.gym import GymEnvs
from slipstream.envs.sleeping import SleepingEnvs
from slipstream.envs.step_time import StepTime

from .playing import Played, assert_equal, assert_rule, play, play_ready


class Clock:
    """Time that passes only in `sleep`, and is written down."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(sleeping, "time", made)
    monkeypatch.setattr(step_time, "time", made)
    return made


def played(lanes: int = 1, workers: int = 0, ready: bool = False, seed: int = 5, **kwargs: Any) -> Played:
    options = EnvOptions(kwargs={"length": 5, "mean_ms": 0.0, **kwargs})
    envs = make_envs("toy:step_time", 6, lanes, options, workers=workers)
    return play_ready(envs, 31, seed) if ready else play(envs, 31, seed)


def test_sleeping_slots_show_the_rows_of_gym_envs() -> None:
    spinning = played(clock="spin")
    assert_rule(spinning)
    for lanes in (1, 3, 6):
        assert_equal(played(lanes), spinning)
        assert_equal(played(lanes, ready=True), spinning)
    assert_equal(played(3, workers=2), spinning)
    assert_equal(played(3, workers=2, clock="spin"), spinning)
    assert len({row.tobytes() for row in spinning.obs[0]}) == 6


def test_backends() -> None:
    assert isinstance(make_envs("toy:step_time", 2), SleepingEnvs)
    assert isinstance(make_envs("toy:step_time", 2, options=EnvOptions(kwargs={"clock": "spin"})), GymEnvs)


def test_what_is_shown_does_not_depend_on_the_time(clock: Clock) -> None:
    for changes in ({"mean_ms": 3.0}, {"distribution": "gamma", "mean_ms": 1.0}, {"distribution": "uniform"}):
        assert_equal(played(2, **changes), played(2))
    assert clock.slept


@pytest.mark.parametrize(
    ("choices", "deviation"),
    [
        ({"distribution": "exponential"}, 1.0),
        ({"distribution": "gamma", "shape": 4.0}, 0.5),
        ({"distribution": "uniform"}, 3**-0.5),
        ({"distribution": "constant"}, 0.0),
    ],
)
def test_times_have_the_chosen_mean_and_deviation(choices: dict[str, Any], deviation: float) -> None:
    env = StepTime(mean_ms=5.0, length=200_000, **choices)
    _, seconds = env.episode(np.random.Generator(np.random.Philox(3)))
    assert seconds.mean() == pytest.approx(0.005, rel=0.01)
    assert seconds.std() == pytest.approx(0.005 * deviation, rel=0.02, abs=1e-12)
    assert (seconds >= 0).all()


def seconds_of(env: StepTime, seed: int, slot: int, episode: int) -> list[float]:
    env.reset(seed=dice.env_seed(seed, "env", slot, episode))
    return env._seconds.tolist()


def test_a_lane_takes_as_long_as_its_slowest_slot(clock: Clock) -> None:
    """Two lanes of two slots; rows 0 to 4 are the first episode, row 5 the reset of the second."""
    envs = make_envs("toy:step_time", 4, 2, EnvOptions(kwargs={"length": 4}))
    silent = StepTime(mean_ms=5.0, length=4)
    silent._take_time = lambda: None  # type: ignore[method-assign]
    envs.reset(5)
    own = [[*seconds_of(silent, 5, slot, 0), *seconds_of(silent, 5, slot, 1)] for slot in (2, 3)]
    for row in range(8):
        before = clock.now
        envs.recv(1)
        assert clock.now - before == pytest.approx(max(own[0][row], own[1][row]))
        envs.send(np.zeros(2, np.int64), 1)


def test_waiting_ends_with_the_first_lane(clock: Clock) -> None:
    envs = make_envs("toy:step_time", 3, 3, EnvOptions(kwargs={"mean_ms": 5.0}))
    envs.reset(5)
    for lane in range(3):
        envs.recv(lane)
    start = clock.now
    for lane in range(3):
        envs.send(np.zeros(1, np.int64), lane)
    due = list(envs._due)
    order: list[int] = []
    while len(order) < 3:
        (lane,) = envs.wait([lane for lane in range(3) if lane not in order])
        order.append(lane)
        assert clock.now == pytest.approx(due[lane])
    assert order == sorted(range(3), key=lambda lane: due[lane])
    assert clock.now - start == pytest.approx(max(due) - start)


def test_spinning_takes_its_time() -> None:
    env = StepTime(mean_ms=2.0, distribution="constant", clock="spin")
    env.reset(seed=3)
    start = time.perf_counter()
    for _ in range(3):
        env.step(np.int64(0))
    assert time.perf_counter() - start >= 0.006


def test_the_reward_can_be_learned() -> None:
    env = StepTime(mean_ms=0.0, length=7)
    obs, _ = env.reset(seed=3)
    total = 0.0
    for _ in range(7):
        obs, reward, over, _, _ = env.step(np.int64(obs[0] > 0.5))
        total += reward
    assert over
    assert total == env.optimal_return


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"distribution": "normal"}, "distribution must be one of exponential, gamma, uniform, constant, got 'normal'"),
        ({"clock": "wait"}, "clock must be one of sleep, spin, got 'wait'"),
        ({"mean_ms": -1.0}, "expected mean_ms of at least 0"),
        ({"length": 0}, "length of at least 1"),
        ({"mean": 1.0}, "unexpected keyword argument 'mean'"),
    ],
)
def test_choices_that_mean_nothing(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(EnvError, match="making the environment of slot 0 failed") as caught:
        make_envs("toy:step_time", 2, options=EnvOptions(kwargs=kwargs))
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["frame_stack", "max_episode_steps", "decorrelate_steps"])
def test_options_that_would_wrap_a_sleeping_environment(name: str) -> None:
    options: dict[str, Any] = {name: 3}
    with pytest.raises(ValueError, match=f"{name} is not for environments that sleep; set clock=spin"):
        make_envs("toy:step_time", 2, options=EnvOptions(**options))
    make_envs("toy:step_time", 2, options=EnvOptions(kwargs={"clock": "spin", "mean_ms": 0.0}, **options)).close()
