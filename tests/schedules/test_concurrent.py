"""A whole `concurrent` run of A2C against HTS-RL's rule, written down in NumPy (Liu et al., 2020)."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slipstream.nets.policy import Outputs
from slipstream.ops.distributions import Categorical
from slipstream.run.presets import configure
from slipstream.run.training import Training
from slipstream.types import Act, Trajectory

ROWS, COLUMNS, UPDATES, STEPS = 7, 6, 4, 1_000
GAMMA, VALUE, ENTROPY, LR, DECAY, EPS = 0.9, 0.5, 0.02, 0.3, 0.99, 0.1
SETTINGS: dict[str, Any] = {
    "schedule": "concurrent",
    "num_envs": COLUMNS,
    "lanes": 3,
    "unroll": ROWS,
    "total_steps": STEPS,
    "env_options.kwargs": {"fault": "none"},
    "algo.gamma": GAMMA,
    "algo.gae_lambda": 1.0,
    "algo.vf_coef": VALUE,
    "algo.ent_coef": ENTROPY,
    "algo.lr": LR,
    "algo.anneal_lr": True,
    "algo.loss_scale": 1.0,
    "algo.max_grad_norm": 1e9,
    "algo.optimizer": "rmsprop_tf",
    "algo.eps": EPS,
}

Array = NDArray[np.float64]
Weights = tuple[Array, Array]


class Linear(nn.Module):
    """An actor-critic whose gradient a few lines can write down: logits = W o, V = w o."""

    dice_width, recurrent = 1, False

    def __init__(self) -> None:
        super().__init__()
        self.policy_head, self.value_head = nn.Linear(4, 2, bias=False), nn.Linear(4, 1, bias=False)
        with torch.no_grad():
            self.policy_head.weight.copy_(torch.tensor([[1.0, -0.5, 0.2, 0.3], [-0.7, 0.4, 0.9, -1.1]]))
            self.value_head.weight.copy_(torch.tensor([[0.5, -1.0, 1.5, 0.7]]))

    def initial_state(self, batch: int) -> tuple[()]:
        return ()

    def act(self, obs: Tensor, state: Any, dice: Tensor, greedy: bool = False, slot: Tensor | None = None) -> Act:
        distribution, value, _ = self.unroll(obs)
        action = distribution.mode() if greedy else distribution.sample(dice)
        return Act(action, distribution.log_prob(action), (), {"value": value})

    def unroll(self, obs: Tensor, state0: Any = (), first: Tensor | None = None) -> Outputs:
        return Outputs(Categorical(self.policy_head(obs)), self.value_head(obs).squeeze(-1))

    def observe(self, obs: Tensor, valid: Tensor) -> None:
        """Keeps no statistics."""

    def numbers(self) -> Weights:
        weights = self.policy_head.weight, self.value_head.weight[0]
        policy_weight, value_weight = (weight.detach().double().numpy().copy() for weight in weights)
        return policy_weight, value_weight


def probabilities(weights: Weights, obs: Array) -> Array:
    powers = np.exp(weights[0] @ obs)
    return powers / powers.sum()


def gradient(at: Weights, slab: Trajectory, acted: Weights) -> Weights:
    """Of A2C's loss at the weights `at`, for rows that `acted` had collected and valued."""
    policy_weight, value_weight = at
    obs, action, valid = slab.obs.double().numpy(), slab.action.numpy(), slab.valid.numpy()
    reward, terminated = slab.reward.double().numpy(), slab.terminated.numpy()
    value = obs @ acted[1]
    policy_gradient, value_gradient = np.zeros_like(policy_weight), np.zeros_like(value_weight)
    for t, column in np.argwhere(valid):
        ends = [s for s in range(t, ROWS) if terminated[s, column]]
        last = ends[0] + 1 if ends else ROWS
        target = sum(GAMMA ** (s - t) * reward[s, column] for s in range(t, last))
        target += 0.0 if ends else GAMMA ** (last - t) * value[last, column]
        pi, o = probabilities(at, obs[t, column]), obs[t, column]
        entropy = -(pi * np.log(pi)).sum()
        d_logits = (target - value[t, column]) * (pi - np.eye(2)[action[t, column]])
        d_logits += ENTROPY * pi * (np.log(pi) + entropy)
        policy_gradient += np.outer(d_logits, o) / valid.sum()
        value_gradient += VALUE * (value_weight @ o - target) * o / valid.sum()
    return policy_gradient, value_gradient


@pytest.mark.parametrize("collectors", ["inline", "thread", "process"])
def test_every_update_is_the_gradient_at_the_weights_that_acted_applied_to_the_newest(collectors: str) -> None:
    """theta[j+1] = theta[j] - lr g(theta[j-1]) / sqrt(ms + eps), rows and g of theta[j-1]; the first is of theta[0]."""
    place = {"placement.collectors": collectors, "placement.workers": 1 if collectors == "inline" else 2}
    policy = Linear()
    theta, mean_square, before = [policy.numbers()], [np.ones((2, 4)), np.ones(4)], 0
    with closing(Training(configure("a2c", "toy:chaos", {**SETTINGS, **place}), policy=policy)) as run:
        for report in run:
            newest, slab = theta[-1], report.trajectory
            version = max(report.update - 2, 0)
            assert (slab.version == version).all()
            assert not slab.truncated.any()
            assert slab.terminated.any()
            assert not slab.valid.all()
            acted = theta[version]
            for t, column in np.ndindex(ROWS, COLUMNS):
                pi = probabilities(acted, slab.obs[t, column].double().numpy())
                assert float(slab.log_prob[t, column].exp()) == pytest.approx(pi[slab.action[t, column]], rel=1e-5)
            here, elsewhere = gradient(acted, slab, acted), gradient(newest, slab, acted)
            found, lr = policy.numbers(), LR * (1 - before / STEPS)
            for part, ms in enumerate(mean_square):
                ms[...] = DECAY * ms + (1 - DECAY) * here[part] ** 2
                np.testing.assert_allclose(found[part], newest[part] - lr * here[part] / np.sqrt(ms + EPS), rtol=2e-5)
                apart = np.linalg.norm(here[part] - elsewhere[part]) / np.linalg.norm(here[part])
                assert (apart > 0.01) == (report.update > 1), "the run is to tell the two gradients apart"
            theta.append(found)
            before = report.steps
            if report.update == UPDATES:
                return
    raise AssertionError("the run ended early")
