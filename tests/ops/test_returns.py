"""Every return against a per-episode sum, quadratic in T, in the paper's notation and in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slipstream.ops.returns import VTraceOptions, accumulate, gae, n_step_returns, vtrace

T, B = 11, 3
NEXT, TERMINATION, TRUNCATION, BOTH, LIFE = range(5)


@dataclass(frozen=True)
class Slab:
    reward: Tensor
    value: Tensor
    terminated: Tensor
    valid: Tensor
    log_ratio: Tensor

    def last(self, t: int, b: int) -> int:
        """The row at which the sum that starts at row t stops: an end, a lost life, or the slab's last row."""
        while t < T - 1 and not self.terminated[t, b] and self.valid[t + 1, b]:
            t += 1
        return t

    def numpy(self, name: str) -> np.ndarray:
        return getattr(self, name).double().numpy()


@st.composite
def slabs(draw: st.DrawFn) -> Slab:
    kinds = draw(
        st.lists(
            st.sampled_from([NEXT, NEXT, NEXT, TERMINATION, TRUNCATION, BOTH, LIFE]), min_size=T * B, max_size=T * B
        )
    )
    dead_first = draw(st.lists(st.booleans(), min_size=B, max_size=B))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = np.array(kinds).reshape(T, B)
    terminated, valid = np.zeros((T, B), bool), np.ones((T, B), bool)
    for b in range(B):
        dead = dead_first[b]
        for t in range(T):
            valid[t, b] = not dead
            terminated[t, b] = not dead and kind[t, b] in (TERMINATION, BOTH, LIFE)
            dead = not dead and kind[t, b] in (TERMINATION, TRUNCATION, BOTH)
    # What a dead row holds must not matter, so it holds nonsense.
    reward = np.where(valid, generator.normal(size=(T, B)), 1e6)
    log_ratio = np.where(valid, generator.normal(size=(T, B)), 1e6)
    value = generator.normal(size=(T + 1, B))
    return Slab(
        *(torch.tensor(x) for x in (reward.astype("f4"), value.astype("f4"), terminated, valid)),
        torch.tensor(log_ratio.astype("f4")),
    )


def td_error(slab: Slab, gamma: float, t: int, b: int) -> float:
    r, v = slab.numpy("reward"), slab.numpy("value")
    bootstrap = 0.0 if slab.terminated[t, b] else gamma * v[t + 1, b]
    return r[t, b] + bootstrap - v[t, b]


def gae_oracle(slab: Slab, gamma: float, lambda_: float) -> np.ndarray:
    out = np.zeros((T, B))
    for t, b in zip(*np.nonzero(slab.valid.numpy()), strict=True):
        out[t, b] = sum(
            (gamma * lambda_) ** (k - t) * td_error(slab, gamma, k, b) for k in range(t, slab.last(t, b) + 1)
        )
    return out


def n_step_oracle(slab: Slab, gamma: float) -> np.ndarray:
    r, v = slab.numpy("reward"), slab.numpy("value")
    out = v[:-1].copy()
    for t, b in zip(*np.nonzero(slab.valid.numpy()), strict=True):
        last = slab.last(t, b)
        out[t, b] = sum(gamma ** (k - t) * r[k, b] for k in range(t, last + 1))
        if not slab.terminated[last, b]:
            out[t, b] += gamma ** (last + 1 - t) * v[last + 1, b]
    return out


def vtrace_oracle(slab: Slab, gamma: float, options: VTraceOptions) -> tuple[np.ndarray, np.ndarray]:
    """Equation 1 of the IMPALA paper as it stands: a sum of products of traces."""
    r, v = slab.numpy("reward"), slab.numpy("value")
    ratio = np.exp(np.where(slab.valid.numpy(), slab.numpy("log_ratio"), 0.0))
    rho, c = np.minimum(options.rho_bar, ratio), options.lambda_ * np.minimum(options.c_bar, ratio)
    vs, advantage = v[:-1].copy(), np.zeros((T, B))
    cells = list(zip(*np.nonzero(slab.valid.numpy()), strict=True))
    for s, b in cells:
        for t in range(s, slab.last(s, b) + 1):
            vs[s, b] += gamma ** (t - s) * np.prod(c[s:t, b]) * rho[t, b] * td_error(slab, gamma, t, b)
    for s, b in cells:
        following = vs[s + 1, b] if slab.last(s, b) > s else v[s + 1, b]
        q = options.lambda_ * following + (1 - options.lambda_) * v[s + 1, b]
        target = r[s, b] + (0.0 if slab.terminated[s, b] else gamma * q)
        advantage[s, b] = min(options.rho_pg_bar, ratio[s, b]) * (target - v[s, b])
    return vs, advantage


unit = st.floats(0.0, 1.0)
caps = st.floats(0.3, 3.0)


def close(actual: Tensor, expected: np.ndarray) -> None:
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.numpy(), expected, rtol=2e-4, atol=2e-4)


@given(slabs(), unit, unit)
@settings(max_examples=60, deadline=None)
def test_gae_is_the_sum_of_discounted_td_errors(slab: Slab, gamma: float, lambda_: float):
    close(gae(slab.reward, slab.value, slab.terminated, slab.valid, gamma, lambda_), gae_oracle(slab, gamma, lambda_))


@given(slabs(), unit)
@settings(max_examples=60, deadline=None)
def test_n_step_return_sums_rewards_and_bootstraps_once(slab: Slab, gamma: float):
    close(n_step_returns(slab.reward, slab.value, slab.terminated, slab.valid, gamma), n_step_oracle(slab, gamma))


@given(slabs(), unit, caps, caps, caps, unit)
@settings(max_examples=60, deadline=None)
def test_vtrace_is_equation_1(slab: Slab, gamma: float, rho: float, c: float, rho_pg: float, lambda_: float):
    options = VTraceOptions(rho, c, rho_pg, lambda_)
    got = vtrace(slab.log_ratio, slab.reward, slab.value, slab.terminated, slab.valid, gamma, options)
    vs, advantage = vtrace_oracle(slab, gamma, options)
    close(got.vs, vs)
    close(got.pg_advantage, advantage)


@given(slabs(), unit, unit)
@settings(max_examples=30, deadline=None)
def test_vtrace_on_policy_is_gae(slab: Slab, gamma: float, lambda_: float):
    rest = (slab.reward, slab.value, slab.terminated, slab.valid, gamma)
    got = vtrace(torch.zeros(T, B), *rest, VTraceOptions(lambda_=lambda_))
    advantage = gae(*rest, lambda_)
    close(got.pg_advantage, advantage.numpy())
    close(got.vs, (slab.value[:-1] + advantage).numpy())


@given(slabs(), unit)
@settings(max_examples=30, deadline=None)
def test_vtrace_on_policy_is_n_step_and_gae_lambda_one(slab: Slab, gamma: float):
    rest = (slab.reward, slab.value, slab.terminated, slab.valid, gamma)
    returns = n_step_returns(*rest)
    close(vtrace(torch.zeros(T, B), *rest, VTraceOptions()).vs, returns.numpy())
    close(gae(*rest, 1.0) + slab.value[:-1], returns.numpy())


@given(slabs(), unit)
@settings(max_examples=30, deadline=None)
def test_gae_lambda_zero_is_the_td_error(slab: Slab, gamma: float):
    expected = np.zeros((T, B))
    for t, b in zip(*np.nonzero(slab.valid.numpy()), strict=True):
        expected[t, b] = td_error(slab, gamma, t, b)
    close(gae(slab.reward, slab.value, slab.terminated, slab.valid, gamma, 0.0), expected)


def one_column(
    *, terminated: tuple[int, ...] = (), dead: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Five rows of one slot: rewards 1, 2, 4, 8, 16, values 10, 20, ..., 60."""
    reward = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]).unsqueeze(1)
    value = torch.arange(10.0, 70.0, 10.0).unsqueeze(1)
    flags, valid = torch.zeros(5, 1, dtype=torch.bool), torch.ones(5, 1, dtype=torch.bool)
    flags[list(terminated)] = True
    valid[list(dead)] = False
    return reward, value, flags, valid


def test_termination_drops_the_value_and_all_that_follows():
    returns = n_step_returns(*one_column(terminated=(1,), dead=(2,)), gamma=0.5)
    assert returns.squeeze(1).tolist() == [1 + 0.5 * 2, 2, 30, 8 + 0.5 * 16 + 0.25 * 60, 16 + 0.5 * 60]


def test_truncation_bootstraps_from_the_last_observation():
    returns = n_step_returns(*one_column(dead=(2,)), gamma=0.5)
    assert returns.squeeze(1).tolist() == [1 + 0.5 * 2 + 0.25 * 30, 2 + 0.5 * 30, 30, 8 + 8 + 15, 16 + 30]


def test_a_lost_life_cuts_the_target_and_the_next_row_lives():
    returns = n_step_returns(*one_column(terminated=(1,)), gamma=0.5)
    assert returns.squeeze(1).tolist() == [2, 2, 4 + 4 + 4 + 7.5, 8 + 8 + 15, 16 + 30]


def test_dead_rows_give_zero_even_from_nonsense():
    delta = torch.tensor([[1.0], [float("nan")], [float("inf")]])
    valid = torch.tensor([[True], [False], [False]])
    assert accumulate(delta, torch.full((3, 1), 0.9), 1.0, valid).squeeze(1).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("options", [VTraceOptions(), VTraceOptions(lambda_=0.9)])
def test_targets_carry_no_gradient(options: VTraceOptions):
    reward, value, terminated, valid = one_column()
    value.requires_grad_()
    log_ratio = torch.zeros(5, 1, requires_grad=True)
    got = vtrace(log_ratio, reward, value, terminated, valid, 0.9, options)
    assert not got.vs.requires_grad
    assert not got.pg_advantage.requires_grad
    assert not gae(reward, value, terminated, valid, 0.9, 0.9).requires_grad
    assert not n_step_returns(reward, value, terminated, valid, 0.9).requires_grad


def test_a_huge_ratio_is_capped_not_infinite():
    reward, value, terminated, valid = one_column()
    got = vtrace(torch.full((5, 1), 1e4), reward, value, terminated, valid, 0.9, VTraceOptions())
    assert torch.isfinite(got.vs).all()
    assert torch.isfinite(got.pg_advantage).all()
