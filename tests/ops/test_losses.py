from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from slipstream.ops import losses
from slipstream.ops.distributions import Categorical

N, A = 7, 3


def rows(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape or (N,)).astype(np.float32))


def gradient(loss: Tensor, parameter: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), parameter)[0]


def test_policy_gradient_is_reinforce():
    logits, action, advantage = rows(0, N, A).requires_grad_(), torch.arange(N) % A, rows(1)
    got = gradient(losses.policy_gradient_loss(Categorical(logits).log_prob(action), advantage), logits)
    one_hot = torch.eye(A)[action]
    torch.testing.assert_close(got, -advantage.unsqueeze(1) * (one_hot - logits.softmax(1)).detach())


def test_first_ratio_of_ppo_is_one_and_its_gradient_the_policy_gradient():
    log_prob, advantage = rows(0).requires_grad_(), rows(1)
    loss = losses.clipped_surrogate_loss(log_prob, log_prob.detach().clone(), advantage, 0.2)
    torch.testing.assert_close(loss.detach(), -advantage)
    expected = gradient(losses.policy_gradient_loss(log_prob, advantage), log_prob)
    torch.testing.assert_close(gradient(loss, log_prob), expected)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 3.0])
def test_clipped_surrogate_is_the_pessimistic_one_of_equation_7(ratio: float, advantage: float):
    log_prob = torch.tensor([math.log(ratio) - 1.0], requires_grad=True)
    loss = losses.clipped_surrogate_loss(log_prob, torch.tensor([-1.0]), torch.tensor([advantage]), 0.2)
    clipped = min(max(ratio, 0.8), 1.2)
    assert loss.item() == pytest.approx(-min(ratio * advantage, clipped * advantage), rel=1e-5)
    # No reason left to move once the ratio has gone past the clip in the direction that the advantage wants.
    gone = ratio > 1.2 if advantage > 0 else ratio < 0.8
    assert (gradient(loss, log_prob).item() == 0.0) == gone


def test_value_loss_is_half_the_squared_error():
    value = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = losses.value_loss(value, torch.tensor([4.0, 2.5]))
    assert loss.tolist() == [4.5, 0.125]
    assert gradient(loss, value).tolist() == [-3.0, -0.5]


@pytest.mark.parametrize("value", [-3.0, -0.4, 0.0, 0.3, 0.9, 5.0])
@pytest.mark.parametrize("target", [-1.0, 0.2, 2.0])
def test_clipped_value_loss_is_the_larger_of_two(value: float, target: float):
    got = losses.clipped_value_loss(torch.tensor([value]), torch.tensor([0.1]), torch.tensor([target]), 0.5)
    near = 0.1 + min(max(value - 0.1, -0.5), 0.5)
    assert got.item() == pytest.approx(max(0.5 * (value - target) ** 2, 0.5 * (near - target) ** 2), rel=1e-5)


def test_clipped_value_loss_at_the_old_value_is_value_loss():
    value, target = rows(0), rows(1)
    torch.testing.assert_close(losses.clipped_value_loss(value, value, target, 0.1), losses.value_loss(value, target))


def test_constants_of_the_update_get_no_gradient():
    log_prob, old, advantage, value, target = (rows(k).requires_grad_() for k in range(5))
    total = (
        losses.clipped_surrogate_loss(log_prob, old, advantage, 0.2)
        + losses.policy_gradient_loss(log_prob, advantage)
        + losses.value_loss(value, target)
        + losses.clipped_value_loss(value, old, target, 0.1)
    ).sum()
    got = torch.autograd.grad(total, (old, advantage, target), allow_unused=True)
    assert got == (None, None, None)


def test_weighted_mean_leaves_out_dead_rows():
    valid = torch.tensor([True, False, True])
    assert losses.weighted_mean(torch.tensor([1.0, 100.0, 4.0]), valid).item() == 2.5
    assert losses.weighted_mean(torch.tensor([1.0, 100.0, 4.0]), torch.tensor([3.0, 0.0, 1.0])).item() == 1.75
    assert losses.weighted_mean(torch.tensor([1.0, 2.0]), torch.zeros(2)).item() == 0.0


def test_normalised_advantage_has_mean_0_and_deviation_1_on_valid_rows():
    advantage, valid = rows(0, 5, 3) * 7 + 3, torch.ones(5, 3, dtype=torch.bool)
    valid[2, 1] = valid[4, 0] = False
    advantage[2, 1] = 1e4
    got = losses.normalize_advantage(advantage, valid)
    live = advantage[valid].double().numpy()
    np.testing.assert_allclose(got[valid].numpy(), (live - live.mean()) / live.std(), rtol=1e-5, atol=1e-6)
    assert got[~valid].tolist() == [0.0, 0.0]


def test_normalised_advantage_of_a_single_valid_row_is_zero():
    got = losses.normalize_advantage(torch.tensor([3.7, 1e30]), torch.tensor([True, False]))
    assert got.tolist() == [0.0, 0.0]


def test_weighted_advantages_are_centred_beneath_their_weight():
    """Adding a constant to all advantages before they are weighted changes nothing, whatever the weights."""
    advantage, rho, valid = rows(0, 5, 3), rows(1, 5, 3).exp(), torch.ones(5, 3, dtype=torch.bool)
    valid[2, 1] = False
    got = losses.normalize_advantage(rho * advantage, valid, rho)
    torch.testing.assert_close(losses.normalize_advantage(rho * (advantage + 4.0), valid, rho), got)
    assert got[valid].sum().item() == pytest.approx(0.0, abs=1e-5)
    assert got[valid].square().mean().item() == pytest.approx(1.0, rel=1e-5)
    ones = torch.ones(5, 3)
    assert torch.equal(losses.normalize_advantage(advantage, valid, ones), losses.normalize_advantage(advantage, valid))


def test_explained_variance():
    target, valid = rows(0), torch.ones(N, dtype=torch.bool)
    assert losses.explained_variance(target, target, valid).item() == 1.0
    assert losses.explained_variance(torch.full((N,), 3.0), target, valid).item() == pytest.approx(0.0, abs=1e-6)
    value, valid = rows(1), torch.arange(N) != 2
    live = valid.numpy()
    expected = 1 - np.var((target - value).numpy()[live]) / np.var(target.numpy()[live])
    assert losses.explained_variance(value, target, valid).item() == pytest.approx(expected, rel=1e-5)
    assert math.isfinite(losses.explained_variance(value, torch.ones(N), valid).item())


def test_expected_approx_kl_is_the_kl():
    old, new = Categorical(rows(0, A)), Categorical(rows(1, A))
    log_ratio = new.log_probs - old.log_probs
    rowwise = losses.approx_kl(log_ratio)
    torch.testing.assert_close((old.log_probs.exp() * rowwise).sum(-1), old.kl(new))
    assert (rowwise >= 0).all()


def test_clip_fraction_counts_ratios_outside():
    log_ratio = torch.tensor([0.7, 0.79, 0.81, 1.0, 1.19, 1.21, 9.0]).log()
    assert losses.clip_fraction(log_ratio, 0.2).tolist() == [1, 1, 0, 0, 0, 1, 1]


def test_ratios_are_truncated_and_counted():
    log_ratio = torch.tensor([-2.0, 0.0, 1e-6, math.log(1.5), math.log(1.6), 200.0])
    assert losses.truncated_ratio(log_ratio, 1.5).tolist() == pytest.approx([math.exp(-2), 1, 1, 1.5, 1.5, 1.5])
    assert losses.truncated(log_ratio, 1.5).tolist() == [0, 0, 0, 0, 1, 1]
    assert losses.truncated(log_ratio, 1.0).tolist() == [0, 0, 0, 1, 1, 1]
    assert losses.truncated(log_ratio, math.inf).tolist() == [0] * 6
