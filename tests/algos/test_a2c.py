from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from slipstream.algos import A2C
from slipstream.crew import Crew
from slipstream.nets.policy import Outputs
from slipstream.ops.distributions import Categorical
from slipstream.types import Trajectory
from tests.algos import rows

PAAC = A2C(
    lr=7e-4,
    lr_scaling="num_envs",
    anneal_lr=True,
    gamma=0.99,
    ent_coef=0.02,
    vf_coef=0.5,
    loss_scale=5.0,
    max_grad_norm=3.0,
    optimizer="rmsprop_tf",
    eps=0.1,
)


class Tabular(nn.Module):
    """A linear actor-critic whose gradient a few lines of NumPy can write down: logits = W o, V = w o."""

    dice_width, recurrent = 1, False

    def __init__(self) -> None:
        super().__init__()
        self.policy_head = nn.Linear(3, 5, bias=False)
        self.value_head = nn.Linear(3, 1, bias=False)

    def initial_state(self, batch: int) -> tuple[()]:
        return ()

    def unroll(self, obs: Tensor, state0: object, first: Tensor | None) -> Outputs:
        distribution = Categorical(self.policy_head(obs))
        return Outputs(distribution, self.value_head(obs).squeeze(-1))

    def observe(self, obs: Tensor, valid: Tensor) -> None:
        """Keeps no statistics."""


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def paac_update(
    weights: tuple[np.ndarray, np.ndarray], slab: Trajectory, reward: np.ndarray, lr: float
) -> tuple[np.ndarray, np.ndarray]:
    """PAAC's first update, spelled out in float64: returns, the loss's gradient by hand, clipping, TF's RMSProp."""
    policy_weight, value_weight = weights
    valid, terminated = slab.valid.numpy(), slab.terminated.numpy()
    obs, action, value = slab.obs.numpy().astype(float), slab.action.numpy(), slab.extras["value"].numpy().astype(float)
    returns = np.zeros((rows.ROWS + 1, rows.COLUMNS))
    returns[-1] = value[-1]
    for t in reversed(range(rows.ROWS)):
        for column in range(rows.COLUMNS):
            # The successor of the last row of an episode is a dead row, whose return is its value.
            successor = returns[t + 1, column] if t + 1 == rows.ROWS or valid[t + 1, column] else value[t + 1, column]
            going = 0.99 * (1.0 - terminated[t, column])
            returns[t, column] = reward[t, column] + going * successor if valid[t, column] else value[t, column]

    policy_gradient, value_gradient = np.zeros_like(policy_weight), np.zeros_like(value_weight)
    count = valid.sum()
    for t, column in np.argwhere(valid):
        o, a = obs[t, column], action[t, column]
        pi = softmax(policy_weight @ o)
        advantage = returns[t, column] - value[t, column]
        entropy = -(pi * np.log(pi)).sum()
        d_logits = advantage * (pi - np.eye(5)[a]) + 0.02 * pi * (np.log(pi) + entropy)
        policy_gradient += 5.0 / count * np.outer(d_logits, o)
        # 0.25 (R - V)^2: half of PAAC's critic weight of 0.5.
        value_gradient += 5.0 / count * 0.5 * (value_weight @ o - returns[t, column]) * o
    norm = np.sqrt((policy_gradient**2).sum() + (value_gradient**2).sum())
    assert norm > 3.0, "the test is to exercise clipping"
    stepped = []
    for weight, gradient in ((policy_weight, policy_gradient), (value_weight, value_gradient)):
        clipped = gradient * 3.0 / norm
        mean_square = 0.99 * 1.0 + 0.01 * clipped**2
        stepped.append(weight - lr * clipped / np.sqrt(mean_square + 0.1))
    return stepped[0], stepped[1]


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_paac_update_equals_its_oracle(shards: int) -> None:
    actor = rows.policy()
    slab = rows.trajectory(actor)
    slab.reward.mul_(3.0)
    reward = slab.reward.clamp(-1.0, 1.0).numpy().astype(float)
    torch.manual_seed(5)
    student = Tabular()
    with torch.no_grad():
        student.policy_head.weight.mul_(2.0)
        student.value_head.weight.mul_(8.0)
    before = tuple(
        parameter.detach().numpy().astype(float).copy()
        for parameter in (student.policy_head.weight, student.value_head.weight[0])
    )
    slab.extras["value"].copy_(student.unroll(slab.obs, (), None).value.detach())
    crew = Crew(1)
    learner = rows.learner(PAAC, student, crew, shards, "clip", 10**6)
    learner.step(slab)
    crew.close()
    policy_weight, value_weight = paac_update(before, slab, reward, lr=7e-4 * rows.COLUMNS)
    np.testing.assert_allclose(student.policy_head.weight.detach().numpy(), policy_weight, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(student.value_head.weight[0].detach().numpy(), value_weight, rtol=2e-5, atol=1e-7)


def test_paac_learning_rate_is_linear_in_environments_and_falls_to_zero() -> None:
    assert PAAC.learning_rate(0.0, 32) == pytest.approx(0.0224)
    assert PAAC.learning_rate(0.5, 32) == pytest.approx(0.0112)
    assert PAAC.learning_rate(1.0, 32) == 0.0


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_delayed_gradient_is_that_of_the_policy_that_acted(shards: int) -> None:
    """theta[j+1] = theta[j] - the step that PAAC would take at theta[j-1]: no part of the gradient sees theta[j]."""
    slab = rows.trajectory(rows.policy())
    slab.reward.mul_(3.0)
    torch.manual_seed(5)
    acted, student = Tabular(), Tabular()
    with torch.no_grad():
        for each in (acted, student):
            each.policy_head.weight.mul_(2.0)
            each.value_head.weight.mul_(8.0)
    slab.extras["value"].copy_(acted.unroll(slab.obs, (), None).value.detach())

    def numbers(policy: Tabular) -> tuple[np.ndarray, np.ndarray]:
        policy_weight, value_weight = policy.policy_head.weight, policy.value_head.weight[0]
        return policy_weight.detach().numpy().astype(float), value_weight.detach().numpy().astype(float)

    old, new = numbers(acted), numbers(student)
    crew = Crew(1)
    learner = rows.learner(PAAC, student, crew, shards, "clip", 10**6)
    learner.step(slab, behaviour=acted)
    crew.close()
    reward = slab.reward.clamp(-1.0, 1.0).numpy().astype(float)
    stepped = paac_update(old, slab, reward, lr=7e-4 * rows.COLUMNS)
    elsewhere = paac_update(new, slab, reward, lr=7e-4 * rows.COLUMNS)
    for part in range(2):
        expected = new[part] + (stepped[part] - old[part])
        np.testing.assert_allclose(numbers(student)[part], expected, rtol=2e-5, atol=1e-7)
        assert not np.allclose(elsewhere[part], expected, rtol=1e-3), "the test is to tell the two gradients apart"
        assert np.array_equal(numbers(acted)[part], old[part])
