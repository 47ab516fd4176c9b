from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from slipstream.algos import DQN, QRDQN
from slipstream.algos.replaying import Loss, Networks
from slipstream.nets.q_policy import QPolicy
from tests.algos import windows
from tests.algos.test_c51 import means
from tests.algos.windows import DISCRETE, Draw, N, Past

USUAL = QRDQN(gamma=0.9, n_step=3, quantiles=5, kappa=0.5, batch_size=N)


def made(algorithm: QRDQN) -> tuple[Networks[Any, Any], Networks[Any, Any], Past, Draw]:
    """Networks, others for the targets, rows and windows of them."""
    online, target = (windows.networks(algorithm, DISCRETE, seed=seed) for seed in (0, 1))
    shown = windows.past(DISCRETE, online.policy)
    return online, target, shown, windows.draw(algorithm, shown, DISCRETE)


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def oracle(algorithm: QRDQN, online: QPolicy, target: QPolicy, shown: Past, drawn: Draw) -> Loss:
    """Algorithm 1 and equation 10 of Dabney et al. (2018), transition by transition, Huber's loss in units of kappa."""
    kappa = algorithm.kappa
    total, q_mean, td_error, errors = torch.zeros(()), 0.0, 0.0, []
    for slot, start, weight in zip(drawn.slots.tolist(), drawn.starts.tolist(), drawn.weight.tolist(), strict=True):
        gain, discount, then = windows.outlook(shown, slot, start, algorithm.n_step, algorithm.gamma)
        following = target.unroll(shown.seen(slot, then))[0].tolist()
        judge = online.unroll(shown.seen(slot, then))[0].tolist() if algorithm.double else following
        best = max(shown.allowed(slot, then), key=lambda a, judge=judge: mean(judge[a]))
        y = [gain + discount * theta for theta in following[best]]
        theta = online.unroll(shown.seen(slot, start))[0, int(shown.action[start, slot])]
        row = torch.zeros(())
        for i in range(algorithm.quantiles):
            tau = (2 * i + 1) / (2 * algorithm.quantiles)
            for y_j in y:
                u = y_j - theta[i]
                size = u.abs()
                if kappa > 0:
                    size = 0.5 * u**2 / kappa if size.item() <= kappa else size - 0.5 * kappa
                row = row + abs(tau - (u.item() < 0)) * size / algorithm.quantiles
        total = total + weight * row
        q_mean += mean(theta.tolist()) / len(drawn.slots)
        errors.append(mean(y) - mean(theta.tolist()))
        td_error += abs(errors[-1]) / len(drawn.slots)
    metrics = {"loss": total.item(), "q_mean": q_mean, "td_error": td_error}
    return Loss(total, {name: torch.tensor(value) for name, value in metrics.items()}, torch.tensor(errors))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("dueling", "n_step", "kappa"), [(False, 1, 0.5), (True, 3, 0.5), (False, 3, 0.0)])
def test_loss_gradient_and_errors_are_those_of_equation_10(
    dueling: bool, n_step: int, kappa: float, double: bool
) -> None:
    algorithm = replace(USUAL, n_step=n_step, dueling=dueling, double=double, kappa=kappa)
    online, target, shown, drawn = made(algorithm)
    assert windows.kinds(shown, drawn, n_step) == {"termination", "truncation", "whole"}
    got = algorithm.loss(online, target, windows.gathered(algorithm, shown, drawn), 0.3)
    expected = oracle(algorithm, online.policy, target.policy, shown, drawn)
    windows.assert_same(got, expected)
    windows.assert_same_gradient(got.loss, expected.loss, online.policy)
    assert windows.gets_gradient(got.loss, target.policy) == [False]
    assert (online.policy.head.value_stream is not None) == dueling


def test_double_differs_where_the_networks_do_and_nowhere_else() -> None:
    online, target, shown, drawn = made(USUAL)
    batch = windows.gathered(USUAL, shown, drawn)
    double = replace(USUAL, double=True)
    assert not torch.allclose(USUAL.loss(online, target, batch, 0.0).loss, double.loss(online, target, batch, 0.0).loss)
    windows.assert_same(double.loss(online, online, batch, 0.0), USUAL.loss(online, online, batch, 0.0))


def test_the_loss_of_shards_adds_up_to_that_of_the_batch() -> None:
    online, target, shown, drawn = made(USUAL)
    whole = USUAL.loss(online, target, windows.gathered(USUAL, shown, drawn), 0.0)
    loss = partial(USUAL.loss, online, target, progress=0.0)
    windows.assert_same(windows.in_shards(loss, USUAL, shown, drawn), whole)


@pytest.mark.parametrize("double", [False, True])
def test_with_one_quantile_it_is_half_of_the_huber_loss_of_dqn(double: bool) -> None:
    one = replace(USUAL, quantiles=1, kappa=1.0, double=double)
    online, target, shown, drawn = made(one)
    batch = windows.gathered(one, shown, drawn)
    got = one.loss(online, target, batch, 0.0)
    dqn = DQN(gamma=one.gamma, n_step=one.n_step, double=double).loss(means(online), means(target), batch, 0.0)
    windows.assert_same_gradient(got.loss, 0.5 * dqn.loss, online.policy)
    windows.assert_same(got, Loss(0.5 * dqn.loss, dqn.metrics | {"loss": 0.5 * dqn.metrics["loss"]}, dqn.error))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("quantiles", 0, "algo.quantiles must be at least 1, got 0"),
        ("kappa", -0.1, "algo.kappa must be at least 0, got -0.1"),
    ],
)
def test_ranges(name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        replace(QRDQN(), **{name: value})
