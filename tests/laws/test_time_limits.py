"""A time limit is no end: what is learned of a world that goes on for ever is its value, not that of ten steps.

One state, reward 1, gamma 0.9, episodes of 10 steps. Truncated, the value is 1 / (1 - 0.9) = 10. Terminated, it is
1 / (1 - 0.9 * 0.9) = 5.26 for one-step targets, where the end is one step in ten, and 4.14 for whole returns, the mean
of 1 + 0.9 + ... over the steps that are left; losses that are no squares, and Adam, lie a little off. An algorithm that
confuses the two ends of an episode lands there.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from slipstream.algos import ALGORITHMS
from slipstream.nets.actor_critic import ActorCritic
from slipstream.nets.continuous import Critics
from slipstream.nets.q_policy import QPolicy
from slipstream.run.presets import configure
from slipstream.run.training import Training

LIMIT = 10
SIZE = {"num_envs": 4, "net.hidden": [16], "algo.gamma": 0.9, "placement.workers": 1, "algo.lr": 0.02}
SLAB = {**SIZE, "unroll": 11, "algo.gae_lambda": 0.9}  # whole episodes, so that no gradient sees but a part of one
REPLAY = {**SIZE, "unroll": 5, "algo.batch_size": 32, "algo.replay.capacity": 256, "algo.replay.learning_starts": 40}
REPLAY |= {"algo.replay.ratio": 0.5}
Q = {**REPLAY, "algo.target_every": 10, "algo.tau": 0.5}
ATOMS = {"algo.v_min": 0.0, "algo.v_max": 20.0, "algo.n_step": 1}
WINDOWS = {"unroll": 11, "algo.replay.capacity": 2_048, "algo.length": 11, "algo.burn_in": 0}
ACTOR = {**REPLAY, "algo.tau": 0.2}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "ppo": (6_000, {**SLAB, "algo.batch_size": 44, "algo.epochs": 4}),
    "a2c": (6_000, {**SLAB, "algo.optimizer": "adam"}),
    "impala": (6_000, {**SLAB, "algo.optimizer": "adam"}),
    "appo": (6_000, {**SLAB, "algo.batch_size": 44, "algo.epochs": 4}),
    "dqn": (800, {**Q, "algo.huber_delta": 1e9}),
    "c51": (800, {**Q, **ATOMS}),
    "qrdqn": (800, Q),
    "rainbow": (800, {**Q, **ATOMS, "algo.sigma0": 0.0}),
    "r2d2": (1_200, {**Q, **WINDOWS, "net.core_size": 8, "algo.rescale": 0.0}),
    "sac": (1_600, {**ACTOR, "algo.alpha": 1e-6, "algo.adapt_alpha": False}),
    "td3": (1_600, ACTOR),
    "ddpg": (800, ACTOR),
}
QUICK = ("a2c", "dqn", "ddpg")


class Still(gymnasium.Env[Any, Any]):
    """Nothing ever changes, until ten steps are over."""

    observation_space = gymnasium.spaces.Box(0.0, 1.0, (1,), np.float32)

    def __init__(self, continuous: bool, truncates: bool) -> None:
        box = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.action_space = box if continuous else gymnasium.spaces.Discrete(2)
        self._truncates, self._t = truncates, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self._t = 0
        return np.ones(1, np.float32), {}

    def step(self, action: Any) -> Any:
        self._t += 1
        over = self._t == LIMIT
        return np.ones(1, np.float32), 1.0, over and not self._truncates, over and self._truncates, {}


def value(training: Training) -> float:
    """Of the one state; the mean over an episode where it has a memory of the time."""
    policy, obs = training.policy, torch.ones(LIMIT, 1, 1)
    first = torch.arange(LIMIT)[:, None] == 0
    with torch.no_grad():
        if isinstance(policy, ActorCritic):
            return float(policy.unroll(obs, policy.initial_state(1), first).value.mean())
        if isinstance(policy, QPolicy):
            return float(policy.values(policy.unroll(obs, policy.initial_state(1), first), obs).mean())
        critic = training.learner._networks.critic
        critics = critic if isinstance(critic, Critics) else critic.critics
        return float(critics(obs, torch.zeros(LIMIT, 1, 1)).mean())


@pytest.mark.parametrize("truncates", [True, False], ids=["truncated", "terminated"])
@pytest.mark.parametrize(
    "algo", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS]
)
def test_values_tell_a_limit_from_an_end(algo: str, truncates: bool) -> None:
    steps, settings = CASES[algo]
    continuous = algo in ("sac", "td3", "ddpg")
    config = configure(algo, "callable:still", {**settings, "total_steps": steps})
    training = Training(config, lambda: Still(continuous, truncates))
    for _ in training:
        pass
    found = value(training)
    training.close()
    if truncates:
        assert found == pytest.approx(10.0, abs=0.4)
    else:
        assert 3.5 < found < 7.0
