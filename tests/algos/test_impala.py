from __future__ import annotations

import copy
import math

import gymnasium
import numpy as np
import pytest
import torch

from slipstream.algos import A2C, IMPALA
from slipstream.algos.algorithm import ShardShape
from slipstream.nets.actor_critic import ActorCritic
from slipstream.nets.trunk import Network
from tests.algos import oracle, rows

CORES = ["none", "lstm", "gru"]
BOX = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
CAPPED = IMPALA(
    gamma=0.9, gae_lambda=0.8, rho_bar=1.1, c_bar=0.9, rho_pg_bar=1.3, ent_coef=0.03, vf_coef=0.7, loss_scale=2.5
)


def actor(core: str = "none", space: gymnasium.Space[object] | None = None) -> ActorCritic:
    """A policy with opinions: its first weights would make all ratios of a slab much the same."""
    policy = rows.policy(Network(hidden=(11,), core=core, core_size=5), space)
    with torch.no_grad():
        policy.policy_head.weight.mul_(100.0)
    return policy


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("space", [None, BOX], ids=["discrete", "box"])
def test_gradient_is_that_of_targets_by_hand(core: str, space: gymnasium.Space[object] | None) -> None:
    """Targets from plain loops, put as constants into a loss written out row by row."""
    policy = actor(core, space)
    slab = rows.off_policy(policy, space)
    got, metrics = rows.gradient(CAPPED, policy, slab)

    whole = rows.whole(slab, {}, bootstraps=True)
    out = policy.unroll(whole.obs, whole.state0, whole.first)
    log_prob = out.distribution.log_prob(torch.cat([slab.action, slab.action[-1:]]))
    log_ratio = log_prob[:-1].detach().double().numpy() - slab.log_prob.double().numpy()
    value = out.value.detach().double().numpy()
    vs, advantage = oracle.vtrace(slab, log_ratio, value, 0.9, 0.8, (1.1, 0.9, 1.3))
    total, entropy = torch.zeros(()), out.distribution.entropy()
    alive = [tuple(cell) for cell in np.argwhere(slab.valid.numpy())]
    for cell in alive:
        error = out.value[cell] - float(vs[cell])
        total = total - log_prob[cell] * float(advantage[cell]) + 0.7 * 0.5 * error**2 - 0.03 * entropy[cell]
    loss = 2.5 * total / len(alive)
    names, parameters = zip(*policy.named_parameters(), strict=True)
    for name, gradient in zip(names, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5, msg=name)

    ratios = np.exp([log_ratio[cell] for cell in alive])
    assert 0.0 < (ratios > 1.1).mean() < 1.0
    assert float(metrics["rho_clipped"]) == pytest.approx((ratios > 1.1).mean())
    assert float(metrics["rho_mean"]) == pytest.approx(np.minimum(ratios, 1.1).mean(), rel=1e-5)
    assert float(metrics["approx_kl"]) == pytest.approx((ratios - 1 - np.log(ratios)).mean(), rel=1e-4)
    assert float(metrics["value_loss"]) == pytest.approx(
        sum(0.5 * (vs[cell] - value[cell]) ** 2 for cell in alive) / len(alive), rel=1e-4
    )


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("gae_lambda", [1.0, 0.8])
def test_on_policy_it_is_a2c(core: str, gae_lambda: float) -> None:
    policy = actor(core)
    slab = rows.trajectory(policy)
    slab.terminated[2, 3] = True
    shared = {"gae_lambda": gae_lambda, "gamma": 0.97, "ent_coef": 0.02, "vf_coef": 0.3, "loss_scale": 1.5}
    got, metrics = rows.gradient(IMPALA(**shared), policy, slab)
    expected, _ = rows.gradient(A2C(**shared), policy, slab)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-4, name
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    assert float(metrics["rho_mean"]) == pytest.approx(1.0, abs=1e-5)
    assert float(metrics["rho_clipped"]) == 0.0
    assert float(metrics["approx_kl"]) == pytest.approx(0.0, abs=1e-6)


def test_caps_out_of_reach_weigh_by_the_whole_ratio() -> None:
    policy = actor()
    slab = rows.off_policy(policy)
    free, _ = rows.gradient(IMPALA(rho_bar=math.inf, c_bar=math.inf, rho_pg_bar=math.inf), policy, slab)
    capped, _ = rows.gradient(IMPALA(rho_bar=1e6, c_bar=1e6, rho_pg_bar=1e6), policy, slab)
    usual, _ = rows.gradient(IMPALA(), policy, slab)
    for name, gradient in free.items():
        torch.testing.assert_close(capped[name], gradient, rtol=0.0, atol=0.0, msg=name)
        assert not torch.allclose(usual[name], gradient, rtol=1e-3), name


@pytest.mark.parametrize("core", CORES)
def test_dead_rows_teach_nothing(core: str) -> None:
    policy = actor(core)
    slab = rows.off_policy(policy)
    clean, metrics = rows.gradient(CAPPED, policy, slab)
    dead = ~slab.valid
    slab.action[dead], slab.log_prob[dead], slab.reward[dead] = 4, -0.1, -7.0
    slab.terminated[dead] = True
    scribbled, others = rows.gradient(CAPPED, policy, slab)
    for name, gradient in clean.items():
        assert torch.equal(scribbled[name], gradient), name
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {name: float(value) for name, value in others.items()}
    )


def test_each_term_reaches_its_own_head() -> None:
    policy = actor()
    slab = rows.off_policy(policy)
    no_value, _ = rows.gradient(IMPALA(vf_coef=0.0), policy, slab)
    assert not no_value["value_head.weight"].any()
    assert no_value["policy_head.weight"].any()
    doubled, _ = rows.gradient(IMPALA(vf_coef=0.5), policy, slab)
    torch.testing.assert_close(doubled["policy_head.weight"], no_value["policy_head.weight"], rtol=0.0, atol=0.0)
    single, _ = rows.gradient(IMPALA(vf_coef=0.25), policy, slab)
    torch.testing.assert_close(doubled["value_head.weight"], 2 * single["value_head.weight"])


def test_without_advantages_only_entropy_moves_the_policy() -> None:
    policy = actor()
    with torch.no_grad():
        policy.value_head.weight.zero_()
        policy.value_head.bias.zero_()
    slab = rows.off_policy(policy)
    slab.reward.zero_()
    idle, _ = rows.gradient(IMPALA(ent_coef=0.0), policy, slab)
    assert not any(gradient.any() for gradient in idle.values())
    gradients, metrics = rows.gradient(IMPALA(ent_coef=0.1), policy, slab)
    moved = copy.deepcopy(policy)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            parameter.sub_(gradients[name])
    _, after = rows.gradient(IMPALA(), moved, slab)
    assert float(after["entropy"]) > float(metrics["entropy"]) + 1e-3


def test_every_shard_is_one_minibatch_as_it_lies() -> None:
    shape = ShardShape(rows=7, columns=3, shards=2, recurrent=False)
    assert list(IMPALA().minibatches(shape, lambda epoch, size: torch.arange(size))) == [None]
    assert not IMPALA().stop({})
    assert IMPALA().target_period == 1


@pytest.mark.parametrize(("annealed", "expected"), [(True, 0.25), (False, 1.0)])
def test_learning_rate(annealed: bool, expected: float) -> None:
    assert IMPALA(lr=1.0, anneal_lr=annealed).learning_rate(0.75, 32) == expected
