"""Every formula of Q-learning against loops in the notation of its paper, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slipstream.ops import q_learning
from slipstream.ops.returns import n_step_returns
from tests.ops.test_returns import B, Slab, T, close, slabs

N, A, Z = 7, 3, 11
LOW, HIGH = -2.0, 3.0
STEP = (HIGH - LOW) / (Z - 1)
unit = st.floats(0.0, 1.0)


def rows(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape or (N,)).astype(np.float32))


def distributions(seed: int, *shape: int) -> Tensor:
    return (2.0 * rows(seed, *shape)).softmax(-1)


def test_td_target_bootstraps_by_the_discount_and_is_a_constant():
    reward, discount = torch.tensor([1.0, 1.0, -2.0]), torch.tensor([0.5, 0.0, 0.25])
    value = torch.tensor([4.0, 4.0, 8.0], requires_grad=True)
    target = q_learning.td_target(reward, discount, value)
    assert target.tolist() == [3.0, 1.0, 0.0]
    assert not target.requires_grad


def test_double_value_asks_one_net_which_and_the_other_how_much():
    online, target = rows(0, T, B, A), rows(1, T, B, A)
    expected = [
        [target[t, b, max(range(A), key=lambda a: online[t, b, a].item())].item() for b in range(B)] for t in range(T)
    ]
    assert q_learning.double_value(online, target).tolist() == expected


def test_double_value_with_equal_nets_is_max_value():
    q = rows(0, T, B, A)
    assert torch.equal(q_learning.double_value(q, q), q_learning.max_value(q))
    assert q_learning.max_value(q).tolist() == [[max(cell) for cell in row] for row in q.tolist()]


@pytest.mark.parametrize("rest", [(), (5,), (5, 2)])
def test_chosen_is_the_entry_of_the_action(rest: tuple[int, ...]):
    q = rows(0, T, B, A, *rest).requires_grad_()
    action = torch.from_numpy(np.random.default_rng(1).integers(0, A, (T, B)))
    got = q_learning.chosen(q, action)
    assert got.shape == (T, B, *rest)
    (gradient,) = torch.autograd.grad(got.sum(), q)
    for t, b in np.ndindex(T, B):
        assert torch.equal(got[t, b], q[t, b, action[t, b]])
        for a in range(A):
            assert (gradient[t, b, a] == float(a == action[t, b])).all()


@pytest.mark.parametrize("delta", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("x", [-7.0, -2.0, -0.6, -0.25, 0.0, 0.5, 1.0, 1.5, 40.0])
def test_huber_is_a_parabola_between_lines_and_clips_the_error(x: float, delta: float):
    error = torch.tensor([x], requires_grad=True)
    loss = q_learning.huber(error, delta)
    assert loss.item() == pytest.approx(0.5 * x * x if abs(x) <= delta else delta * (abs(x) - 0.5 * delta))
    (gradient,) = torch.autograd.grad(loss.sum(), error)
    assert gradient.item() == pytest.approx(min(max(x, -delta), delta))


def test_support_is_evenly_spaced_with_both_ends():
    got = q_learning.support(LOW, HIGH, Z)
    np.testing.assert_allclose(got.numpy(), [LOW + i * STEP for i in range(Z)], rtol=1e-6, atol=1e-6)
    assert got.dtype == torch.float32
    assert (got[0].item(), got[-1].item()) == (LOW, HIGH)


def projection_oracle(probs: np.ndarray, reward: float, discount: float) -> np.ndarray:
    """Algorithm 1 of Bellemare et al. (2017) for one row; mass on a point of the support (l = u) stays there whole."""
    m = np.zeros(Z)
    for j in range(Z):
        shifted = min(max(reward + discount * (LOW + j * STEP), LOW), HIGH)
        b = (shifted - LOW) / STEP
        lower, upper = math.floor(b), math.ceil(b)
        if lower == upper:
            m[lower] += probs[j]
        else:
            m[lower] += probs[j] * (upper - b)
            m[upper] += probs[j] * (b - lower)
    return m


# Rewards of whole steps shift atoms onto atoms; large ones push all past an end.
rewards = st.one_of(st.floats(-1.0, 1.0), st.integers(-4, 4).map(lambda k: k * STEP), st.sampled_from([-9.0, 9.0]))


@given(st.lists(st.tuples(rewards, st.one_of(st.sampled_from([0.0, 1.0]), unit)), min_size=N, max_size=N))
@settings(max_examples=100, deadline=None)
def test_projection_is_algorithm_1_and_loses_no_mass(targets: list[tuple[float, float]]):
    probs = distributions(0, N, Z)
    reward, discount = (torch.tensor(column) for column in zip(*targets, strict=True))
    got = q_learning.categorical_projection(probs, reward, discount, q_learning.support(LOW, HIGH, Z))
    for row in range(N):
        expected = projection_oracle(probs[row].double().numpy(), reward[row].item(), discount[row].item())
        np.testing.assert_allclose(got[row].numpy(), expected, rtol=0, atol=3e-6)
    np.testing.assert_allclose(got.sum(-1).numpy(), 1.0, rtol=0, atol=1e-6)
    assert (got >= 0).all()


@pytest.mark.parametrize(("low", "high", "atoms"), [(-10.0, 10.0, 51), (LOW, HIGH, Z), (-0.7, 3.1, 13), (0.0, 1.0, 2)])
def test_projection_of_nothing_changes_nothing(low: float, high: float, atoms: int):
    probs, nothing = distributions(0, N, atoms), torch.zeros(N)
    got = q_learning.categorical_projection(probs, nothing, nothing + 1.0, q_learning.support(low, high, atoms))
    torch.testing.assert_close(got, probs, rtol=0, atol=2e-6)


def test_projection_keeps_the_mean_where_nothing_is_clipped():
    atoms, probs = q_learning.support(LOW, HIGH, Z), distributions(0, T, B, Z)
    # A half of the support, moved at most to its ends.
    reward, discount = rows(1, T, B).clamp(-1.0, 1.5), torch.full((T, B), 0.5)
    got = q_learning.categorical_projection(probs, reward, discount, atoms)
    torch.testing.assert_close((got * atoms).sum(-1), reward + discount * (probs * atoms).sum(-1), rtol=0, atol=1e-5)


def test_projection_is_clamped_at_both_ends():
    probs, atoms = distributions(0, 2, Z), q_learning.support(LOW, HIGH, Z)
    got = q_learning.categorical_projection(probs, torch.tensor([1e6, -1e6]), torch.ones(2), atoms)
    torch.testing.assert_close(got[:, [-1, 0]], torch.eye(2))


def test_what_is_beyond_the_atoms_is_the_mass_of_those_that_are_moved():
    atoms = torch.tensor([-1.0, 0.0, 1.0])
    probs = torch.tensor([0.5, 0.3, 0.2]).expand(6, 3)
    reward = torch.tensor([0.0, 0.5, -0.5, 1.5, -9.0, 9.0])
    discount = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.5, 0.0])
    got = q_learning.beyond_atoms(probs, reward, discount, atoms)
    torch.testing.assert_close(got, torch.tensor([0.0, 0.2, 0.5, 0.5, 1.0, 1.0]))


@pytest.mark.parametrize("atom", range(Z))
def test_projection_of_a_termination_on_an_atom_is_that_atom(atom: int):
    atoms = q_learning.support(LOW, HIGH, Z)
    got = q_learning.categorical_projection(distributions(0, 1, Z), atoms[[atom]], torch.zeros(1), atoms)
    torch.testing.assert_close(got, torch.eye(Z)[[atom]], rtol=0, atol=2e-6)


def test_projection_carries_no_gradient():
    atoms, probs = q_learning.support(LOW, HIGH, Z), distributions(0, N, Z).requires_grad_()
    assert not q_learning.categorical_projection(probs, rows(1), rows(2), atoms).requires_grad


def test_cross_entropy_and_kl_are_their_sums_over_atoms():
    logits = rows(0, T, B, Z).requires_grad_()
    target = distributions(1, T, B, Z).requires_grad_()
    log_probs = logits.log_softmax(-1)
    log_p, m = log_probs.detach().double().numpy(), target.detach().double().numpy()
    entropy = np.zeros((T, B))
    kl = np.zeros((T, B))
    for t, b in np.ndindex(T, B):
        entropy[t, b] = -sum(m[t, b, i] * log_p[t, b, i] for i in range(Z))
        kl[t, b] = sum(m[t, b, i] * (math.log(m[t, b, i]) - log_p[t, b, i]) for i in range(Z))
    loss = q_learning.cross_entropy(log_probs, target)
    close(loss.detach(), entropy)
    close(q_learning.categorical_kl(log_probs, target).detach(), kl)
    gradients = torch.autograd.grad(loss.sum(), (logits, target), allow_unused=True)
    torch.testing.assert_close(gradients[0], (log_probs.exp() - target).detach())
    assert gradients[1] is None


def test_kl_of_a_distribution_from_itself_is_zero_and_never_below():
    probs = distributions(0, 997, Z)
    got = q_learning.categorical_kl(probs.log(), probs)
    assert (got >= 0).all()
    assert got.max() < 1e-5
    certain = torch.eye(Z)
    torch.testing.assert_close(
        q_learning.categorical_kl(torch.full((Z, Z), 1 / Z).log(), certain), torch.full((Z,), math.log(Z))
    )


def quantile_oracle(theta: np.ndarray, y: np.ndarray, kappa: float) -> float:
    """Equations 9 and 10 of Dabney et al. (2018) for one row, the Huber loss in units of kappa."""
    total = 0.0
    for i in range(len(theta)):
        tau = (2 * i + 1) / (2 * len(theta))
        for u in y - theta[i]:
            size = abs(u)
            if kappa > 0:
                size = 0.5 * u * u / kappa if size <= kappa else size - 0.5 * kappa
            total += abs(tau - (u < 0)) * size / len(y)
    return total


@pytest.mark.parametrize("kappa", [0.0, 0.3, 1.0, 2.0])
def test_quantile_loss_is_equation_10(kappa: float):
    theta, y = rows(0, T, B, 5), 2.0 * rows(1, T, B, 7)
    got = q_learning.quantile_huber_loss(theta, y, kappa)
    pairs = zip(theta.double().numpy().reshape(-1, 5), y.double().numpy().reshape(-1, 7), strict=True)
    close(got, np.array([quantile_oracle(*pair, kappa) for pair in pairs]).reshape(T, B))


def test_quantile_loss_with_a_small_kappa_is_quantile_regression():
    theta, y = rows(0, N, 5), rows(1, N, 7)
    small, none = q_learning.quantile_huber_loss(theta, y, 1e-4), q_learning.quantile_huber_loss(theta, y, 0.0)
    torch.testing.assert_close(small, none, rtol=0, atol=5 * 1e-4)


@pytest.mark.parametrize("kappa", [0.0, 1.0])
def test_targets_of_the_quantile_loss_get_no_gradient(kappa: float):
    theta, y = rows(0, N, 5).requires_grad_(), rows(1, N, 7).requires_grad_()
    loss = q_learning.quantile_huber_loss(theta, y, kappa).sum()
    gradient, none = torch.autograd.grad(loss, (theta, y), allow_unused=True)
    assert none is None
    assert (gradient != 0).any()


def test_descending_the_quantile_loss_finds_the_quantiles_of_an_exponential():
    size, count = 1999, 5
    y = -torch.log1p(-(torch.arange(size) + 0.5) / size).unsqueeze(0)
    theta = torch.zeros(1, count, requires_grad=True)
    for _ in range(300):
        (gradient,) = torch.autograd.grad(q_learning.quantile_huber_loss(theta, y, 0.0).sum(), theta)
        theta = (theta - 0.5 * gradient).detach().requires_grad_()
    expected = [-math.log(1 - (2 * i + 1) / (2 * count)) for i in range(count)]
    np.testing.assert_allclose(theta.detach().squeeze(0).numpy(), expected, rtol=0, atol=5e-3)


def rescale_oracle(x: np.ndarray, epsilon: float) -> np.ndarray:
    """Section 3.2 of Pohlen et al. (2018) as it stands; float64 outlasts the subtraction."""
    x = x.astype(np.float64)
    return np.sign(x) * (np.sqrt(np.abs(x) + 1) - 1) + epsilon * x


def unscale_oracle(x: np.ndarray, epsilon: float) -> np.ndarray:
    """The closed form of proposition A.2."""
    x = x.astype(np.float64)
    root = (np.sqrt(1 + 4 * epsilon * (np.abs(x) + 1 + epsilon)) - 1) / (2 * epsilon)
    return np.sign(x) * (root**2 - 1)


MAGNITUDES = torch.logspace(-7, 6, 20_011)
BOTH_SIGNS = torch.cat([-MAGNITUDES, torch.zeros(1), MAGNITUDES])


@pytest.mark.parametrize("epsilon", [1e-3, 1e-2])
def test_rescale_and_its_inverse_are_those_of_the_paper(epsilon: float):
    x = BOTH_SIGNS[BOTH_SIGNS.abs() > 1e-3]
    np.testing.assert_allclose(q_learning.rescale(x, epsilon).numpy(), rescale_oracle(x.numpy(), epsilon), rtol=4e-7)
    np.testing.assert_allclose(q_learning.unscale(x, epsilon).numpy(), unscale_oracle(x.numpy(), epsilon), rtol=6e-7)


@pytest.mark.parametrize("epsilon", [0.0, 1e-3, 1e-2])
def test_unscale_undoes_rescale_within_the_error_that_it_claims(epsilon: float):
    back = q_learning.unscale(q_learning.rescale(BOTH_SIGNS, epsilon), epsilon)
    forth = q_learning.rescale(q_learning.unscale(BOTH_SIGNS, epsilon), epsilon)
    np.testing.assert_allclose(back.numpy(), BOTH_SIGNS.numpy(), rtol=6e-7, atol=0)
    np.testing.assert_allclose(forth.numpy(), BOTH_SIGNS.numpy(), rtol=6e-7, atol=0)


def window(slab: Slab, n: int, t: int, b: int) -> int:
    """m: rows of the window of row t, cut short by an end, a lost life, or the end of the sequence."""
    return min(n, slab.last(t, b) - t + 1)


@given(slabs(), unit, st.integers(1, T + 2))
@settings(max_examples=60, deadline=None)
def test_n_step_is_the_sum_over_its_window(slab: Slab, gamma: float, n: int):
    r = slab.numpy("reward")
    reward, discount, offset = np.zeros((T, B)), np.zeros((T, B)), np.ones((T, B), int)
    for t, b in zip(*np.nonzero(slab.valid.numpy()), strict=True):
        m = window(slab, n, t, b)
        reward[t, b] = sum(gamma**k * r[t + k, b] for k in range(m))
        discount[t, b] = 0.0 if slab.terminated[t + m - 1, b] else gamma**m
        offset[t, b] = m
    got = q_learning.n_step(slab.reward, slab.terminated, slab.valid, gamma, n)
    close(got.reward, reward)
    close(got.discount, discount)
    assert got.offset.tolist() == offset.tolist()


@given(slabs(), unit)
@settings(max_examples=30, deadline=None)
def test_one_step_is_the_reward_and_the_discount(slab: Slab, gamma: float):
    got = q_learning.n_step(slab.reward, slab.terminated, slab.valid, gamma, 1)
    assert torch.equal(got.reward, torch.where(slab.valid, slab.reward, 0.0))
    torch.testing.assert_close(got.discount, torch.where(slab.valid & ~slab.terminated, gamma, 0.0))
    assert (got.offset == 1).all()


@given(slabs(), unit, st.integers(0, 2))
@settings(max_examples=30, deadline=None)
def test_as_many_steps_as_rows_are_the_n_step_return(slab: Slab, gamma: float, more: int):
    got = q_learning.n_step(slab.reward, slab.terminated, slab.valid, gamma, T + more)
    target = q_learning.td_target(got.reward, got.discount, q_learning.ahead(slab.value, got.offset))
    expected = n_step_returns(slab.reward, slab.value, slab.terminated, slab.valid, gamma)
    close(target[slab.valid], expected[slab.valid].numpy())


def test_n_step_by_hand():
    """Rewards 1, 2, 4, ...; row 1 loses a life, row 3 is truncated and 4 is dead, row 6 terminates and 7 is dead."""
    reward = 2.0 ** torch.arange(10.0).unsqueeze(1)
    terminated, valid = torch.zeros(10, 1, dtype=torch.bool), torch.ones(10, 1, dtype=torch.bool)
    terminated[[1, 6]] = True
    valid[[4, 7]] = False
    reward[[4, 7]] = math.nan
    got = q_learning.n_step(reward, terminated, valid, 0.5, 3)
    assert got.reward.squeeze(1).tolist() == [2, 2, 8, 8, 0, 64, 64, 0, 512, 512]
    assert got.discount.squeeze(1).tolist() == [0, 0, 0.25, 0.5, 0, 0, 0, 0, 0.25, 0.5]
    assert got.offset.squeeze(1).tolist() == [2, 1, 2, 1, 1, 2, 1, 1, 2, 1]


def test_ahead_reads_the_row_that_is_offset_rows_later():
    value = rows(0, T + 1, B)
    offset = torch.from_numpy(np.random.default_rng(1).integers(1, T + 1, (T, B)))
    offset = torch.minimum(offset, T - torch.arange(T).unsqueeze(1))
    got = q_learning.ahead(value, offset)
    for t, b in np.ndindex(T, B):
        assert got[t, b] == value[t + offset[t, b], b]


def test_targets_of_a_sequence_carry_no_gradient():
    flags = torch.zeros(T, B, dtype=torch.bool)
    got = q_learning.n_step(rows(0, T, B).requires_grad_(), flags, ~flags, 0.9, 3)
    assert not got.reward.requires_grad


@pytest.mark.parametrize("eta", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_sequence_priority_mixes_the_largest_with_the_mean_of_learned_rows(eta: float, dtype: torch.dtype):
    errors = rows(0, T, B).requires_grad_()
    learned = np.random.default_rng(1).random((T, B)) < 0.6
    learned[:, 1] = False
    unlearned = torch.where(torch.from_numpy(learned), errors, math.nan)
    got = q_learning.sequence_priority(unlearned, torch.from_numpy(learned).to(dtype), eta)
    expected = np.zeros(B)
    for b in range(B):
        sizes = [abs(errors[t, b].item()) for t in range(T) if learned[t, b]]
        if sizes:
            expected[b] = eta * max(sizes) + (1 - eta) * sum(sizes) / len(sizes)
    close(got, expected)
    assert not got.requires_grad


def test_epsilons_of_ape_x():
    expected = [0.4 ** (1 + 7 * i / (N - 1)) for i in range(N)]
    got = q_learning.epsilons(N, 0.4, 0.4**8)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_epsilons_of_one_slot_and_of_one_rate():
    assert q_learning.epsilons(1, 0.4, 0.01).tolist() == [np.float32(0.4)]
    for rate in (0.0, 0.05, 1.0):
        assert q_learning.epsilons(N, rate, rate).tolist() == [np.float32(rate)] * N


@pytest.mark.parametrize(("greatest", "least"), [(0.4, 0.0), (0.1, 0.4), (0.4, -0.1)])
def test_epsilons_that_no_logarithm_spaces_are_refused(greatest: float, least: float):
    with pytest.raises(ValueError, match="expected 0 < least < greatest, or both the same"):
        q_learning.epsilons(N, greatest, least)
