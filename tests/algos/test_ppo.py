from __future__ import annotations

import copy
import math
from functools import partial
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from slipstream.algos import PPO
from slipstream.algos.algorithm import Batch, ShardShape, acted, items_per_minibatch
from slipstream.nets.actor_critic import ActorCritic
from slipstream.nets.trunk import Network
from slipstream.ops import returns
from tests.algos import rows

N = 11


def batch(policy: ActorCritic, seed: int = 0) -> Batch:
    """Rows whose acting policy differed from `policy`, the last two of them dead."""
    random = torch.Generator().manual_seed(seed)
    obs = torch.rand(N, 3, generator=random) * 2 - 1
    action = torch.randint(0, 5, (N,), generator=random)
    out = policy.unroll(obs, (), None)
    weight = torch.ones(N) / (N - 2)
    weight[-2:] = 0.0
    value = out.value.detach() + torch.randn(N, generator=random)
    columns = {
        "advantage": torch.randn(N, generator=random),
        "return": torch.randn(N, generator=random),
        "value": value,
        "ratio": torch.rand(N, generator=random) + 0.5,
        "reference": out.distribution.log_prob(action).detach() + 0.3 * torch.randn(N, generator=random),
    }
    log_prob = out.distribution.log_prob(action).detach() + 0.3 * torch.randn(N, generator=random)
    return Batch(obs, action, log_prob, torch.zeros(N, dtype=torch.bool), (), weight, columns)


def oracle(algorithm: PPO, policy: ActorCritic, rows: Batch, clip: float) -> tuple[float, float]:
    """Equation 9 of the paper and the divergence, row by row, in Python floats."""
    out = policy.unroll(rows.obs, (), None)
    log_probs, values = out.distribution.log_prob(rows.action).tolist(), out.value.tolist()
    entropies = out.distribution.entropy().tolist()
    total = kl = 0.0
    for n in range(N - 2):
        ratio = math.exp(log_probs[n] - float(rows.columns["reference"][n]))
        advantage, target, old = (float(rows.columns[key][n]) for key in ("advantage", "return", "value"))
        surrogate = min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)
        error = (values[n] - target) ** 2
        if algorithm.clip_range_vf > 0:
            near = old + min(max(values[n] - old, -algorithm.clip_range_vf), algorithm.clip_range_vf)
            error = max(error, (near - target) ** 2)
        kl += float(rows.columns["ratio"][n]) * (ratio - 1 - math.log(ratio))
        total += -surrogate + algorithm.vf_coef * 0.5 * error - algorithm.ent_coef * entropies[n]
    return total / (N - 2), kl / (N - 2)


@pytest.mark.parametrize("clip_range_vf", [0.0, 0.2])
@pytest.mark.parametrize(("anneal", "progress", "clip"), [(False, 0.25, 0.2), (True, 0.0, 0.2), (True, 0.25, 0.15)])
def test_loss_is_equation_9(clip_range_vf: float, anneal: bool, progress: float, clip: float) -> None:
    algorithm = PPO(clip_range=0.2, anneal_clip=anneal, clip_range_vf=clip_range_vf, ent_coef=0.03, vf_coef=0.7)
    policy = rows.policy()
    data = batch(policy)
    loss, metrics = algorithm.loss(policy, data, progress)
    expected, kl = oracle(algorithm, policy, data, clip)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert 0.0 < float(metrics["clip_fraction"]) < 1.0
    assert float(metrics["approx_kl"]) == pytest.approx(kl, rel=1e-4)


def test_advantages_are_normalised_over_valid_rows_of_the_whole_update() -> None:
    policy = rows.policy()
    slab = rows.trajectory(policy)
    prepared = PPO().prepare(slab, slab.reward, partial(acted, slab))
    live = prepared.columns["advantage"][slab.valid].numpy()
    assert live.mean() == pytest.approx(0.0, abs=1e-6)
    assert live.std() == pytest.approx(1.0, abs=1e-4)
    raw = PPO(normalize_advantage=False).prepare(slab, slab.reward, partial(acted, slab))
    np.testing.assert_allclose(
        raw.columns["return"][slab.valid], (raw.columns["advantage"] + slab.extras["value"][:-1])[slab.valid]
    )
    assert torch.equal(prepared.columns["return"], raw.columns["return"])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("core", ["none", "gru"])
@pytest.mark.parametrize("clip_range_vf", [0.0, 0.2])
@pytest.mark.parametrize("surrogate", ["target", "acting"])
def test_gradient_on_older_rows(
    surrogate: Literal["target", "acting"], clip_range_vf: float, core: str, normalize: bool
) -> None:
    """The decoupled objective from plain numbers, and the paper's with the acting policy; all three policies differ."""
    target = rows.policy(Network(hidden=(11,), core=core, core_size=5))
    policy, slab = copy.deepcopy(target), rows.off_policy(target)
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=random))
    shown = rows.evaluation(target, slab) if surrogate == "target" else acted(slab)
    algorithm = PPO(
        gamma=0.9,
        gae_lambda=0.8,
        clip_range=0.3,
        clip_range_vf=clip_range_vf,
        surrogate=surrogate,
        normalize_advantage=normalize,
    )
    evaluate = (lambda: shown) if surrogate == "target" else rows.unused
    got, metrics = rows.gradient(algorithm, policy, slab, evaluate)

    gae = returns.gae(slab.reward, shown.value, slab.terminated, slab.valid, 0.9, 0.8)
    whole = rows.whole(slab, {}, bootstraps=False)
    out = policy.unroll(whole.obs, whole.state0, whole.first)
    log_prob, entropy = out.distribution.log_prob(slab.action), out.distribution.entropy()
    alive = [tuple(cell) for cell in np.argwhere(slab.valid.numpy())]
    weight = {cell: math.exp(float(shown.log_prob[cell]) - float(slab.log_prob[cell])) for cell in alive}
    mean = sum(weight[cell] * float(gae[cell]) for cell in alive) / sum(weight.values()) if normalize else 0.0
    weighted = {cell: weight[cell] * (float(gae[cell]) - mean) for cell in alive}
    scale = math.sqrt(np.mean(np.square(list(weighted.values())))) if normalize else 1.0
    total, kl, clipped = torch.zeros(()), 0.0, 0
    for cell in alive:
        a = weighted[cell] / scale
        ratio = (log_prob[cell] - float(shown.log_prob[cell])).exp()
        bounded = ratio.clamp(0.7, 1.3)
        clipped += ratio.item() != bounded.item()
        kl += weight[cell] * (ratio.item() - 1 - math.log(ratio.item()))
        told = float(shown.value[cell])
        square = (out.value[cell] - float(gae[cell]) - told) ** 2
        if clip_range_vf:
            near = told + (out.value[cell] - told).clamp(-0.2, 0.2)
            square = max(square, (near - float(gae[cell]) - told) ** 2)
        total = total + max(-ratio * a, -bounded * a) + 0.5 * 0.5 * square - 0.01 * entropy[cell]
    names, parameters = zip(*policy.named_parameters(), strict=True)
    for name, gradient in zip(names, torch.autograd.grad(total / len(alive), parameters), strict=True):
        torch.testing.assert_close(got[name], gradient, rtol=2e-4, atol=2e-5, msg=name)
    assert 0 < clipped < len(alive)
    assert float(metrics["clip_fraction"]) == pytest.approx(clipped / len(alive))
    assert float(metrics["approx_kl"]) == pytest.approx(kl / len(alive), rel=1e-3)
    assert (max(weight.values()) > 1.1) == (surrogate == "target")


@pytest.mark.parametrize("surrogate", ["target", "acting"])
def test_dead_rows_of_an_older_policy_teach_nothing(surrogate: Literal["target", "acting"]) -> None:
    policy = rows.policy()
    slab = rows.off_policy(policy)
    algorithm = PPO(surrogate=surrogate)
    clean, _ = rows.gradient(algorithm, policy, slab, lambda: rows.evaluation(policy, slab))
    slab.log_prob[~slab.valid] = -0.1
    scribbled, _ = rows.gradient(algorithm, policy, slab, lambda: rows.evaluation(policy, slab))
    for name, gradient in clean.items():
        assert gradient.any(), name
        assert torch.equal(scribbled[name], gradient), name


@pytest.mark.parametrize("recurrent", [False, True])
def test_every_epoch_visits_every_item_once(recurrent: bool) -> None:
    shape = ShardShape(rows=7, columns=6, shards=2, recurrent=recurrent)
    algorithm = PPO(epochs=3, batch_size=28)
    orders = {epoch: torch.randperm(shape.items, generator=torch.Generator().manual_seed(epoch)) for epoch in range(3)}

    def permute(epoch: int, size: int) -> Tensor:
        assert size == shape.items
        return orders[epoch]

    picks = list(algorithm.minibatches(shape, permute))
    per_epoch = len(picks) // 3
    assert [len(pick) for pick in picks] == [2 if recurrent else 14] * (3 * per_epoch)
    for epoch in range(3):
        assert torch.equal(torch.cat(picks[epoch * per_epoch : (epoch + 1) * per_epoch]), orders[epoch])


@pytest.mark.parametrize(
    ("batch_size", "recurrent", "fits"),
    [
        (10, False, "6, 12, 14"),
        (200, False, "28, 42, 84"),
        (20, True, "14, 28, 42"),
        (0, False, "2, 4, 6"),
        (-12, False, "2, 4, 6"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(batch_size: int, recurrent: bool, fits: str) -> None:
    shape = ShardShape(rows=7, columns=6, shards=2, recurrent=recurrent)
    with pytest.raises(ValueError, match=f"algo.batch_size={batch_size} does not share out.*{fits}"):
        items_per_minibatch(batch_size, shape)


@pytest.mark.parametrize(
    ("pace", "kl", "expected"),
    [
        (1.0, 0.0101, 1 / 1.2),
        (1.0, 0.0099, 1.0),
        (1.0, 0.0026, 1.0),
        (1.0, 0.0024, 1.2),
        (1.9, 0.001, 2.0),
        (0.051, 0.1, 0.05),
    ],
)
def test_the_learning_rate_follows_the_divergence(pace: float, kl: float, expected: float) -> None:
    metrics = {"approx_kl": torch.tensor(kl)}
    assert PPO(desired_kl=0.005).pace(pace, metrics) == pytest.approx(expected)
    assert PPO().pace(pace, metrics) == 1.0
