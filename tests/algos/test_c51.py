from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slipstream.algos import C51, DQN, Rainbow
from slipstream.algos.replaying import Loss, Networks
from slipstream.nets.q_policy import QPolicy
from tests.algos import windows
from tests.algos.windows import DISCRETE, Draw, N, Past

USUAL = C51(gamma=0.9, n_step=3, atoms=11, v_min=-1.0, v_max=1.5, batch_size=N)


def made(algorithm: Any) -> tuple[Networks[Any, Any], Networks[Any, Any], Past, Draw]:
    """Networks, others for the targets, rows and windows of them."""
    online, target = (windows.networks(algorithm, DISCRETE, seed=seed) for seed in (0, 1))
    shown = windows.past(DISCRETE, online.policy)
    return online, target, shown, windows.draw(algorithm, shown, DISCRETE)


def projection(probs: list[float], gain: float, discount: float, z: list[float]) -> list[float]:
    """m of algorithm 1 of Bellemare et al. (2017); what falls on an atom stays there whole."""
    m = [0.0] * len(z)
    step = (z[-1] - z[0]) / (len(z) - 1)
    for z_j, p_j in zip(z, probs, strict=True):
        b = (min(max(gain + discount * z_j, z[0]), z[-1]) - z[0]) / step
        for i in range(len(z)):
            m[i] += p_j * max(0.0, 1.0 - abs(b - i))
    return m


def oracle(
    algorithm: C51 | Rainbow, online: QPolicy, target: QPolicy, shown: Past, drawn: Draw
) -> tuple[Loss, list[list[float]]]:
    """Algorithm 1, transition by transition; targets m are plain numbers, and returned too."""
    step = (algorithm.v_max - algorithm.v_min) / (algorithm.atoms - 1)
    z = [algorithm.v_min + i * step for i in range(algorithm.atoms)]

    def q(log_probs: list[float]) -> float:
        return sum(z_i * math.exp(log_p) for z_i, log_p in zip(z, log_probs, strict=True))

    total, q_mean, kl, beyond, errors, targets = torch.zeros(()), 0.0, 0.0, 0.0, [], []
    for slot, start, weight in zip(drawn.slots.tolist(), drawn.starts.tolist(), drawn.weight.tolist(), strict=True):
        gain, discount, then = windows.outlook(shown, slot, start, algorithm.n_step, algorithm.gamma)
        following = target.unroll(shown.seen(slot, then))[0].tolist()
        judge = online.unroll(shown.seen(slot, then))[0].tolist() if algorithm.double else following
        best = max(shown.allowed(slot, then), key=lambda a, judge=judge: q(judge[a]))
        following_best = [math.exp(log_p) for log_p in following[best]]
        m = projection(following_best, gain, discount, z)
        moved = zip(following_best, (gain + discount * z_j for z_j in z), strict=True)
        beyond += sum(p_j for p_j, z_j in moved if not z[0] <= z_j <= z[-1]) / len(drawn.slots)
        log_p = online.unroll(shown.seen(slot, start))[0, int(shown.action[start, slot])]
        total = total - weight * (torch.tensor(m) * log_p).sum()
        divergence = sum(m_i * (math.log(m_i) - log_p_i) for m_i, log_p_i in zip(m, log_p.tolist(), strict=True) if m_i)
        q_mean += q(log_p.tolist()) / len(drawn.slots)
        kl += divergence / len(drawn.slots)
        errors.append(divergence)
        targets.append(m)
    means = {"loss": total.item(), "q_mean": q_mean, "kl": kl, "beyond_atoms": beyond}
    metrics = {name: torch.tensor(value) for name, value in means.items()}
    return Loss(total, metrics, torch.tensor(errors)), targets


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("dueling", "n_step"), [(False, 1), (True, 3)])
def test_loss_gradient_and_errors_are_those_of_algorithm_1(n_step: int, dueling: bool, double: bool) -> None:
    algorithm = replace(USUAL, n_step=n_step, dueling=dueling, double=double)
    online, target, shown, drawn = made(algorithm)
    assert windows.kinds(shown, drawn, n_step) == {"termination", "truncation", "whole"}
    got = algorithm.loss(online, target, windows.gathered(algorithm, shown, drawn), 0.3)
    expected, targets = oracle(algorithm, online.policy, target.policy, shown, drawn)
    windows.assert_same(got, expected)
    windows.assert_same_gradient(got.loss, expected.loss, online.policy)
    assert windows.gets_gradient(got.loss, target.policy) == [False]
    assert any(sum(value > 0 for value in m) > 2 for m in targets), "some returns are to be spread"
    assert (online.policy.head.value_stream is not None) == dueling


def test_atoms_are_those_of_the_settings() -> None:
    policy = USUAL.make_policy(DISCRETE, windows.SMALL, None, 0)
    torch.testing.assert_close(policy.head.atoms, torch.arange(-1.0, 1.51, 0.25))
    torch.testing.assert_close(
        policy.unroll(windows.past(DISCRETE, policy).obs).exp().sum(-1).unique().mean(), torch.ones(())
    )


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


class Means(nn.Module):
    """A policy of distributions that shows their means only, as one of DQN."""

    def __init__(self, policy: QPolicy) -> None:
        super().__init__()
        self.policy = policy

    def unroll(self, obs: Any) -> Tensor:
        return self.policy.head.values(self.policy.unroll(obs))

    def values(self, output: Tensor, obs: Any) -> Tensor:
        allowed = obs["action_mask"].bool()
        return torch.where(allowed, output, -torch.inf)


def means(networks: Networks[Any, Any]) -> Networks[Any, Any]:
    return Networks(Means(networks.policy), networks.critic)


def goals(algorithm: C51, online: Networks[Any, Any], target: Networks[Any, Any], shown: Past, drawn: Draw) -> Tensor:
    """Mean of m, by window: by the logits of one window the cross-entropy has the gradient p - m."""
    found: list[Tensor] = []
    bias = online.policy.head.action_stream.output.bias
    for n in range(N):
        one = replace(drawn, weight=torch.eye(N)[n])
        loss = algorithm.loss(online, target, windows.gathered(algorithm, shown, one), 0.0).loss
        (gradient,) = torch.autograd.grad(loss, [bias])
        action = shown.action[drawn.starts[n], drawn.slots[n]]
        p = online.policy.unroll(shown.seen(int(drawn.slots[n]), int(drawn.starts[n])))[0, action].exp()
        m = p - gradient.view(windows.ACTIONS, algorithm.atoms)[action]
        assert m.sum().item() == pytest.approx(1.0, abs=1e-5)
        found.append((m * online.policy.head.atoms).sum())
    return torch.stack(found).detach()


@pytest.mark.parametrize("double", [False, True])
def test_the_mean_of_the_target_is_that_of_dqn_where_nothing_is_clamped(double: bool) -> None:
    wide = replace(USUAL, v_min=-40.0, v_max=60.0, double=double)
    online, target, shown, drawn = made(wide)
    dqn = DQN(gamma=wide.gamma, n_step=wide.n_step, double=double)
    theirs = dqn.loss(means(online), means(target), windows.gathered(wide, shown, drawn), 0.0)
    assert theirs.error is not None
    cells = zip(drawn.slots.tolist(), drawn.starts.tolist(), strict=True)
    q = torch.stack(
        [means(online).policy.unroll(shown.seen(slot, row))[0, shown.action[row, slot]] for slot, row in cells]
    )
    torch.testing.assert_close(
        goals(wide, online, target, shown, drawn), (theirs.error + q).detach(), rtol=1e-3, atol=1e-3
    )


def test_returns_beyond_the_atoms_count_as_the_last() -> None:
    narrow = replace(USUAL, v_min=-1e-3, v_max=1e-3)
    online, target, shown, drawn = made(narrow)
    cells = zip(drawn.slots.tolist(), drawn.starts.tolist(), strict=True)
    gains = torch.tensor([windows.outlook(shown, slot, row, 3, narrow.gamma)[0] for slot, row in cells])
    assert gains.min() < -1e-2
    assert gains.max() > 1e-2
    far = gains.abs() > 1e-2
    got = goals(narrow, online, target, shown, drawn)
    torch.testing.assert_close(got[far], 1e-3 * gains[far].sign(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("atoms", 1, "algo.atoms must be at least 2, got 1"),
        ("v_min", 10.0, "algo.v_min=10.0 must be below algo.v_max=10.0"),
        ("v_max", -20.0, "algo.v_min=-10.0 must be below algo.v_max=-20.0"),
    ],
)
def test_ranges(name: str, value: float, message: str) -> None:
    for algorithm in (C51(), Rainbow()):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            replace(algorithm, **{name: value})
