from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slipstream.algos import DQN, R2D2
from slipstream.algos.replaying import Loss, Networks
from slipstream.nets.q_policy import QPolicy
from slipstream.tree import Tree
from tests.algos import windows
from tests.algos.windows import DISCRETE, UNROLL, Draw, N, Past

LSTM = replace(windows.SMALL, core="lstm", core_size=5)
USUAL = R2D2(gamma=0.9, n_step=3, burn_in=3, length=7, rescale=1e-2, eta=0.7, batch_size=N)


def made(algorithm: R2D2) -> tuple[Networks[Any, Any], Networks[Any, Any], Past, Draw]:
    """Networks, others for the targets, rows and windows of them."""
    online, target = (windows.networks(algorithm, DISCRETE, LSTM, seed=seed) for seed in (0, 1))
    shown = windows.past(DISCRETE, online.policy)
    return online, target, shown, windows.draw(algorithm, shown, DISCRETE)


def unrolled(policy: QPolicy, shown: Past, slot: int, start: int, burn_in: int, length: int) -> list[Tensor]:
    """Q `[A]` at the rows after the burn-in and the one that follows, by an LSTM written out."""
    cell = policy.trunk.core.cell
    h, c = (part[start // UNROLL, slot] for part in shown.state0)
    said: list[Tensor] = []
    for row in range(start, start + burn_in + length + 1):
        if row > start and not shown.valid[row - 1, slot]:
            h, c = torch.zeros_like(h), torch.zeros_like(c)
        if row == start + burn_in:
            h, c = h.detach(), c.detach()
        x = policy.trunk.torso(shown.seen(slot, row))[0]
        gates = cell.weight_ih_l0 @ x + cell.bias_ih_l0 + cell.weight_hh_l0 @ h + cell.bias_hh_l0
        i, f, g, o = gates.chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        if row >= start + burn_in:
            said.append(policy.head(h[None])[0])
    return said


def h(x: float, epsilon: float) -> float:
    """The rescaling, none if epsilon is 0."""
    return math.copysign(math.sqrt(abs(x) + 1) - 1, x) + epsilon * x if epsilon else x


def h_inverse(x: float, epsilon: float) -> float:
    """Pohlen et al. (2018), proposition A.2."""
    if not epsilon:
        return x
    root = (math.sqrt(1 + 4 * epsilon * (abs(x) + 1 + epsilon)) - 1) / (2 * epsilon)
    return math.copysign(root**2 - 1, x)


def oracle(algorithm: R2D2, online: QPolicy, target: QPolicy, shown: Past, drawn: Draw) -> Loss:
    """Section 2.3 of Kapturowski et al. (2019), row by row; targets are plain numbers."""
    burn_in, length = algorithm.burn_in, algorithm.length
    total, q_mean, td_error, priorities = torch.zeros(()), 0.0, 0.0, []
    for slot, start, weight in zip(drawn.slots.tolist(), drawn.starts.tolist(), drawn.weight.tolist(), strict=True):
        said = unrolled(online, shown, slot, start, burn_in, length)
        judged = [q.tolist() for q in unrolled(target, shown, slot, start, burn_in, length)]
        begin, sizes, values = start + burn_in, [], []
        for t in range(length):
            if not shown.valid[begin + t, slot]:
                continue
            n = min(algorithm.n_step, length - t)
            gain, discount, then = windows.outlook(shown, slot, begin + t, n, algorithm.gamma)
            judge = said[then - begin].tolist()
            best = max(shown.allowed(slot, then), key=judge.__getitem__)
            following = h_inverse(judged[then - begin][best], algorithm.rescale)
            y = h(gain + discount * following, algorithm.rescale)
            q = said[t][int(shown.action[begin + t, slot])]
            total = total + weight * 0.5 * (y - q) ** 2 / length
            sizes.append(abs(y - q.item()))
            values.append(q.item())
        q_mean += sum(values) / len(values) / len(drawn.slots)
        td_error += sum(sizes) / len(sizes) / len(drawn.slots)
        priorities.append(algorithm.eta * max(sizes) + (1 - algorithm.eta) * sum(sizes) / len(sizes))
    metrics = {"loss": total.item(), "q_mean": q_mean, "td_error": td_error}
    return Loss(total, {name: torch.tensor(value) for name, value in metrics.items()}, torch.tensor(priorities))


def test_the_made_up_windows_hold_what_matters() -> None:
    """Dead rows in the burn-in, at its last row, at the first learned row, and later; a truncation that is learned."""
    online, _, shown, drawn = made(USUAL)
    assert online.policy.recurrent
    dead = [~shown.valid[start : start + 11, slot] for slot, start in zip(drawn.slots, drawn.starts, strict=True)]
    for place in (1, 2, 3, 5, 8):
        assert any(rows[place] for rows in dead), place
    assert not all(rows.any() for rows in dead)
    cells = zip(drawn.slots, drawn.starts, strict=True)
    assert any(shown.truncated[start + 3 : start + 10, slot].any() for slot, start in cells)


@pytest.mark.parametrize(
    "settings",
    [{}, {"burn_in": 0, "length": 10, "dueling": False, "eta": 0.0}, {"n_step": 1, "rescale": 0.0}, {"n_step": 9}],
    ids=str,
)
def test_loss_gradient_and_priorities_are_those_of_a_walk_from_row_to_row(settings: dict[str, Any]) -> None:
    algorithm = replace(USUAL, **settings)
    online, target, shown, drawn = made(algorithm)
    got = algorithm.loss(online, target, windows.gathered(algorithm, shown, drawn), 0.3)
    expected = oracle(algorithm, online.policy, target.policy, shown, drawn)
    windows.assert_same(got, expected)
    windows.assert_same_gradient(got.loss, expected.loss, online.policy)
    assert windows.gets_gradient(got.loss, target.policy) == [False]
    assert (online.policy.head.value_stream is not None) == algorithm.dueling


def test_the_loss_of_shards_adds_up_to_that_of_the_batch() -> None:
    online, target, shown, drawn = made(USUAL)
    whole = USUAL.loss(online, target, windows.gathered(USUAL, shown, drawn), 0.0)
    loss = partial(USUAL.loss, online, target, progress=0.0)
    windows.assert_same(windows.in_shards(loss, USUAL, shown, drawn), whole)


def test_dead_rows_teach_nothing_whatever_they_hold() -> None:
    online, target, shown, drawn = made(USUAL)
    batch = windows.gathered(USUAL, shown, drawn)
    clean = USUAL.loss(online, target, batch, 0.0)
    dead = ~batch.items.valid
    assert dead[USUAL.burn_in :].any()
    scribbled = copy.deepcopy(batch)
    scribbled.items.action[dead] = (scribbled.items.action[dead] + 1) % windows.ACTIONS
    scribbled.items.reward[dead] = -1e6
    scribbled.items.terminated[dead] = True
    windows.assert_same(USUAL.loss(online, target, scribbled, 0.0), clean)


def test_a_window_of_dead_rows_has_neither_loss_nor_priority() -> None:
    online, target, shown, drawn = made(USUAL)
    batch = windows.gathered(USUAL, shown, drawn)
    batch.items.valid[:, 4] = False
    batch.items.first[1:, 4] = True
    got = USUAL.loss(online, target, replace(batch, weight=torch.eye(N)[4]), 0.0)
    assert got.error is not None
    assert got.loss.item() == got.error[4].item() == 0.0
    assert (got.error[:4] > 0).all()
    assert torch.isfinite(got.metrics["q_mean"])


def test_the_burn_in_brings_states_up_to_date_and_learns_nothing() -> None:
    """What was stored and what was seen matter through the state only; no gradient reaches the burn-in."""
    online, target, shown, drawn = made(USUAL)
    batch = windows.gathered(USUAL, shown, drawn)
    usual = USUAL.loss(online, target, batch, 0.0).loss
    other = copy.deepcopy(batch)
    other.items.state0[1].add_(1.0)
    assert not torch.isclose(USUAL.loss(online, target, other, 0.0).loss, usual)
    for name in ("action", "reward", "terminated"):
        other = copy.deepcopy(batch)
        getattr(other.items, name)[: USUAL.burn_in] = 1
        assert torch.equal(USUAL.loss(online, target, other, 0.0).loss, usual), name
    features = batch.items.obs["features"].requires_grad_()
    (gradient,) = torch.autograd.grad(USUAL.loss(online, target, batch, 0.0).loss, [features])
    assert not gradient[: USUAL.burn_in].any()
    assert gradient[USUAL.burn_in].any()


class Forgetful(nn.Module):
    """A recurrent policy as one of DQN: every observation is the first of an episode."""

    def __init__(self, policy: QPolicy) -> None:
        super().__init__()
        self.policy = policy

    def unroll(self, obs: Tree) -> Tensor:
        rows = {name: leaf[None] for name, leaf in obs.items()}
        count = len(obs["features"])
        return self.policy.unroll(rows, self.policy.initial_state(count), torch.ones(1, count, dtype=torch.bool))[0]

    def values(self, output: Tensor, obs: Tree) -> Tensor:
        return self.policy.values(output, obs)


@pytest.mark.parametrize(("burn_in", "n_step"), [(0, 1), (3, 3)])
def test_without_memory_and_rescaling_it_is_double_dqn_row_by_row(burn_in: int, n_step: int) -> None:
    """The forget gates are shut and no gate looks at the last output, so that the state does not matter."""
    plain = replace(USUAL, rescale=0.0, n_step=n_step, burn_in=burn_in, eta=1.0)
    online, target, shown, drawn = made(plain)
    for networks in (online, target):
        cell = networks.policy.trunk.core.cell
        cell.weight_hh_l0.requires_grad_(False).zero_()
        cell.weight_ih_l0.data[5:10] = 0.0
        cell.bias_ih_l0.data[5:10] = -200.0
    got = plain.loss(online, target, windows.gathered(plain, shown, drawn), 0.0)
    networks = [Networks(Forgetful(each.policy), each.critic) for each in (online, target)]
    total, greatest = torch.zeros(()), torch.zeros(N)
    for t in range(plain.length):
        dqn = DQN(gamma=plain.gamma, n_step=min(n_step, plain.length - t), double=True, huber_delta=1e9)
        later = replace(drawn, starts=drawn.starts + burn_in + t)
        live = shown.valid[later.starts, later.slots]
        row = dqn.loss(*networks, replace(windows.gathered(dqn, shown, later), weight=drawn.weight * live), 0.0)
        total = total + row.loss / plain.length
        assert row.error is not None
        greatest = torch.maximum(greatest, row.error.abs() * live)
    torch.testing.assert_close(got.loss, total)
    windows.assert_same_gradient(got.loss, total, online.policy)
    torch.testing.assert_close(got.error, greatest)


def test_a_window_has_the_rows_of_burn_in_and_length_and_begins_an_unroll() -> None:
    assert (USUAL.span, USUAL.stride(3)) == (10, 3)
    _, _, shown, drawn = made(USUAL)
    items = USUAL.gather(shown.rows, drawn.slots, drawn.starts, windows.training)
    assert items.reward.shape == (10, N)
    assert items.obs["features"].shape == (11, N, windows.FEATURES)
    assert items.reward.abs().max() == 1.0
    assert [part.shape for part in items.state0] == [(N, 5), (N, 5)]


def test_a_policy_without_memory_is_refused() -> None:
    message = "r2d2 is for networks with memory: use --net.core lstm (or gru), or algorithm dqn"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        R2D2().make_policy(DISCRETE, windows.SMALL, None, 0)
    assert R2D2().make_policy(DISCRETE, replace(windows.SMALL, core="gru"), None, 0).recurrent


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("burn_in", -1, "algo.burn_in must be at least 0, got -1"),
        ("length", 0, "algo.length must be at least 1, got 0"),
        ("rescale", -1e-3, "algo.rescale must be at least 0, got -0.001"),
        ("eta", 1.1, "algo.eta must be between 0 and 1, got 1.1"),
    ],
)
def test_ranges(name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        replace(R2D2(), **{name: value})
