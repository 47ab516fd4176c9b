from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv
from torch import Tensor, nn

from slipstream.envs import EnvError, EnvOptions, make_envs
from slipstream.envs.toy import Catch
from slipstream.run import presets
from slipstream.run.evaluate import SLOTS, evaluate, slots
from slipstream.run.loop import evaluation_envs
from slipstream.run.training import Training
from slipstream.types import Act


class Recorder:
    """A recurrent policy that notes what it is given; its state counts the rows of an episode."""

    dice_width = 1
    recurrent = True

    def __init__(self) -> None:
        self.obs: list[Tensor] = []
        self.states: list[Tensor] = []
        self.dice: list[Tensor] = []
        self.threads: set[int] = set()
        self.plain = True

    def initial_state(self, columns: int) -> Tensor:
        return torch.zeros(columns, 1)

    def act(self, obs: Tensor, state: Tensor, dice: Tensor, greedy: bool = False, slot: Tensor | None = None) -> Act:
        self.threads.add(torch.get_num_threads())
        self.plain &= not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
        self.obs.append(obs.clone())
        self.states.append(state.clone())
        self.dice.append(dice.clone())
        action = torch.full((len(obs),), int(greedy))
        return Act(action, torch.zeros(len(obs)), state + 1, {})

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter([nn.Parameter(torch.zeros(1))])


def _counter(num_envs: int) -> Any:
    return make_envs("toy:counter", num_envs, 1, EnvOptions(kwargs={"script": "3t 5c 2t"}))


def test_evaluation_starts_at_the_start_of_an_episode_also_where_training_does_not() -> None:
    changes = {"env_options.decorrelate_steps": 50, "env_options.kwargs": {"script": "11t 7t"}}
    config = presets.configure("ppo", "toy:counter", changes)
    training, evaluation = make_envs("toy:counter", 7, 1, config.env_options), evaluation_envs(config, 7)
    starts: list[list[list[int]]] = []
    for envs in (training, evaluation):
        envs.reset(3)
        starts.append(envs.recv(0).obs[:, 1:].astype(int).tolist())
    assert starts[1] == [[0, 0]] * 7 != starts[0]


def test_every_slot_plays_its_share_of_whole_episodes() -> None:
    result = evaluate(Recorder(), _counter(3), episodes=7, seed=1)
    # Rewards are 100 * episode + t; lengths are 3, 5, 2. Slot 0 plays three episodes, the others two.
    first, second, third = 1 + 2 + 3, 5 * 100 + 15, 2 * 200 + 3
    assert result.returns == (first, second, third, first, second, first, second)
    assert result.lengths == (3, 5, 2, 3, 5, 3, 5)
    assert result.metrics()["eval/mean_ep_length"] == pytest.approx(26 / 7)
    assert result.metrics()["eval/max_reward"] == second


def test_the_state_is_zero_where_an_episode_starts() -> None:
    policy = Recorder()
    evaluate(policy, _counter(1), episodes=3, seed=1)
    shown = [
        (int(obs[0, 1]), int(obs[0, 2]), int(state[0, 0])) for obs, state in zip(policy.obs, policy.states, strict=True)
    ]
    alive = [(episode, t, state) for episode, t, state in shown if (episode, t) not in [(0, 3), (1, 5)]]
    assert all(state == t for _, t, state in alive)
    assert [t for _, t, _ in alive] == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1]


def test_seeds_are_those_of_no_training_and_of_no_other_evaluation() -> None:
    seen: list[set[int]] = []
    for index in range(3):
        policy = Recorder()
        evaluate(policy, _counter(5), episodes=5, seed=1, index=index)
        seen.append({int(tag) for tag in policy.obs[0][:, 0]})
    training = _counter(64)
    training.reset(1)
    seen.append({int(tag) for tag in training.recv(0).obs[:, 0]})
    assert len(set().union(*seen)) == 5 * 3 + 64


def test_the_same_evaluation_twice_is_the_same() -> None:
    one, two = Recorder(), Recorder()
    for policy in (one, two):
        evaluate(policy, _counter(3), episodes=5, seed=7, index=2)
    assert torch.equal(torch.stack(one.dice), torch.stack(two.dice))
    assert torch.equal(torch.stack(one.obs), torch.stack(two.obs))


def test_an_episode_without_end_is_an_error() -> None:
    envs = make_envs("toy:counter", 1, 1, EnvOptions(kwargs={"script": "100000t"}))
    with pytest.raises(EnvError, match="has not ended after 50 steps; set a time limit"):
        evaluate(Recorder(), envs, episodes=1, seed=1, limit=50)


@pytest.mark.parametrize(("episodes", "expected"), [(1, 1), (7, 7), (10, 10), (11, 6), (30, 10), (31, 8)])
def test_slots_share_the_episodes_nearly_equally(episodes: int, expected: int) -> None:
    assert slots(episodes) == expected <= SLOTS


def test_normalisers_and_weights_do_not_move() -> None:
    changes = {"net.normalize_obs": True, "num_envs": 3, "lanes": 1, "unroll": 7, "total_steps": 60}
    changes["algo.batch_size"] = 21
    training = Training(presets.configure("ppo", "CartPole-v1", changes))
    try:
        for _ in training:
            pass
        before = {name: value.clone() for name, value in training.policy.state_dict().items()}
        assert any("moments" in name for name in before)
        evaluate(training.policy, make_envs("CartPole-v1", 2), episodes=3, seed=1)
        after = training.policy.state_dict()
    finally:
        training.close()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_greedy_is_passed_on() -> None:
    policy = Recorder()
    envs = make_envs("toy:bandit", 3)
    sampled = evaluate(policy, envs, 3, seed=1)
    greedy = evaluate(policy, envs, 3, seed=1, greedy=True)
    assert np.array(sampled.returns).shape == np.array(greedy.returns).shape == (3,)
    assert sampled.returns != greedy.returns


def test_one_math_thread_acts_and_the_former_number_is_restored() -> None:
    former = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        policy = Recorder()
        evaluate(policy, _counter(3), episodes=3, seed=1)
        assert (policy.threads, policy.plain) == ({1}, True)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(former)


@pytest.mark.parametrize("episodes", [1, 3, 7])
def test_a_vector_environment_is_evaluated_with_the_columns_it_has(episodes: int) -> None:
    def make() -> Any:
        return SyncVectorEnv([Catch] * 3)

    config = presets.configure("ppo", "callable:make", {"num_envs": 6, "lanes": 2})
    envs = evaluation_envs(config, episodes, make)
    try:
        assert envs.spec.num_envs == 3
        assert len(evaluate(Recorder(), envs, episodes, seed=1).returns) == episodes
    finally:
        envs.close()
