from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor
from torch import distributions as oracle

from slipstream import dice
from slipstream.ops.distributions import (
    Categorical,
    DiagGaussian,
    MultiCategorical,
    distribution_of,
    drawn,
    drawn_there,
)

T, B = 5, 3
LAST = 1.0 - 2.0**-23
SIZES = (2, 5, 3)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def uniforms(count: int, width: int) -> Tensor:
    return torch.from_numpy(dice.uniform(dice.keys(3, "test", [0]), 0, count, width)).squeeze(1)


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """Pearson's statistic in standard deviations above its mean."""
    expected = probabilities.double() * counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    freedom = len(counts) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


def test_categorical_draws_follow_the_probabilities():
    distribution = Categorical(normal(0, 6) * 2)
    counts = distribution.sample(uniforms(200_000, 1)).bincount(minlength=6)
    assert chi_square(counts, distribution.log_probs.exp()) < 4


@pytest.mark.parametrize("seed", range(3))
def test_categorical_draw_over_every_possible_number_is_exact(seed: int):
    """All 2**23 uniform numbers: each action is drawn as often as its probability says, give or take rounding."""
    distribution = Categorical(normal(seed, 4) * 6)
    u = torch.arange(2**23, dtype=torch.float32).unsqueeze(1) * 2.0**-23
    counts = distribution.sample(u).bincount(minlength=4)
    assert (counts - distribution.log_probs.double().exp() * 2**23).abs().max() <= 4


def test_draws_on_a_device_are_those_of_numpy() -> None:
    """But where the number falls between two roundings of one sum."""
    for seed, actions in enumerate((1, 2, 7, 300)):
        logits = normal(seed, 997, actions) * 3
        logits[::3, : actions // 2] = -1e30  # impossible
        log_probs, u = logits.log_softmax(-1), uniforms(997, 1)
        here, there = drawn(log_probs.numpy(), u.numpy()), drawn_there(log_probs, u).numpy()
        assert here.dtype == there.dtype == np.int64
        assert (here != there).mean() < 0.002
        assert torch.isfinite(log_probs.gather(-1, torch.from_numpy(here).unsqueeze(-1))).all()
        assert (log_probs.exp().gather(-1, torch.from_numpy(here).unsqueeze(-1)) > 0).all()


@pytest.mark.parametrize("u", [0.0, 2.0**-23, 0.5, 1 - 2.0**-22, LAST])
def test_masked_actions_are_never_drawn(u: float):
    generator = np.random.default_rng(1)
    for spread in (0.1, 3.0, 50.0, 300.0):
        logits = torch.from_numpy(generator.normal(size=(997, 7)).astype(np.float32)) * spread
        mask = torch.from_numpy(generator.random((997, 7)) < 0.4)
        mask[torch.arange(997), torch.from_numpy(generator.integers(0, 7, 997))] = True
        distribution = Categorical(logits, mask)
        action = distribution.sample(torch.full((997, 1), u))
        assert mask[torch.arange(997), action].all()
        assert (distribution.log_probs.exp().gather(1, action.unsqueeze(1)) > 0).all()
        assert mask[torch.arange(997), distribution.mode()].all()
        assert (distribution.log_probs.exp()[~mask] == 0).all()


def test_a_row_that_allows_nothing_counts_as_unmasked():
    logits = normal(0, 2, 4)
    mask = torch.tensor([[False] * 4, [True, False, True, True]])
    got = Categorical(logits, mask)
    torch.testing.assert_close(got.log_probs[0], logits[0].log_softmax(0))
    assert got.log_probs[1, 1].exp() == 0


def test_masked_entropy_and_gradients_are_those_of_the_allowed_actions():
    logits = normal(0, B, 4).requires_grad_()
    mask = torch.tensor([True, False, True, True]).expand(B, 4)
    got = Categorical(logits, mask)
    short = logits.detach()[:, [0, 2, 3]].requires_grad_()
    expected = Categorical(short)
    torch.testing.assert_close(got.entropy(), expected.entropy())
    action = torch.tensor([0, 2, 3])
    (gradient,) = torch.autograd.grad((got.entropy() + got.log_prob(action)).sum(), logits)
    (wanted,) = torch.autograd.grad((expected.entropy() + expected.log_prob(torch.tensor([0, 1, 2]))).sum(), short)
    torch.testing.assert_close(gradient[:, [0, 2, 3]], wanted)
    assert (gradient[:, 1] == 0).all()
    torch.testing.assert_close(got.kl(Categorical(logits.flip(0), mask)), expected.kl(Categorical(short.flip(0))))


def test_categorical_agrees_with_torch():
    logits, other, action = normal(0, T, B, 4), normal(1, T, B, 4), torch.arange(T * B).reshape(T, B) % 4
    got, expected = Categorical(logits), oracle.Categorical(logits=logits.double())
    torch.testing.assert_close(got.log_prob(action).double(), expected.log_prob(action), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.entropy().double(), expected.entropy(), rtol=1e-5, atol=1e-6)
    divergence = oracle.kl_divergence(expected, oracle.Categorical(logits=other.double()))
    torch.testing.assert_close(got.kl(Categorical(other)).double(), divergence, rtol=1e-5, atol=1e-6)
    assert (got.mode() == logits.argmax(-1)).all()
    assert got.sample(torch.rand(T, B, 1)).shape == (T, B)


def multi_oracle(logits: Tensor) -> list[oracle.Categorical]:
    return [oracle.Categorical(logits=part.double()) for part in logits.split(SIZES, -1)]


def test_multi_categorical_agrees_with_a_list_of_categoricals():
    logits, other = normal(0, T, B, 10), normal(1, T, B, 10)
    got, parts = MultiCategorical(logits, SIZES), multi_oracle(logits)
    u = uniforms(T * B, 3).reshape(T, B, 3)
    action = got.sample(u)
    for k, part in enumerate(logits.split(SIZES, -1)):
        assert (action[..., k] == Categorical(part).sample(u[..., k : k + 1])).all()
        assert (got.mode()[..., k] == part.argmax(-1)).all()
    log_prob = sum(part.log_prob(action[..., k]) for k, part in enumerate(parts))
    torch.testing.assert_close(got.log_prob(action).double(), log_prob, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.entropy().double(), sum(p.entropy() for p in parts), rtol=1e-5, atol=1e-5)
    divergence = sum(oracle.kl_divergence(p, q) for p, q in zip(parts, multi_oracle(other), strict=True))
    torch.testing.assert_close(got.kl(MultiCategorical(other, SIZES)).double(), divergence, rtol=1e-5, atol=1e-5)


def test_multi_categorical_masks_each_choice():
    mask = torch.ones(10, dtype=torch.bool)
    mask[[1, 2, 4, 9]] = False
    got = MultiCategorical(normal(0, 499, 10), SIZES, mask.expand(499, 10))
    for u in (uniforms(499, 3), torch.zeros(499, 3), torch.full((499, 3), LAST)):
        action = got.sample(u)
        assert (action[:, 0] == 0).all()
        assert set(action[:, 1].tolist()) <= {1, 3, 4}
        assert set(action[:, 2].tolist()) <= {0, 1}
    assert set(got.sample(uniforms(499, 3))[:, 1].tolist()) == {1, 3, 4}


def test_acting_in_inference_mode_first_does_not_break_learning():
    sizes = (3, 7, 2, 4)  # of no other test: what is kept for them must have been made here
    with torch.inference_mode():
        MultiCategorical(normal(0, B, 16), sizes).sample(uniforms(B, 4))
    logits = normal(0, B, 16).requires_grad_()
    (gradient,) = torch.autograd.grad(MultiCategorical(logits, sizes).entropy().sum(), logits)
    assert (gradient != 0).all()


def test_multi_categorical_gradient_reaches_every_logit():
    logits = normal(0, B, 10).requires_grad_()
    (gradient,) = torch.autograd.grad(MultiCategorical(logits, SIZES).entropy().sum(), logits)
    reference = logits.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(sum(part.entropy() for part in multi_oracle(reference)).sum(), reference)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6)


def test_gaussian_agrees_with_torch():
    mean, log_std, other = normal(0, T, B, 2), normal(1, 2) * 0.5, normal(2, T, B, 2)
    got = DiagGaussian(mean, log_std)
    expected = oracle.Independent(oracle.Normal(mean.double(), log_std.double().exp().expand(T, B, 2)), 1)
    action = normal(3, T, B, 2)
    torch.testing.assert_close(got.log_prob(action).double(), expected.log_prob(action), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.entropy().expand(T, B).double(), expected.entropy(), rtol=1e-5, atol=1e-5)
    wide = oracle.Independent(oracle.Normal(other.double(), log_std.flip(0).double().exp().expand(T, B, 2)), 1)
    divergence = oracle.kl_divergence(expected, wide)
    torch.testing.assert_close(got.kl(DiagGaussian(other, log_std.flip(0))).double(), divergence, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.mode(), mean)


def test_gaussian_draws_are_normal_and_finite_at_both_ends():
    distribution = DiagGaussian(torch.tensor([1.0, -2.0]), torch.tensor([0.5, -1.0]))
    u = uniforms(100_000, 2)
    draws = distribution.sample(u).double()
    expected = oracle.Normal(torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, -1.0]).double().exp())
    torch.testing.assert_close(expected.cdf(draws), u.double() + 2.0**-24, rtol=0, atol=1e-5)
    low, high = distribution.sample(torch.zeros(2)), distribution.sample(torch.full((2,), LAST))
    assert torch.isfinite(low).all()
    torch.testing.assert_close(distribution.mode() - low, high - distribution.mode())
    assert ((high - distribution.mode()) / expected.stddev > 5).all()


@pytest.mark.parametrize(
    "space",
    [spaces.Discrete(4), spaces.Discrete(4, start=2), spaces.MultiDiscrete([2, 5]), spaces.Box(-1, 1, (2, 3))],
)
def test_heads_describe_their_space(space: spaces.Space[object]):
    head = distribution_of(space)
    distribution = head.distribution(normal(0, T, B, head.num_params).to(torch.bfloat16))
    action = distribution.sample(uniforms(T * B, head.num_uniforms).reshape(T, B, -1))
    assert action.shape == distribution.mode().shape == (T, B, *head.action_shape) == (T, B, *space.shape)
    assert action.dtype == distribution.mode().dtype == head.action_dtype
    for rows in (distribution.log_prob(action), distribution.entropy(), distribution.kl(distribution)):
        assert rows.shape == (T, B)
        assert rows.dtype == torch.float32


def test_heads_count_parameters_and_uniform_numbers():
    counts = [
        (head.num_params, head.num_uniforms)
        for head in map(distribution_of, (spaces.Discrete(4), spaces.MultiDiscrete([2, 5]), spaces.Box(-1, 1, (2, 3))))
    ]
    assert counts == [(4, 1), (7, 2), (12, 6)]


@pytest.mark.parametrize("space", [spaces.MultiBinary(3), spaces.Box(0, 9, (2,), np.int64), spaces.Text(3)])
def test_other_action_spaces_are_refused_by_name(space: spaces.Space[object]):
    with pytest.raises(ValueError, match=r"action space .*expected Discrete, MultiDiscrete or a Box of floats"):
        distribution_of(space)


def test_continuous_actions_take_no_mask():
    head = distribution_of(spaces.Box(-1, 1, (2,)))
    with pytest.raises(ValueError, match="can't be masked"):
        head.distribution(torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool))


@pytest.mark.parametrize("space", [spaces.Discrete(5), spaces.MultiDiscrete([2, 4]), spaces.Box(-1, 1, (3,))])
def test_following_the_gradient_of_the_entropy_raises_it(space: spaces.Space[object]):
    head = distribution_of(space)
    params = normal(4, B, head.num_params).requires_grad_()
    before = head.distribution(params).entropy()
    (gradient,) = torch.autograd.grad(before.sum(), params)
    assert (head.distribution(params + 0.1 * gradient).entropy() > before).all()
