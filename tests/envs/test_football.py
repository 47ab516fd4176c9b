"""Google Research Football's own package: the adapter over a stand-in of it, and the package itself where it is."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import gymnasium
import numpy as np
import pytest

from slipstream.envs import EnvError, EnvOptions, football, list_envs, make_envs
from slipstream.envs.football import Football
from slipstream.run.presets import configure
from tests.envs.playing import assert_equal, play

SCENARIO = "gfootball:academy_empty_goal_close"

# Written as the real one is: for the Gym of before 2022. A step shows the engine's seed, its side, the episode's number
# and the time; action 1 scores, action 2 loses the ball; the clock stops after 5 steps.
PACKAGE = """
import gym
import numpy as np
from gym.envs.registration import register

register(id="Football-v0", entry_point="gfootball:never")

class Game(gym.Env):
    def __init__(self, config):
        self._config, self._env, self.config = config, self, self
        self.game_duration, self.end_episode_on_score = 5, config["level"] != "full_match"
        self.action_space = gym.spaces.Discrete(19)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)

    def observation(self):
        names = ("game_engine_random_seed", "reverse_team_processing", "episode_number")
        return np.array([*(float(self._config[name]) for name in names), self._step], np.float32)

    def reset(self):
        self._config["episode_number"] += 1
        self._step = 0
        return self.observation()

    def step(self, action):
        assert type(action) is int
        self._step += 1
        goal = int(action == 1)
        done = goal and self.end_episode_on_score or action == 2 or self._step == 5
        return self.observation(), float(goal), bool(done), {"score_reward": goal}

    def close(self):
        pass

class Checkpoints(gym.RewardWrapper):
    def reward(self, reward):
        return reward + 0.25

class Twice(gym.ObservationWrapper):
    def observation(self, obs):
        return 2 * obs

def create_environment(env_name, rewards, representation, stacked, render, other_config_options):
    game = Game({**other_config_options, "level": env_name})
    env = Checkpoints(game) if "checkpoints" in rewards else game
    return gym.Wrapper(Twice(env)) if stacked else env
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package `gfootball` with two scenarios, written for the old Gym."""
    for folder in ("", "env", "scenarios"):
        (tmp_path / "gfootball" / folder).mkdir()
        (tmp_path / "gfootball" / folder / "__init__.py").touch()
    (tmp_path / "gfootball/env/__init__.py").write_text(PACKAGE)
    for scenario in ("academy_empty_goal_close", "academy_corner", "full_match", "test_example"):
        (tmp_path / f"gfootball/scenarios/{scenario}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    real = _forget()
    yield
    _forget()
    sys.modules |= real


def _forget() -> dict[str, ModuleType]:
    """Takes the package out of the imported modules."""
    names = [name for name in sys.modules if name.partition(".")[0] == "gfootball"]
    return {name: sys.modules.pop(name) for name in names}


def shown(seed: int) -> list[float]:
    env = Football("academy_corner")
    return [float(number) for number in env.reset(seed=seed)[0]]


@pytest.mark.usefixtures("package")
class TestAdapter:
    def test_the_seed_of_a_reset_decides_all_that_the_engine_draws_from(self) -> None:
        assert shown(7) == [7.0, 1.0, 4.0, 0.0]
        assert shown(8) == [8.0, 0.0, 5.0, 0.0]
        assert shown(2**64 - 1) == shown(2**64 - 1)
        assert shown(2**64 - 1)[0] < 2e9

    def test_an_episode_does_not_depend_on_those_before(self) -> None:
        env = Football("academy_corner")
        first = env.reset(seed=3)[0]
        env.step(2)
        env.reset(seed=4)
        assert (env.reset(seed=3)[0] == first).all()

    def test_without_a_seed_episodes_go_on_from_the_last_one(self) -> None:
        def seeds() -> list[float]:
            env = Football("academy_corner")
            env.reset(seed=3)
            return [env.reset()[0][0] for _ in range(3)]

        assert seeds() == seeds()
        assert len(set(seeds())) == 3

    @pytest.mark.parametrize(
        ("scenario", "actions", "terminated", "truncated"),
        [
            ("academy_corner", [1], True, False),
            ("academy_corner", [0, 2], True, False),
            ("academy_corner", [0] * 5, False, True),
            ("academy_corner", [0, 0, 0, 0, 1], True, False),
            ("academy_corner", [0, 0, 0, 0, 2], False, True),
            ("full_match", [1, 1, 0, 0, 1], False, True),
        ],
    )
    def test_the_clock_truncates_and_the_rest_terminates(
        self, scenario: str, actions: list[int], terminated: bool, truncated: bool
    ) -> None:
        env = Football(scenario)
        env.reset(seed=1)
        ends = [env.step(np.int64(action))[2:4] for action in actions]
        assert ends[:-1] == [(False, False)] * (len(actions) - 1)
        assert ends[-1] == (terminated, truncated)

    def test_learning_sees_the_checkpoints_and_the_score_does_not(self) -> None:
        envs = make_envs(SCENARIO, 2)
        envs.reset(1)
        envs.recv(0)
        envs.send(np.array([0, 1]), 0)
        step = envs.recv(0)
        assert step.reward.tolist() == [0.25, 1.25]
        assert step.reported.tolist() == [0.0, 1.0]
        assert envs.spec.family == "gfootball"

    def test_the_score_is_the_environments_own_affair_unless_switched_off(self) -> None:
        """So that a configuration can be moved from one environment to another."""
        assert configure("ppo", SCENARIO).env_options == configure("ppo", "CartPole-v1").env_options
        envs = make_envs(SCENARIO, 1, options=EnvOptions(score_key=""))
        envs.reset(1)
        assert envs.recv(0).score is None

    def test_options_reach_the_package(self) -> None:
        envs = make_envs(SCENARIO, 1, options=EnvOptions(kwargs={"rewards": "scoring", "stacked": True}))
        envs.reset(1)
        envs.recv(0)
        envs.send(np.array([0]), 0)
        assert envs.recv(0).reward.tolist() == [0.0]
        assert envs.recv(0).obs[0, 3] == 2.0  # the old ObservationWrapper, in reset and step

    def test_a_time_limit_of_the_user_is_obeyed(self) -> None:
        played = play(make_envs(SCENARIO, 1, options=EnvOptions(max_episode_steps=2)), 20)
        assert played.truncated.any()
        assert (played.obs[..., 3] <= 2).all()

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"representation": "raw"}, "representation of gfootball must be 'extracted' or .*, got 'raw'"),
            ({"rewards": "checkpoints"}, "rewards of .* must be 'scoring' or 'scoring,checkpoints', got 'checkpoints'"),
            ({"stacked": "false"}, "stacked of gfootball must be False or True, got 'false'"),
            ({"rewrads": "scoring"}, "rewrads"),
        ],
    )
    def test_options_that_mean_nothing_are_refused(self, kwargs: dict[str, str], message: str) -> None:
        with pytest.raises(EnvError, match=message):
            make_envs(SCENARIO, 1, options=EnvOptions(kwargs=dict(kwargs)))

    def test_scenarios_are_listed_and_unknown_ones_refused(self) -> None:
        ids = [id for id in list_envs()["gfootball"] if id.startswith(football.PREFIX)]
        assert ids == ["gfootball:academy_corner", SCENARIO, "gfootball:full_match"]
        with pytest.raises(
            ValueError, match="unknown environment 'gfootball:academy_coner'; did you mean gfootball:ac"
        ):
            make_envs("gfootball:academy_coner", 1)

    def test_a_gym_of_the_users_stays_what_it_was(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "gym", gymnasium)
        Football("academy_corner")
        assert sys.modules["gym"] is gymnasium
        monkeypatch.delitem(sys.modules, "gym")
        del sys.modules["gfootball.env"]
        Football("academy_corner")
        assert "gym" not in sys.modules


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(football, "scenarios", list)
    with pytest.raises(ImportError, match=r"type `make grf`.*as in envpool:gfootball/academy_run_to_score-v1"):
        make_envs("gfootball:academy_corner", 1)


installed = pytest.mark.skipif(not football.scenarios(), reason="needs the package gfootball: make grf")


def digest(env: Football, seed: int, actions: int) -> str:
    """All that an episode of random actions shows and pays."""
    generator = np.random.default_rng(actions)
    obs, _ = env.reset(seed=seed)
    sums = hashlib.blake2b(obs.tobytes(), digest_size=8)
    for _ in range(100):
        obs, reward, terminated, truncated, _ = env.step(generator.integers(19))
        sums.update(obs.tobytes() + np.float32(reward).tobytes() + bytes([terminated, truncated]))
        if terminated or truncated:
            break
    return sums.hexdigest()


@installed
@pytest.mark.parametrize("scenario", ["academy_run_to_score", "11_vs_11_easy_stochastic"])
def test_an_episode_is_a_function_of_seed_and_actions(scenario: str) -> None:
    one, other = (Football(scenario, representation="simple115v2") for _ in range(2))
    first = digest(one, 2**63 + 5, 0)
    digest(one, 8, 1)
    digest(other, 9, 2)
    assert digest(one, 2**63 + 5, 0) == digest(other, 2**63 + 5, 0) == first
    assert digest(other, 2**63 + 5, 1) != first
    assert digest(other, 6, 0) != first


@installed
def test_worker_processes_play_the_same_game() -> None:
    options = EnvOptions(kwargs={"representation": "simple115v2"})
    id = "gfootball:academy_run_to_score"
    inline = play(make_envs(id, 4, 2, options), 60)
    assert_equal(play(make_envs(id, 4, 2, options, workers=2), 60), inline)
    assert inline.obs.shape == (61, 4, 115)


@installed
def test_it_can_be_rendered() -> None:
    env = Football("academy_empty_goal_close", render_mode="rgb_array")
    env.reset(seed=1)
    assert env.render().shape == (720, 1280, 3)
    env.close()
