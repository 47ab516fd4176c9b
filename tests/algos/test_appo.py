from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial
from typing import Literal

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from slipstream.algos import APPO, PPO
from slipstream.algos.algorithm import Batch, Evaluation, ShardShape, acted
from slipstream.nets.actor_critic import ActorCritic
from slipstream.nets.trunk import Network
from slipstream.types import Trajectory
from tests.algos import oracle, rows

CORES = ["none", "lstm", "gru"]
BOX = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
CAPPED = APPO(
    gamma=0.9,
    gae_lambda=0.8,
    rho_bar=1.1,
    c_bar=0.9,
    rho_pg_bar=1.3,
    ratio_cap=1.5,
    clip_range=0.3,
    kl_coef=0.4,
    ent_coef=0.03,
    vf_coef=0.7,
    normalize_advantage=False,
)


def actor(core: str = "none", space: gymnasium.Space[object] | None = None) -> ActorCritic:
    """A policy with opinions: its first weights would make all ratios of a slab much the same."""
    policy = rows.policy(Network(hidden=(11,), core=core, core_size=5), space)
    with torch.no_grad():
        policy.policy_head.weight.mul_(100.0)
    return policy


def moved(policy: ActorCritic, by: float = 0.2) -> ActorCritic:
    """A policy some updates later."""
    later = copy.deepcopy(policy)
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in later.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=random))
    return later


def columns(algorithm: APPO, slab: Trajectory, evaluation: Evaluation) -> dict[str, Tensor]:
    return algorithm.prepare(slab, slab.reward, lambda: evaluation).columns


@pytest.mark.parametrize("surrogate", ["target", "acting"])
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("space", [None, BOX], ids=["discrete", "box"])
def test_gradient_is_that_of_the_equations(
    core: str, space: gymnasium.Space[object] | None, surrogate: Literal["target", "acting"]
) -> None:
    """Targets from plain loops, and the surrogate's ratio as the paper writes it; all three policies differ."""
    target = actor(core, space)
    policy, slab = moved(target), rows.off_policy(target, space)
    evaluation = rows.evaluation(target, slab)
    got, metrics = rows.gradient(replace(CAPPED, surrogate=surrogate), policy, slab, lambda: evaluation)

    mu, pi_old = slab.log_prob.double().numpy(), evaluation.log_prob.double().numpy()
    value = evaluation.value.double().numpy()
    vs, advantage = oracle.vtrace(slab, pi_old - mu, value, 0.9, 0.8, (1.1, 0.9, 1.3))
    whole = rows.whole(slab, {}, bootstraps=False)
    out = policy.unroll(whole.obs, whole.state0, whole.first)
    log_prob, entropy = out.distribution.log_prob(slab.action), out.distribution.entropy()
    alive = [tuple(cell) for cell in np.argwhere(slab.valid.numpy())]
    total, kl_total = torch.zeros(()), torch.zeros(())
    clipped, capped = 0, 0
    for cell in alive:
        ratio = (log_prob[cell] - float(mu[cell])).exp()
        if surrogate == "target":
            ratio = min(math.exp(mu[cell] - pi_old[cell]), 1.5) * ratio
            capped += math.exp(mu[cell] - pi_old[cell]) > 1.5
        inside = 1 - 0.3 <= ratio.item() <= 1 + 0.3
        clipped += not inside
        bounded = ratio if inside else torch.tensor(min(max(ratio.item(), 0.7), 1.3))
        a = float(advantage[cell])
        policy_loss = -ratio * a if ratio.item() * a < bounded.item() * a else -bounded * a
        error = out.value[cell] - float(vs[cell])
        log_ratio = log_prob[cell] - float(pi_old[cell])
        kl = min(math.exp(pi_old[cell] - mu[cell]), 1.1) * (log_ratio.exp() - 1 - log_ratio)
        kl_total = kl_total + kl
        total = total + policy_loss + 0.7 * 0.5 * error**2 - 0.03 * entropy[cell] + 0.4 * kl
    names, parameters = zip(*policy.named_parameters(), strict=True)
    for name, gradient in zip(names, torch.autograd.grad(total / len(alive), parameters), strict=True):
        torch.testing.assert_close(got[name], gradient, rtol=2e-4, atol=2e-5, msg=name)

    assert 0 < clipped < len(alive)
    assert capped > 0 or surrogate == "acting"
    assert float(metrics["clip_fraction"]) == pytest.approx(clipped / len(alive))
    assert float(metrics["kl_target"]) == pytest.approx(kl_total.item() / len(alive), rel=1e-4)
    ratios = np.exp([pi_old[cell] - mu[cell] for cell in alive])
    assert float(metrics["rho_clipped"]) == pytest.approx((ratios > 1.1).mean())
    assert float(metrics["rho_mean"]) == pytest.approx(np.minimum(ratios, 1.1).mean(), rel=1e-5)
    errors = np.array([vs[cell] - value[cell] for cell in alive])
    explained = 1 - errors.var() / np.var([vs[cell] for cell in alive])
    assert float(metrics["explained_variance"]) == pytest.approx(explained, rel=1e-4)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("surrogate", ["target", "acting"])
def test_on_policy_it_is_ppo(core: str, normalize: bool, surrogate: Literal["target", "acting"]) -> None:
    """With the acting policy as the target: the same gradient at every parameter, the first one or later ones."""
    behaviour = actor(core)
    slab = rows.trajectory(behaviour)
    slab.terminated[2, 3] = True
    shared = {"gae_lambda": 0.8, "gamma": 0.97, "ent_coef": 0.02, "clip_range": 0.1, "normalize_advantage": normalize}
    for student in (behaviour, moved(behaviour)):
        appo = APPO(surrogate=surrogate, **shared)
        got, metrics = rows.gradient(appo, student, slab, lambda: rows.evaluation(behaviour, slab))
        expected, ppo_metrics = rows.gradient(PPO(**shared), student, slab, partial(acted, slab))
        for name, gradient in expected.items():
            assert gradient.abs().max() > 1e-4, name
            torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
        for name, value in ppo_metrics.items():
            assert float(metrics[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-5), name
        assert float(metrics["rho_clipped"]) == 0.0


def test_the_learning_rate_follows_the_divergence_from_the_target() -> None:
    """What the lag has moved before the update is not its doing."""
    metrics = {"approx_kl": torch.tensor(0.5), "kl_target": torch.tensor(0.001)}
    assert APPO(desired_kl=0.01).pace(1.0, metrics) == pytest.approx(1.2)
    assert APPO(desired_kl=0.01).pace(1.0, metrics | {"kl_target": torch.tensor(0.021)}) == pytest.approx(1 / 1.2)
    assert APPO().pace(1.0, metrics) == 1.0


def test_kl_penalty_is_the_divergence_from_the_target() -> None:
    """Over all actions, weighted by the policy that drew them, the estimate is the exact divergence."""
    target = actor()
    policy, behaviour = moved(target), moved(target, -0.4)
    obs = torch.tensor([0.3, -0.7, 0.1]).expand(5, 3)
    old, new, mu = (each.unroll(obs, (), None).distribution for each in (target, policy, behaviour))
    action = torch.arange(5)
    log_mu, log_old = mu.log_prob(action).detach(), old.log_prob(action).detach()
    data = {
        "advantage": torch.zeros(5),
        "return": torch.zeros(5),
        "reference": log_old,
        "target_log_prob": log_old,
        "rho": (log_old - log_mu).exp(),
    }
    batch = Batch(obs, action, log_mu, torch.zeros(5, dtype=torch.bool), (), log_mu.exp(), data)
    only_kl = APPO(vf_coef=0.0, ent_coef=0.0, kl_coef=2.0)
    loss, metrics = only_kl.loss(policy, batch, 0.0)
    exact = old.kl(new)[0]
    assert float(metrics["kl_target"]) == pytest.approx(exact.item(), rel=1e-5)
    parameters = list(policy.policy_head.parameters())
    expected = torch.autograd.grad(2.0 * exact, parameters)
    for got, gradient in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-6)
    off, _ = replace(only_kl, kl_coef=0.0).loss(policy, batch, 0.0)
    assert not any(gradient.any() for gradient in torch.autograd.grad(off, parameters))


def test_advantages_are_normalised_beneath_their_weights() -> None:
    target = actor()
    slab = rows.off_policy(target)
    evaluation = rows.evaluation(target, slab)
    got = columns(replace(CAPPED, normalize_advantage=True), slab, evaluation)
    raw = columns(CAPPED, slab, evaluation)
    rho = np.minimum(1.3, np.exp((evaluation.log_prob - slab.log_prob)[slab.valid].double().numpy()))
    live = raw["advantage"][slab.valid].double().numpy()
    centred = live - rho * (live.sum() / rho.sum())
    expected = centred / np.sqrt((centred**2).mean())
    np.testing.assert_allclose(got["advantage"][slab.valid].numpy(), expected, rtol=1e-4, atol=1e-5)
    assert not got["advantage"][~slab.valid].any()
    assert torch.equal(got["return"], raw["return"])


@pytest.mark.parametrize("core", CORES)
def test_dead_rows_teach_nothing(core: str) -> None:
    target = actor(core)
    policy, slab = moved(target), rows.off_policy(target)
    algorithm = replace(CAPPED, normalize_advantage=True)
    clean, metrics = rows.gradient(algorithm, policy, slab, lambda: rows.evaluation(target, slab))
    dead = ~slab.valid
    slab.action[dead], slab.log_prob[dead], slab.reward[dead] = 4, -0.1, -7.0
    slab.terminated[dead] = True
    scribbled, others = rows.gradient(algorithm, policy, slab, lambda: rows.evaluation(target, slab))
    for name, gradient in clean.items():
        assert torch.equal(scribbled[name], gradient), name
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {name: float(value) for name, value in others.items()}
    )


def test_each_term_reaches_its_own_head() -> None:
    target = actor()
    policy, slab = moved(target, 0.05), rows.off_policy(target)

    def gradient(algorithm: APPO) -> dict[str, Tensor]:
        return rows.gradient(algorithm, policy, slab, lambda: rows.evaluation(target, slab))[0]

    no_value = gradient(APPO(vf_coef=0.0))
    assert not no_value["value_head.weight"].any()
    assert no_value["policy_head.weight"].any()
    doubled, single = gradient(APPO(vf_coef=0.5)), gradient(APPO(vf_coef=0.25))
    torch.testing.assert_close(doubled["policy_head.weight"], no_value["policy_head.weight"], rtol=0.0, atol=0.0)
    torch.testing.assert_close(doubled["value_head.weight"], 2 * single["value_head.weight"])


def test_without_advantages_only_entropy_moves_the_policy() -> None:
    policy = actor()
    with torch.no_grad():
        policy.value_head.weight.zero_()
        policy.value_head.bias.zero_()
    slab = rows.off_policy(policy)
    slab.reward.zero_()
    evaluation = rows.evaluation(policy, slab)
    idle, _ = rows.gradient(APPO(ent_coef=0.0), policy, slab, lambda: evaluation)
    assert not any(gradient.any() for gradient in idle.values())
    gradients, metrics = rows.gradient(APPO(ent_coef=0.1), policy, slab, lambda: evaluation)
    later = copy.deepcopy(policy)
    with torch.no_grad():
        for name, parameter in later.named_parameters():
            parameter.sub_(gradients[name])
    _, after = rows.gradient(APPO(), later, slab, lambda: evaluation)
    assert float(after["entropy"]) > float(metrics["entropy"]) + 1e-3


def test_every_epoch_visits_every_item_once() -> None:
    shape = ShardShape(rows=7, columns=6, shards=2, recurrent=False)
    picks = list(APPO(epochs=3, batch_size=28).minibatches(shape, lambda epoch, size: torch.arange(size) + epoch))
    assert [len(pick) for pick in picks] == [14] * 9
    for epoch in range(3):
        assert torch.equal(torch.cat(picks[3 * epoch : 3 * epoch + 3]), torch.arange(42) + epoch)
    with pytest.raises(ValueError, match=r"algo\.batch_size=10 does not share out"):
        next(APPO(batch_size=10).minibatches(shape, lambda epoch, size: torch.arange(size)))


@pytest.mark.parametrize(("annealed", "expected"), [(True, 0.25), (False, 1.0)])
def test_learning_rate(annealed: bool, expected: float) -> None:
    assert APPO(lr=1.0, anneal_lr=annealed).learning_rate(0.75, 32) == expected
