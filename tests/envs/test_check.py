"""check-env finds what was planted, and nothing else."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from slipstream.envs import EnvOptions, check_env, make_envs
from slipstream.envs.toy import Catch


@pytest.mark.parametrize(
    "env", ["CartPole-v1", "Pendulum-v1", "Blackjack-v1", "toy:catch", "toy:recall", "toy:lqr", "envpool:CartPole-v1"]
)
def test_sound_environments_have_no_findings(env: str) -> None:
    assert check_env(env, steps=211) == []


def test_sound_vector_environments_have_no_findings() -> None:
    for mode in (AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP):
        assert check_env(lambda: SyncVectorEnv([Catch] * 3, autoreset_mode=mode), steps=61) == []  # noqa: B023


class Scalar(Catch):
    """An action that is one float."""

    def __init__(self) -> None:
        super().__init__()
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, ())


def test_an_action_space_without_a_dimension_is_refused() -> None:
    (finding,) = check_env(Scalar)
    assert finding.severity == "error"
    assert "Scalar: action space Box(-1.0, 1.0, (), float32) has no dimension; declare Box" in finding.problem
    for workers in (0, 1):
        with pytest.raises(ValueError, match="has no dimension; declare Box"):
            make_envs(Scalar, 2, workers=workers)


class GlobalDice(Catch):
    """Draws from NumPy's global generator."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self._ball = int(np.random.randint(5))
        return self._board(), {}


class Remembers(Catch):
    """Something of earlier episodes survives a reset."""

    resets = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.resets += 1
        self._ball = (self._ball + self.resets) % 5
        return self._board(), {}


class Outside(Catch):
    """Leaves its space after some steps."""

    def step(self, action: np.int64) -> Any:
        obs, *rest = super().step(action)
        return obs * np.float32(1 + (self._row == 6)), *rest


class Reuses(Catch):
    """Writes every observation to the same array."""

    def __init__(self) -> None:
        super().__init__()
        self._kept = np.zeros((10, 5), np.float32)

    def _board(self) -> Any:
        self._kept[:] = super()._board()
        return self._kept


class Silent(Catch):
    """Never ends."""

    def step(self, action: np.int64) -> Any:
        obs, reward, over, *rest = super().step(action)
        if over:
            self._row = 0
        return obs, reward, False, *rest


class Windy(Catch):
    """Starts the same whatever the seed, which only tells where the ball goes."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self._ball = 2
        return self._board(), {}

    def step(self, action: np.int64) -> Any:
        self._ball = int(self.np_random.integers(5))
        return super().step(action)


def test_equal_starts_are_no_finding_where_the_seed_tells_later() -> None:
    assert check_env(Windy, steps=61) == []
    assert not any("the same observation" in finding.problem for finding in check_env("ALE/Pong-v5", steps=61))


class Deaf(Catch):
    """Starts the same whatever the seed."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=7)
        return self._board(), {}


@pytest.mark.parametrize(
    ("env", "problem", "remedy"),
    [
        (GlobalDice, "error: two environments with the same seed differ: observation of slot ", "self.np_random"),
        (Remembers, "error: reset with the same seed does not bring back the same episode", "must set everything back"),
        (Outside, "error: observation of slot 0, step 6 is outside Box", "widen the bounds"),
        (Reuses, "error: the observation handed out before step 1 was changed by that step", "return a copy"),
        (Silent, "warning: no episode ended within 61 random steps", "set max_episode_steps"),
        (Deaf, "warning: all slots start from the same observation", "use the seed given to reset"),
    ],
)
def test_planted_faults_are_found(env: Any, problem: str, remedy: str) -> None:
    np.random.seed(1)  # for GlobalDice, so that the test itself depends on no luck
    findings = [str(finding) for finding in check_env(env, steps=61)]
    assert len(findings) == 1
    assert findings[0].startswith(problem)
    assert remedy in findings[0]


@pytest.mark.parametrize("fault", ["raise", "nan", "shape", "dtype", "reward", "old_api"])
def test_faults_while_playing_are_findings(fault: str) -> None:
    (finding,) = check_env("toy:chaos", EnvOptions(kwargs={"fault": fault}), steps=7)
    assert finding.severity == "error"
    assert "slot 0, step 3" in finding.problem


def test_unsupported_spaces_are_findings() -> None:
    class Text(Catch):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = gymnasium.spaces.Text(3)  # type: ignore[assignment]

    (finding,) = check_env(Text)
    assert "observation space Text" in finding.problem


def test_a_wrong_autoreset_mode_is_a_finding() -> None:
    def vector() -> Any:
        env = SyncVectorEnv([Catch] * 3, autoreset_mode=AutoresetMode.SAME_STEP)
        env.metadata["autoreset_mode"] = AutoresetMode.NEXT_STEP
        return env

    (finding,) = check_env(vector, steps=211)
    assert finding.severity == "error"
    assert "autoreset_mode says NEXT_STEP" in finding.problem


def test_unknown_ids_are_errors_of_whoever_typed_them() -> None:
    with pytest.raises(ValueError, match="did you mean toy:catch"):
        check_env("toy:cacth")


class Masked(gymnasium.Env[Any, Any]):
    """Only one choice of each action is legal, another one every step, and anything else is an error."""

    def __init__(self, action_space: gymnasium.Space[Any]) -> None:
        self.action_space = action_space
        self._sizes = np.ravel(getattr(action_space, "nvec", getattr(action_space, "n", 0)))
        mask = gymnasium.spaces.MultiBinary(int(self._sizes.sum()))
        self.observation_space = gymnasium.spaces.Dict(
            {"action_mask": mask, "x": gymnasium.spaces.Box(0, 1, (1,), np.float32)}
        )

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self._t = 0
        return self._obs(), {}

    def step(self, action: Any) -> Any:
        assert np.array_equal(np.ravel(action), self._t % self._sizes), "an illegal move"
        self._t += 1
        return self._obs(), 0.0, self._t == 4, False, {}

    def _obs(self) -> Any:
        mask = np.zeros(int(self._sizes.sum()), np.int8)
        mask[np.cumsum([0, *self._sizes[:-1]]) + self._t % self._sizes] = 1
        return {"action_mask": mask, "x": self.np_random.random(1, np.float32)}


@pytest.mark.parametrize("space", [gymnasium.spaces.Discrete(3), gymnasium.spaces.MultiDiscrete([2, 3])])
def test_random_play_obeys_the_mask(space: gymnasium.Space[Any]) -> None:
    assert check_env(lambda: Masked(space)) == []
    envs = make_envs(lambda: Masked(space), 2, 1, EnvOptions(decorrelate_steps=9))
    envs.reset(1)
    envs.close()


class Stuck(Masked):
    """One of the actions has no choice left from a step on, which may be the last."""

    def __init__(self, empty_from: int, nested: bool) -> None:
        super().__init__(gymnasium.spaces.MultiDiscrete([3, 2]))
        self._empty_from, self._nested = empty_from, nested
        if nested:
            parts = [gymnasium.spaces.MultiBinary(size) for size in (3, 2)]
            space = {**self.observation_space.spaces, "action_mask": gymnasium.spaces.Tuple(parts)}
            self.observation_space = gymnasium.spaces.Dict(space)

    def _obs(self) -> Any:
        obs = super()._obs()
        mask = obs["action_mask"] * (np.arange(5) < (3 if self._t >= self._empty_from else 5)).astype(np.int8)
        return {**obs, "action_mask": (mask[:3], mask[3:]) if self._nested else mask}


@pytest.mark.parametrize(("nested", "mask"), [(False, r"[0 0 1 0 0]"), (True, "0, 0, 1")])
def test_a_mask_may_be_empty_where_an_episode_ends_and_nowhere_else(nested: bool, mask: str) -> None:
    assert check_env(lambda: Stuck(4, nested)) == []
    (finding,) = check_env(lambda: Stuck(2, nested))
    assert finding.severity == "error"
    assert "step 2, episode 0: expected at least one choice for every action in action_mask, got" in finding.problem
    assert mask in finding.problem
