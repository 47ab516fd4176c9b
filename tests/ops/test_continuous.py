from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slipstream import dice
from slipstream.ops import continuous
from slipstream.ops.continuous import TanhGaussian
from slipstream.ops.distributions import DiagGaussian

T, B, D = 5, 3, 2
LAST = 1.0 - 2.0**-23
LOW, HIGH = torch.tensor([-1.0, 0.5]), torch.tensor([3.0, 1.25])
HALF = 0.5 * (HIGH - LOW)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def uniforms(count: int, width: int) -> Tensor:
    return torch.from_numpy(dice.uniform(dice.keys(3, "test", [0]), 0, count, width)).squeeze(1)


def squashed(spread: float = 0.5) -> TanhGaussian:
    return TanhGaussian(spread * normal(0, T, B, D), 0.5 * normal(1, T, B, D) - 1.0, LOW, HIGH)


def density_oracle(x: float, mean: float, log_std: float, low: float, high: float) -> float:
    """Equation 21 of Haarnoja et al. (2018), appendix C, for one entry, with the slope of an affine map after tanh."""
    std, half = math.exp(log_std), 0.5 * (high - low)
    log_normal = -0.5 * ((x - mean) / std) ** 2 - math.log(std * math.sqrt(2 * math.pi))
    return log_normal - math.log(half * (1 - math.tanh(x) ** 2))


def test_draws_and_their_density_are_those_of_appendix_c():
    distribution, u = squashed(), uniforms(T * B, D).reshape(T, B, D)
    action, log_prob = distribution.sample_with_log_prob(u)
    assert action.shape == (T, B, D)
    assert log_prob.shape == (T, B)
    before = DiagGaussian(distribution.mean, distribution.log_std).sample(u)
    for t, b in np.ndindex(T, B):
        expected = 0.0
        for d in range(D):
            x, low, high = before[t, b, d].item(), LOW[d].item(), HIGH[d].item()
            assert action[t, b, d].item() == pytest.approx((low + high) / 2 + (high - low) / 2 * math.tanh(x), abs=1e-6)
            params = distribution.mean[t, b, d].item(), distribution.log_std[t, b, d].item()
            expected += density_oracle(x, *params, low, high)
        assert log_prob[t, b].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, 0.0), (1.2, -1.0), (-0.7, 0.4)])
def test_density_integrates_to_one(mean: float, log_std: float):
    grid = torch.linspace(-1.0, 3.0, 200_003)[1:-1].unsqueeze(-1)
    distribution = TanhGaussian(torch.tensor([mean]), torch.tensor([log_std]), LOW[:1], HIGH[:1])
    density = distribution.log_prob(grid).double().exp()
    assert (density.sum() * 4.0 / 200_002).item() == pytest.approx(1.0, abs=1e-3)


def test_density_of_two_entries_is_their_product():
    distribution, action = squashed(), torch.tensor([0.3, 0.7]).expand(T, B, D)
    parts = [
        TanhGaussian(distribution.mean[..., [d]], distribution.log_std[..., [d]], LOW[[d]], HIGH[[d]]).log_prob(
            action[..., [d]]
        )
        for d in range(D)
    ]
    torch.testing.assert_close(distribution.log_prob(action), parts[0] + parts[1])


@given(st.floats(-2.0, 2.0), st.floats(-3.0, 0.5), st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
def test_log_prob_of_a_draw_is_what_was_said_when_it_was_drawn(mean: float, log_std: float, first: int):
    u = torch.from_numpy(dice.uniform(dice.keys(1, "test", [0]), first, 11, D)).squeeze(1)
    distribution = TanhGaussian(torch.full((11, D), mean), torch.full((11, D), log_std), LOW, HIGH)
    action, log_prob = distribution.sample_with_log_prob(u)
    # Rounding of an action by 1e-7 of its range moves x by 1e-7 / (1 - tanh(x)^2), and a narrow normal magnifies it.
    x = DiagGaussian(distribution.mean, distribution.log_std).sample(u)
    known = (x.abs() < 4.0).all(-1)
    torch.testing.assert_close(distribution.log_prob(action)[known], log_prob[known], rtol=0, atol=2e-2)
    central = (x.abs() < 1.0).all(-1)
    torch.testing.assert_close(distribution.log_prob(action)[central], log_prob[central], rtol=0, atol=2e-4)


def test_everything_is_finite_and_inside_far_out():
    mean = torch.tensor([-1e3, -30.0, -9.0, 0.0, 9.0, 30.0, 1e3]).unsqueeze(-1).expand(7, D).clone().requires_grad_()
    for u in (torch.zeros(7, D), torch.full((7, D), LAST)):
        distribution = TanhGaussian(mean, torch.full((7, D), 2.0), LOW, HIGH)
        action, log_prob = distribution.sample_with_log_prob(u)
        assert ((action >= LOW) & (action <= HIGH)).all()
        for rows in (log_prob, distribution.log_prob(action.detach())):
            assert torch.isfinite(rows).all()
            (gradient,) = torch.autograd.grad(rows.sum(), mean, retain_graph=True)
            assert torch.isfinite(gradient).all()
    assert torch.isfinite(distribution.log_prob(torch.stack([LOW, HIGH] * 4)[:7])).all()


@pytest.mark.parametrize("scale", [0.1, 0.7, 1.0, 13.7])
def test_rounding_never_takes_an_action_past_its_bounds(scale: float):
    low = scale * normal(2, 499)
    high = low + scale * normal(3, 499).abs() + 1e-3
    for x in (torch.full((499,), 50.0), torch.full((499,), -50.0)):
        action = TanhGaussian(x, torch.zeros(499), low, high).mode()
        assert ((action >= low) & (action <= high)).all()
    for u in (torch.zeros(499), torch.full((499,), LAST)):
        for action in (
            continuous.uniform_action(u, low, high)[0],
            continuous.perturbed(low, u, low, high, 3.0)[0],
            continuous.smoothed(high, u, low, high, 3.0, 9.0),
        ):
            assert ((action >= low) & (action <= high)).all()


def test_gradient_flows_through_the_draw():
    mean, log_std = torch.tensor([[0.3, -0.2]], requires_grad=True), torch.tensor([[-0.5, 0.1]], requires_grad=True)
    u = uniforms(1, D)
    action, log_prob = TanhGaussian(mean, log_std, LOW, HIGH).sample_with_log_prob(u)
    x = DiagGaussian(mean, log_std).sample(u).detach()
    slope = HALF * (1 - x.tanh() ** 2)
    by_mean, by_std = torch.autograd.grad(action.sum(), (mean, log_std), retain_graph=True)
    torch.testing.assert_close(by_mean, slope)
    torch.testing.assert_close(by_std, slope * (x - mean.detach()))
    # Of log pi: the noise is given, so the normal's part depends on log_std only, and the slope on x.
    by_mean, by_std = torch.autograd.grad(log_prob.sum(), (mean, log_std))
    torch.testing.assert_close(by_mean, 2 * x.tanh())
    torch.testing.assert_close(by_std, 2 * x.tanh() * (x - mean.detach()) - 1.0)


def test_mode_is_the_squashed_mean_and_the_median():
    distribution = squashed()
    expected = 0.5 * (LOW + HIGH) + HALF * distribution.mean.tanh()
    torch.testing.assert_close(distribution.mode(), expected)
    u = uniforms(10_007, D)
    one = TanhGaussian(distribution.mean[0, 0], distribution.log_std[0, 0], LOW, HIGH)
    below = (one.sample_with_log_prob(u)[0] < one.mode()).float().mean(0)
    assert ((below - 0.5).abs() < 0.02).all()


def test_actions_take_the_shape_of_their_space_and_float32():
    shape, width = (2, 3), 6
    low, high = -torch.ones(width), 2.0 * torch.ones(width)
    u = uniforms(T * B, width).reshape(T, B, width)
    params = normal(0, T, B, 2 * width).to(torch.bfloat16)
    distribution = TanhGaussian(*params.chunk(2, -1), low, high, shape)
    action, log_prob = distribution.sample_with_log_prob(u)
    noisy, noisy_log_prob = continuous.perturbed(action, u, low, high, 0.1)
    smooth = continuous.smoothed(action, u, low, high, 0.2, 0.5)
    anywhere, anywhere_log_prob = continuous.uniform_action(u, low, high, shape)
    for actions in (action, distribution.mode(), noisy, smooth, anywhere):
        assert actions.shape == (T, B, *shape)
        assert actions.dtype == torch.float32
    for rows in (log_prob, distribution.log_prob(action), noisy_log_prob, anywhere_log_prob):
        assert rows.shape == (T, B)
        assert rows.dtype == torch.float32
    assert torch.equal(distribution.mode(), TanhGaussian(*params.float().chunk(2, -1), low, high, shape).mode())
    flat = TanhGaussian(*params.chunk(2, -1), low, high)
    assert torch.equal(flat.sample_with_log_prob(u)[0], action.flatten(-2))
    torch.testing.assert_close(flat.log_prob(action.flatten(-2)), distribution.log_prob(action))


def test_perturbed_adds_normal_noise_in_units_of_half_the_range_and_clips():
    action = LOW + (HIGH - LOW) * uniforms(T * B, D).reshape(T, B, D)
    u = uniforms(2 * T * B, D)[T * B :].reshape(T, B, D)
    got, log_prob = continuous.perturbed(action, u, LOW, HIGH, 0.7)
    gaussian = DiagGaussian(action, (0.7 * HALF).log().expand(T, B, D))
    drawn = gaussian.sample(u)
    torch.testing.assert_close(got, torch.minimum(torch.maximum(drawn, LOW), HIGH))
    assert (got != drawn).any()
    torch.testing.assert_close(log_prob, gaussian.log_prob(drawn), rtol=1e-4, atol=1e-4)


def test_smoothed_clips_the_noise_and_then_the_action():
    action, u = LOW + (HIGH - LOW) * uniforms(499, D), uniforms(998, D)[499:]
    got = continuous.smoothed(action, u, LOW, HIGH, 0.4, 0.5)
    noise = torch.special.ndtri(u + 2.0**-24).tolist()
    for row in range(499):
        for d in range(D):
            low, high, half = LOW[d].item(), HIGH[d].item(), HALF[d].item()
            move = half * min(max(0.4 * noise[row][d], -0.5), 0.5)
            expected = min(max(action[row, d].item() + move, low), high)
            assert got[row, d].item() == pytest.approx(expected, abs=1e-6)


def test_smoothed_without_a_clip_is_perturbed_and_without_noise_nothing():
    action, u = LOW + (HIGH - LOW) * uniforms(T, D), uniforms(T, D)
    expected = continuous.perturbed(action, u, LOW, HIGH, 0.3)[0]
    torch.testing.assert_close(continuous.smoothed(action, u, LOW, HIGH, 0.3, math.inf), expected)
    assert torch.equal(continuous.smoothed(action, u, LOW, HIGH, 0.0, 0.5), action)
    assert torch.equal(continuous.perturbed(action, u, LOW, HIGH, 0.0)[0], action)


def test_uniform_actions_fill_the_bounds_evenly():
    u = uniforms(10_007, D)
    action, log_prob = continuous.uniform_action(u, LOW, HIGH)
    torch.testing.assert_close((action - LOW) / (HIGH - LOW), u, rtol=0, atol=1e-6)
    volume = math.prod((HIGH - LOW).tolist())
    assert log_prob.tolist() == pytest.approx([-math.log(volume)] * 10_007, rel=1e-6)
    one = torch.ones(1)
    first, last = (continuous.uniform_action(torch.tensor([u]), -one, one)[0].item() for u in (0.0, LAST))
    assert -1.0 < first == -last


def test_soft_value_and_actor_loss_are_opposite():
    q_min, log_prob = normal(0, T, B), normal(1, T, B)
    value = continuous.soft_value(q_min, 0.2, log_prob)
    torch.testing.assert_close(value, torch.tensor((q_min.numpy() - 0.2 * log_prob.numpy()).tolist()))
    assert torch.equal(continuous.soft_actor_loss(log_prob, q_min, 0.2), -value)


def test_actor_loss_moves_policy_and_critic_but_not_the_temperature():
    log_alpha = torch.tensor(-1.0, requires_grad=True)
    q_min, log_prob = normal(0, T).requires_grad_(), normal(1, T).requires_grad_()
    loss = continuous.soft_actor_loss(log_prob, q_min, log_alpha.exp()).sum()
    by_log_prob, by_q, by_alpha = torch.autograd.grad(loss, (log_prob, q_min, log_alpha), allow_unused=True)
    torch.testing.assert_close(by_log_prob, torch.full((T,), math.exp(-1.0)))
    assert by_q.tolist() == [-1.0] * T
    assert by_alpha is None


@pytest.mark.parametrize(("entropy", "direction"), [(-3.0, 1.0), (-2.0, 0.0), (1.0, -1.0)])
def test_descending_the_temperature_loss_raises_alpha_below_the_target_entropy(entropy: float, direction: float):
    log_alpha, log_prob = torch.tensor(-0.5, requires_grad=True), torch.full((T,), -entropy, requires_grad=True)
    loss = continuous.temperature_loss(log_alpha, log_prob, -2.0)
    assert loss.tolist() == pytest.approx([-math.exp(-0.5) * (-entropy - 2.0)] * T)
    by_alpha, none = torch.autograd.grad(loss.sum(), (log_alpha, log_prob), allow_unused=True)
    assert none is None
    assert math.copysign(1.0, -by_alpha.item()) * (by_alpha.item() != 0) == direction


def test_following_the_actor_loss_finds_the_best_action():
    """Q is `-(a - 2)^2`: with a small temperature the policy gathers at 2, and a larger one spreads it."""
    spread = []
    for alpha in (0.01, 1.0):
        mean, log_std = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.Adam([mean, log_std], lr=0.05)
        for step in range(200):
            distribution = TanhGaussian(mean.expand(64, 1), log_std.expand(64, 1), LOW[:1], HIGH[:1])
            u = torch.from_numpy(dice.uniform(dice.keys(1, "test", [0]), 64 * step, 64, 1)).squeeze(1)
            action, log_prob = distribution.sample_with_log_prob(u)
            loss = continuous.soft_actor_loss(log_prob, -(action - 2.0).square().squeeze(-1), alpha).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        spread.append(action.std().item())
        if alpha < 0.1:
            assert TanhGaussian(mean, log_std, LOW[:1], HIGH[:1]).mode().item() == pytest.approx(2.0, abs=0.1)
    assert spread[0] < 0.2 < spread[1]
