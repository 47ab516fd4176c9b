"""NaN and infinity from environments: refused, or mended before anybody has seen them."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from slipstream.envs import EnvError, EnvOptions, make_envs
from slipstream.types import Envs, EnvStep

NAN, INF = float("nan"), float("inf")


class Spiky(gymnasium.Env[Any, Any]):
    """Counts its steps, nine in an episode; step `at` of its first episode shows what it is told."""

    observation_space = gymnasium.spaces.Dict(
        {
            "bounded": gymnasium.spaces.Box(-3.0, 9.0, (2,), np.float32),
            "count": gymnasium.spaces.Discrete(100),
            "free": gymnasium.spaces.Box(-np.inf, np.inf, (), np.float64),
        }
    )
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, bounded: float, free: float, reward: float, at: int = 3) -> None:
        self._spike, self._at = (bounded, free, reward), at
        self._episode, self._t = -1, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, Any]:
        super().reset(seed=seed)
        self._episode, self._t = self._episode + 1, 0
        return self._answer()[0], {}

    def step(self, action: Any) -> Any:
        self._t += 1
        obs, reward = self._answer()
        return obs, reward, self._t == 9, False, {"goals": 2 * reward}

    def _answer(self) -> tuple[Any, float]:
        spikes = (self._episode, self._t) == (0, self._at)
        bounded, free, reward = self._spike if spikes else (self._t, self._t, 1.0)
        both = np.array([bounded, self._t], np.float32)
        return {"bounded": both, "count": np.int64(self._t), "free": np.float64(free)}, reward


SPIKES = {"nan": (NAN, 1.0, 1.0), "inf": (1.0, -INF, 1.0), "reward": (1.0, 1.0, NAN), "all": (-INF, NAN, INF)}


def spiky(spike: str, rule: Any, backend: str, at: int = 3, **options: Any) -> Envs:
    """Two environments in one lane."""
    make: Any = partial(Spiky, *SPIKES[spike], at)
    if backend == "vector":
        return make_envs(
            lambda: SyncVectorEnv([make] * 2, autoreset_mode=AutoresetMode.NEXT_STEP), 2, 1, EnvOptions(non_finite=rule)
        )
    return make_envs(make, 2, 1, EnvOptions(non_finite=rule, **options), workers=2 if backend == "worker" else 0)


def advance(envs: Envs, rows: int) -> list[EnvStep]:
    """The rows after a reset; copies, since an `EnvStep` holds until the next `send`."""
    envs.reset(5)
    steps = [envs.recv(0)]
    for _ in range(rows):
        envs.send(np.zeros(2, np.int64), 0)
        row = envs.recv(0)
        obs = {name: leaf.copy() for name, leaf in row.obs.items()}
        score = None if row.score is None else row.score.copy()
        steps.append(
            EnvStep(
                obs, row.reward.copy(), row.terminated.copy(), row.truncated.copy(), row.ended.copy(), score, row.mended
            )
        )
    envs.close()
    return steps


@pytest.mark.parametrize("backend", ["here", "worker"])
@pytest.mark.parametrize("spike", SPIKES)
def test_skip_cuts_the_episode_before_the_spike(backend: str, spike: str) -> None:
    rows = advance(spiky(spike, "skip", backend, score_key="goals"), 5)
    cut, before = rows[3], rows[2]
    for name, leaf in cut.obs.items():
        assert np.array_equal(leaf, before.obs[name]), name
    assert cut.score is not None
    assert cut.reward.tolist() == cut.score.tolist() == [0.0, 0.0]
    assert [flag.tolist() for flag in cut[2:5]] == [[False, False], [True, True], [True, True]]
    assert [row.obs["count"].tolist() for row in rows[3:]] == [[2, 2], [0, 0], [1, 1]], "then the next episode begins"
    assert [row.mended for row in rows] == [0, 0, 0, 2, 0, 0]
    assert not rows[4].ended.any()


@pytest.mark.parametrize("backend", ["here", "worker", "vector"])
def test_clamp_writes_a_bound_or_nothing_and_the_episode_goes_on(backend: str) -> None:
    for spike, bounded, free, reward in [("nan", 0, 1, 1), ("inf", 1, 0, 1), ("reward", 1, 1, 0), ("all", -3, 0, 0)]:
        rows = advance(spiky(spike, "clamp", backend), 4)
        assert rows[3].obs["bounded"].tolist() == [[bounded, 3.0]] * 2, spike
        assert rows[3].obs["bounded"].dtype == rows[3].obs["free"].dtype == np.float32
        assert rows[3].obs["free"].tolist() == [free] * 2, spike
        assert rows[3].obs["count"].tolist() == [3, 3]
        assert rows[3].reward.tolist() == [reward] * 2, spike
        assert not rows[3].ended.any()
        assert rows[4].obs["count"].tolist() == [4, 4]
        assert [row.mended for row in rows] == [0, 0, 0, 2, 0], spike


@pytest.mark.parametrize("backend", ["here", "worker", "vector"])
def test_by_default_it_is_an_error_that_says_what_else_there_is(backend: str) -> None:
    place = "row 3" if backend == "vector" else "step 3, episode 0"
    with pytest.raises(EnvError, match=rf"slot 0, {place}: expected finite numbers as reward, got nan; --env-options"):
        advance(spiky("reward", "raise", backend), 3)


def test_a_score_that_is_not_finite_is_one_too() -> None:
    with pytest.raises(EnvError, match="expected finite numbers as score"):
        advance(make_envs(Half, 2, 1, EnvOptions(score_key="goals")), 3)


def test_a_number_that_float32_cannot_hold_is_called_so() -> None:
    envs = make_envs(partial(Spiky, 1.0, 1.0, 1e300), 2)
    with pytest.raises(EnvError, match=r"as reward, got inf \(float32 holds nothing beyond 3\.4e38\); --env-options"):
        advance(envs, 3)


class Half(Spiky):
    """A reward that is finite, of which the score is twice too much."""

    def __init__(self) -> None:
        super().__init__(1.0, 1.0, 3e38)


def test_skip_has_nothing_to_hold_on_to_where_a_reset_is_not_finite() -> None:
    with pytest.raises(EnvError, match=r"slot 0, step 0, episode 0: expected finite numbers as observation.bounded"):
        advance(spiky("nan", "skip", "here", at=0), 1)


@pytest.mark.parametrize("rule", ["raise", "skip"])
def test_an_observation_of_another_shape_is_an_error_with_its_place_under_any_rule(rule: Any) -> None:
    envs = make_envs("toy:chaos", 2, 1, EnvOptions(non_finite=rule, kwargs={"fault": "shape", "at": 1}))
    envs.reset(5)
    with pytest.raises(EnvError, match=r"slot 0, step 1, .*expected float32 \[4\], got float32 \[3\]"):
        envs.send(np.zeros(2, np.int64), 0)


def test_skip_is_refused_where_episodes_cannot_be_cut_one_by_one() -> None:
    for make in (lambda: spiky("nan", "skip", "vector"), lambda: make_envs("envpool:Pendulum-v1", 2, 1, SKIP)):
        with pytest.raises(ValueError, match=r"non_finite=skip .*can't be reset one by one; use clamp, or raise"):
            make()


SKIP = EnvOptions(non_finite="skip")


def test_the_first_time_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        advance(spiky("all", "clamp", "here"), 12)
        advance(spiky("all", "skip", "worker"), 12)
        advance(spiky("inf", "skip", "here"), 12)
        advance(spiky("nan", "skip", "worker"), 12)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 4
    assert "slot 0, step 3, episode 0: expected finite numbers as reward, got inf (float32 holds" in told[0]
    assert "3.4e38), which is clamped" in told[0]
    assert "slot 0, step 3, episode 0: expected finite numbers as reward, got inf (float32 holds" in told[1]
    assert "3.4e38), and the episode is cut" in told[1]
    assert "expected finite numbers as observation.free, got -inf (float32" in told[2]
    assert "expected finite numbers as observation.bounded, got nan, and the episode is cut" in told[3]


def test_a_skipped_episode_is_played_back_as_it_was() -> None:
    from slipstream.envs.recorded import RecordedEnvs, bring_back

    envs = RecordedEnvs(spiky("nan", "skip", "here"))
    envs.reset(5)
    envs.recv(0)
    for _ in range(3):
        envs.send(np.zeros(2, np.int64), 0)
        envs.recv(0)
    history, seen = envs.history(), envs.seen()
    again = RecordedEnvs(spiky("nan", "skip", "here"))
    assert bring_back(again, 5, history, seen) == []
    assert again.recv(0).ended.all()
