"""A reward that is shaped for learning, and the score that is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from slipstream import slab, train
from slipstream.collector import Assignment, home
from slipstream.envs import EnvError, EnvOptions, make_envs
from slipstream.nets.actor_critic import make_actor_critic
from slipstream.nets.trunk import Network
from slipstream.ready import make_collector
from slipstream.run import metrics
from slipstream.run.evaluate import evaluate

LENGTH, ROWS = 3, 9
SCORED = EnvOptions(score_key="goal")


class Shaped(gymnasium.Env[Any, Any]):
    """Half a point for every step, but only the last of three is a goal."""

    observation_space = gymnasium.spaces.Box(0, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self._t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        self._t += 1
        end = self._t == LENGTH
        return np.zeros(2, np.float32), 0.5, end, False, {"goal": np.int64(end), "other": 7}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(("options", "reported"), [(SCORED, 1.0), (EnvOptions(), 1.5)])
def test_episodes_report_the_score_and_learning_sees_the_reward(
    workers: int, group: int, options: EnvOptions, reported: float
) -> None:
    envs = make_envs(Shaped, 4, 2, options, workers=workers)
    try:
        envs.reset(1)
        policy = make_actor_critic(envs.spec, Network())
        trajectory = slab.allocate(envs.spec, policy, ROWS)
        collector = make_collector(Assignment(envs, range(2), policy, [trajectory], 1, int), group)
        episodes = collector.collect(home(range(2), 2, 0)).episodes
    finally:
        envs.close()
    shaped = 1.5 if options.score_key else None
    assert [(episode.reward, episode.shaped) for episode in episodes] == [(reported, shaped)] * 8
    assert bool((trajectory.reward[trajectory.valid] == 0.5).all())


def test_an_evaluation_is_of_the_score() -> None:
    envs = make_envs(Shaped, 2, 1, SCORED)
    policy = make_actor_critic(envs.spec, Network())
    assert evaluate(policy, envs, 3, seed=1).reward.mean == 1.0
    envs.close()


def test_a_score_that_is_not_there_is_an_error() -> None:
    envs = make_envs(Shaped, 1, 1, EnvOptions(score_key="points"))
    envs.reset(1)
    with pytest.raises(EnvError, match=r"env_options\.score_key=points is not in info, which has: goal, other"):
        envs.send(np.zeros(1, np.int64), 0)


@pytest.mark.parametrize("score_key", ["goal", ""])
def test_a_run_logs_both(tmp_path: Path, score_key: str) -> None:
    config = {"env_options.score_key": score_key, "num_envs": 2, "unroll": 6, "algo.batch_size": 12}
    agent = train("ppo", env=Shaped, total_steps=24, config={**config, "log.dir": str(tmp_path)}, quiet=True)
    assert agent.run is not None
    (row,) = metrics.read(agent.run / "metrics.jsonl")[-1:]
    assert row["rollout/ep_rew_mean"] == (1.0 if score_key else 1.5)
    assert row.get("rollout/ep_shaped_rew_mean") == (1.5 if score_key else None)
