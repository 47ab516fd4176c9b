from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from slipstream import slab
from slipstream.algos import APPO, IMPALA
from slipstream.algos.cloning import cloning_loss, outside_region, within_region
from slipstream.crew import Crew
from slipstream.learner import Learner
from slipstream.loader import Loader
from slipstream.nets.actor_critic import ActorCritic, make_actor_critic
from slipstream.nets.trunk import Network
from slipstream.ops.returns import VTraceOptions, vtrace
from slipstream.replay import rows as storage
from slipstream.replay.mixer import Mixer
from slipstream.replay.options import UnrollReplay
from slipstream.replay.windows import Windows
from slipstream.rewards import TrainingReward
from slipstream.types import Trajectory
from tests.algos import rows

CLONING = UnrollReplay(proportion=1.0, capacity=2_000, clone_policy=0.3, clone_value=0.7)


def test_the_terms_are_those_of_clear_on_replayed_rows_only() -> None:
    kl, value, old = torch.tensor([0.2, 0.5, 0.1]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 4.0, 9.0])
    loss = cloning_loss(CLONING, kl, value, old, torch.tensor([1.0, 1.0, 0.0]))
    assert loss.tolist() == pytest.approx([0.3 * 0.2 + 0.7 * 1.0, 0.3 * 0.5 + 0.7 * 4.0, 0.0])
    plain = replace(CLONING, clone_policy=0.0)
    assert cloning_loss(plain, None, value, old, torch.ones(3)).tolist() == pytest.approx([0.7, 2.8, 25.2])


def test_rows_outside_of_the_trust_region_are_counted() -> None:
    assert outside_region(torch.tensor([0.2, 0.1, 0.05]), 0.1).tolist() == [1.0, 0.0, 0.0]


def test_rows_outside_of_the_trust_region_give_no_target_and_no_gradient() -> None:
    log_ratio, kl = torch.tensor([[0.1], [-0.2], [0.3]]), torch.tensor([[0.01], [0.5], [0.02]])
    assert within_region(log_ratio, kl, 0.0) is log_ratio
    bounded = within_region(log_ratio, kl, 0.1)
    assert bounded[:, 0].tolist() == [pytest.approx(0.1), -math.inf, pytest.approx(0.3)]
    value = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    flags = torch.zeros(3, 1, dtype=torch.bool)
    found = vtrace(bounded, torch.ones(3, 1), value, flags, ~flags, 0.9, VTraceOptions())
    assert found.vs[1, 0] == 2.0
    assert found.pg_advantage[1, 0] == 0.0
    assert found.vs[0, 0] == pytest.approx(1.0 + (1 + 0.9 * 2.0 - 1.0)), "the trace is cut at the row after it"


def actor() -> ActorCritic:
    return make_actor_critic(rows.spec(), Network(hidden=(11,)), None, 3, remember=True)


def remembered(policy: ActorCritic, seed: int) -> Trajectory:
    """A slab of another policy than `policy`, with the parameters of its distributions."""
    other = make_actor_critic(rows.spec(), Network(hidden=(11,)), None, 5, remember=True)
    with torch.no_grad():
        other.policy_head.weight.mul_(300.0)
    filled = rows.trajectory(other, seed=seed)
    with torch.no_grad():
        distribution, value, _ = other.unroll(filled.obs)
        filled.extras["params"].copy_(distribution.params())
        filled.extras["value"].copy_(value)
        filled.log_prob.copy_(distribution.log_prob(torch.cat([filled.action, filled.action[-1:]]))[:-1])
    filled.version.fill_(-1)
    return filled


def student(
    algorithm: APPO | IMPALA, policy: ActorCritic, shards: int = 1, loader: Loader | None = None
) -> tuple[Learner, Crew]:
    like = slab.layout(rows.spec(), policy, rows.ROWS)
    extras = tuple(like["extras"])
    names = ("log_prob", "version", "state0", *extras)
    memory = storage.allocate(storage.layout(like, algorithm.replay.capacity, 1, names))
    windows = Windows(storage.Rows(memory, rows.ROWS, like["obs"]), rows.ROWS, rows.ROWS)
    crew, loader = Crew(1), loader or Loader(0, torch.device("cpu"))
    made = Learner(
        algorithm,
        policy,
        crew,
        loader,
        num_envs=rows.COLUMNS,
        shards=shards,
        total_steps=10_000,
        seed=1,
        reward=TrainingReward("raw", rows.COLUMNS, algorithm.gamma),
        mixer=Mixer(windows, rows.COLUMNS, algorithm.replay.proportion, extras, loader.begin, 1),
    )
    return made, crew


@pytest.mark.parametrize("algorithm", [IMPALA, APPO])
def test_cloning_and_region_are_in_the_loss(algorithm: type[APPO] | type[IMPALA]) -> None:
    """Each option moves the parameters of an update with replayed rows, and none of them one without."""
    size = {} if algorithm is IMPALA else {"batch_size": rows.ROWS * rows.COLUMNS, "epochs": 1}
    plain = UnrollReplay(proportion=1.0, capacity=2_000)
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, replay in {
        "plain": plain,
        "policy": replace(plain, clone_policy=0.5),
        "value": replace(plain, clone_value=0.5),
        "region": replace(plain, trust_region=0.02),
    }.items():
        policy = actor()
        learner, crew = student(algorithm(replay=replay, lr=1e-2, **size), policy)
        learner.step(remembered(policy, 0))
        first = torch.cat([parameter.detach().flatten().clone() for parameter in policy.parameters()])
        metrics = learner.step(remembered(policy, 1))
        second = torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])
        crew.close()
        assert ("train/clone_loss" in metrics) == replay.clones
        assert ("train/outside_region" in metrics) == (replay.trust_region > 0)
        if replay.clones:
            assert metrics["train/clone_loss"] > 0.0
        if replay.trust_region:
            assert 0.0 < metrics["train/outside_region"] < 1.0 + 1e-6
        assert metrics["lag/replayed_mean"] == 2.0, "version -1 is two updates older than version 1"
        assert metrics["lag/replayed_from_2"] == 1.0
        found[name] = (first, second)
    for name in ("policy", "value"):
        assert torch.equal(found[name][0], found["plain"][0]), "no row of the first slab is replayed"
        assert not torch.equal(found[name][1], found["plain"][1])
    assert not torch.equal(found["region"][0], found["plain"][0]), "fresh rows have to be within the region too"


def test_impala_with_cloning_against_the_sum_of_its_parts() -> None:
    """The update of a mixed slab is that of V-trace on all rows and of the cloning terms on the replayed ones."""
    policy, twin = actor(), actor()
    algorithm = IMPALA(replay=CLONING, max_grad_norm=1e9)
    learner, crew = student(algorithm, policy)
    learner._mixer.store(remembered(policy, 0))
    fresh = remembered(policy, 1)
    whole = learner._mixer.mix(fresh, 0)
    again, other_crew = student(algorithm, policy)
    again._mixer.store(remembered(policy, 0))
    again.step(fresh)
    crew.close()
    other_crew.close()

    out = twin.unroll(whole.obs)
    action = torch.cat([whole.action, whole.action[-1:]])
    log_ratio = out.distribution.log_prob(action)[:-1] - whole.log_prob
    target = vtrace(
        log_ratio.detach(), whole.reward, out.value.detach(), whole.terminated, whole.valid, 0.99, VTraceOptions()
    )
    policy_loss = -out.distribution.log_prob(action)[:-1] * target.pg_advantage
    value_loss = 0.5 * (target.vs - out.value[:-1]).square()
    loss = policy_loss + 0.5 * value_loss - 0.01 * out.distribution.entropy()[:-1]
    probs, acted = out.distribution.log_probs[:-1], whole.extras["params"][:-1]
    kl = (acted.exp() * (acted - probs)).sum(-1)
    replayed = torch.arange(whole.columns) >= rows.COLUMNS
    loss = loss + replayed * (0.3 * kl + 0.7 * (out.value[:-1] - whole.extras["value"][:-1]).square())
    gradients = torch.autograd.grad(loss[whole.valid].mean(), list(twin.parameters()))
    for gradient, parameter in zip(gradients, policy.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_shards_split_the_mixed_columns(shards: int) -> None:
    policy = actor()
    learner, crew = student(IMPALA(replay=CLONING, lr=1e-2), policy, shards)
    learner.check(rows.ROWS)
    for seed in range(3):
        learner.step(remembered(policy, seed))
    crew.close()
    found = torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])
    one = actor()
    single, crew = student(IMPALA(replay=CLONING, lr=1e-2), one)
    for seed in range(3):
        single.step(remembered(one, seed))
    crew.close()
    torch.testing.assert_close(found, torch.cat([p.detach().flatten() for p in one.parameters()]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("algorithm", [IMPALA, APPO])
def test_rows_outside_of_the_region_spoil_no_number(algorithm: type[APPO] | type[IMPALA]) -> None:
    size = {} if algorithm is IMPALA else {"batch_size": rows.ROWS * rows.COLUMNS, "epochs": 1}
    replay = UnrollReplay(proportion=1.0, capacity=2_000, trust_region=0.02)
    policy = actor()
    learner, crew = student(algorithm(replay=replay, **size), policy)
    for seed in range(2):
        metrics = learner.step(remembered(policy, seed))
        assert all(math.isfinite(float(value)) for value in metrics.values()), metrics
        assert 0.0 < metrics["train/approx_kl"] < 10.0
    crew.close()


def test_advantages_are_normalised_over_the_rows_within_the_region() -> None:
    """Those outside have none; counted as zeros they would blow up the others."""
    policy = actor()
    learner, crew = student(APPO(replay=UnrollReplay(1.0, capacity=2_000, trust_region=1.0)), policy)
    fresh = remembered(policy, 0)
    evaluation = learner._evaluate(fresh)
    crew.close()
    assert evaluation.kl is not None
    bound = float(evaluation.kl[fresh.valid].quantile(0.25))
    inside = fresh.valid & (evaluation.kl <= bound)
    algorithm = APPO(replay=UnrollReplay(capacity=2_000, trust_region=bound))
    advantage = algorithm.prepare(fresh, fresh.reward, lambda: evaluation).columns["advantage"]
    assert (advantage[~inside] == 0).all()
    assert advantage[inside].square().mean().sqrt().item() == pytest.approx(1.0, rel=1e-4)


def test_cloning_without_replay_is_refused() -> None:
    with pytest.raises(ValueError, match=r"are for replayed rows: set algo\.replay\.proportion"):
        UnrollReplay(clone_value=0.1)
