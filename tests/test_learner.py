from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from slipstream.algos import A2C, APPO, IMPALA, PPO
from slipstream.algos.algorithm import Batch, Evaluate, Evaluation, Prepared, SlabAlgorithm
from slipstream.crew import Crew
from slipstream.nets.actor_critic import ActorCritic, make_actor_critic
from slipstream.nets.trunk import Network
from slipstream.rejects import Rejects
from slipstream.slab import allocate
from slipstream.types import EnvSpec, Trajectory
from tests.algos import rows
from tests.algos.rows import learner

SPACES = {
    "discrete": gymnasium.spaces.Discrete(5),
    "multi_discrete": gymnasium.spaces.MultiDiscrete([3, 2]),
    "box": gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32),
}
PLAIN_PPO = PPO(epochs=1, batch_size=rows.ROWS * rows.COLUMNS, normalize_advantage=False, anneal_lr=False)


@pytest.fixture
def crew() -> Callable[[int], Crew]:
    made: list[Crew] = []

    def make(workers: int) -> Crew:
        made.append(Crew(workers))
        return made[-1]

    yield make
    for each in made:
        each.close()


def parameters(policy: ActorCritic) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])


def updated(
    algorithm: SlabAlgorithm,
    crew: Crew,
    shards: int = 1,
    network: Network | None = None,
    change: Callable[[Trajectory], None] | None = None,
    space: gymnasium.Space[object] | None = None,
) -> Tensor:
    """Parameters after two updates on made-up slabs."""
    policy = rows.policy(network, space)
    student = learner(algorithm, policy, crew, shards)
    for number in range(2):
        slab = rows.trajectory(policy, space, seed=number)
        if change is not None:
            change(slab)
        student.step(slab)
    return parameters(policy)


def as_if_older(slab: Trajectory) -> None:
    """Makes the acting policy another one, row by row."""
    slab.log_prob.add_(0.5 * torch.randn(slab.log_prob.shape, generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("core", ["none", "lstm", "gru"])
@pytest.mark.parametrize("space", SPACES)
def test_number_of_workers_changes_no_bit(crew: Callable[[int], Crew], core: str, space: str) -> None:
    network = Network(hidden=(11,), core=core, core_size=5)
    algorithm = PPO(epochs=2, batch_size=rows.ROWS * 3)
    results = [
        updated(algorithm, crew(workers), shards=3, network=network, space=SPACES[space]) for workers in (1, 2, 4)
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


ONE_BATCH = {"epochs": 1, "batch_size": rows.ROWS * rows.COLUMNS}
OFF_POLICY = [IMPALA(), APPO(**ONE_BATCH), APPO(target_period=2, kl_coef=0.5, **ONE_BATCH)]


@pytest.mark.parametrize("core", ["none", "lstm"])
@pytest.mark.parametrize("algorithm", [A2C(), *OFF_POLICY], ids=["a2c", "impala", "appo", "appo, target"])
def test_shards_add_up_to_the_gradient_of_the_whole(
    crew: Callable[[int], Crew], algorithm: SlabAlgorithm, core: str
) -> None:
    """Also for rows of another policy, whose V-trace is computed shard by shard."""
    network = Network(hidden=(11,), core=core, core_size=5)
    whole = updated(algorithm, crew(1), shards=1, network=network, change=as_if_older)
    for shards in (2, 3, 6):
        parts = updated(algorithm, crew(1), shards=shards, network=network, change=as_if_older)
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("core", ["none", "gru"])
@pytest.mark.parametrize(
    "algorithm", [IMPALA(), APPO(target_period=2, epochs=2, batch_size=rows.ROWS * 3)], ids=["impala", "appo"]
)
def test_number_of_workers_changes_no_bit_of_vtrace(
    crew: Callable[[int], Crew], algorithm: SlabAlgorithm, core: str
) -> None:
    network = Network(hidden=(11,), core=core, core_size=5, normalize_obs=True)
    one, two = (updated(algorithm, crew(workers), shards=3, network=network, change=as_if_older) for workers in (1, 2))
    assert torch.equal(one, two)


@pytest.mark.parametrize("core", ["none", "gru"])
@pytest.mark.parametrize(
    "algorithm",
    [A2C(), IMPALA(), PPO(epochs=2, batch_size=rows.ROWS * 2), APPO(epochs=2, batch_size=rows.ROWS * 2)],
    ids=["a2c", "impala", "ppo", "appo"],
)
def test_dead_rows_teach_nothing(crew: Callable[[int], Crew], algorithm: SlabAlgorithm, core: str) -> None:
    """What a dead row did (its action was ignored) must not reach the parameters."""

    def scribble(slab: Trajectory) -> None:
        dead = ~slab.valid
        assert dead.any()
        slab.action[dead] = 4
        slab.log_prob[dead] = -0.1

    network = Network(hidden=(11,), core=core, core_size=5)
    clean = updated(algorithm, crew(1), network=network)
    assert torch.equal(updated(algorithm, crew(1), network=network, change=scribble), clean)


def test_ppo_with_one_minibatch_is_a2c(crew: Callable[[int], Crew]) -> None:
    """The first ratio is 1, so clipping does nothing and both gradients agree."""
    shared = {"gae_lambda": 0.9, "max_grad_norm": 0.5, "optimizer": "adam", "anneal_lr": False, "lr": 1e-3}
    ppo = PPO(epochs=1, batch_size=rows.ROWS * rows.COLUMNS, normalize_advantage=False, **shared)
    torch.testing.assert_close(updated(ppo, crew(1)), updated(A2C(**shared), crew(1)), rtol=1e-5, atol=1e-7)


SHARED = {"gamma": 0.98, "lr": 1e-3, "anneal_lr": False, "max_grad_norm": 0.5, "ent_coef": 0.02}


@pytest.mark.parametrize("core", ["none", "lstm"])
@pytest.mark.parametrize("space", SPACES)
def test_vtrace_at_lag_0_is_what_it_generalises(crew: Callable[[int], Crew], core: str, space: str) -> None:
    """IMPALA is A2C and APPO is PPO, through everything that the learner does."""
    network = Network(hidden=(11,), core=core, core_size=5)

    def result(algorithm: SlabAlgorithm) -> Tensor:
        return updated(algorithm, crew(1), shards=2, network=network, space=SPACES[space])

    rmsprop = {"optimizer": "rmsprop_tf", "eps": 1e-3, "gae_lambda": 0.9}
    torch.testing.assert_close(
        result(IMPALA(**rmsprop, **SHARED)), result(A2C(**rmsprop, **SHARED)), rtol=1e-5, atol=1e-6
    )
    passes = {"epochs": 2, "batch_size": rows.ROWS * 2, "gae_lambda": 0.9, "eps": 1e-3}
    torch.testing.assert_close(result(APPO(**passes, **SHARED)), result(PPO(**passes, **SHARED)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("core", ["none", "lstm", "gru"])
@pytest.mark.parametrize("space", SPACES)
def test_first_ratio_is_one(crew: Callable[[int], Crew], core: str, space: str) -> None:
    """Acting and learning agree on the log-probability of every row, also across episode ends of a recurrent policy."""
    policy = rows.policy(Network(hidden=(11,), core=core, core_size=5), SPACES[space])
    metrics = learner(PLAIN_PPO, policy, crew(1), shards=2).step(rows.trajectory(policy, SPACES[space]))
    assert float(metrics["train/approx_kl"]) == pytest.approx(0.0, abs=1e-6)
    assert float(metrics["train/clip_fraction"]) == 0.0


def test_target_kl_ends_the_update_early(crew: Callable[[int], Crew]) -> None:
    policy = rows.policy()
    algorithm = PPO(epochs=8, batch_size=rows.ROWS * 2, lr=0.1, target_kl=0.01)
    metrics = learner(algorithm, policy, crew(1)).step(rows.trajectory(policy))
    assert 1 <= metrics["train/minibatches"] < 24


def test_uneven_batch_size_names_sizes_that_fit(crew: Callable[[int], Crew]) -> None:
    policy = rows.policy()
    student = learner(PPO(batch_size=16), policy, crew(1), shards=2)
    with pytest.raises(ValueError, match=r"algo.batch_size=16 does not share out.*Nearest sizes that do: 2, 6, 14, 42"):
        student.check(rows.ROWS)


def test_rewards_are_transformed_for_learning_only(crew: Callable[[int], Crew]) -> None:
    def shrink(slab: Trajectory) -> None:
        slab.reward.clamp_(-1.0, 1.0)

    policy = rows.policy()
    slab = rows.trajectory(policy)
    raw = slab.reward.clone()
    learner(A2C(), policy, crew(1), reward="clip").step(slab)
    assert torch.equal(slab.reward, raw)
    by_hand = rows.policy()
    slab = rows.trajectory(by_hand)
    shrink(slab)
    learner(A2C(), by_hand, crew(1)).step(slab)
    assert torch.equal(parameters(policy), parameters(by_hand))


def test_non_finite_gradient_is_refused_and_parameters_stay(crew: Callable[[int], Crew]) -> None:
    policy = rows.policy()
    before = parameters(policy)
    slab = rows.trajectory(policy)
    slab.reward[0, 1] = torch.inf
    names = [name for name, _ in policy.named_parameters()]
    message = f"norm nan, policy_loss -?inf, value_loss inf; in {', '.join(names[:3])} and {len(names) - 3} more"
    with pytest.raises(FloatingPointError, match=rf"gradient of update 1 is not finite \({message}\)"):
        learner(A2C(), policy, crew(1)).step(slab)
    assert torch.equal(parameters(policy), before)


def test_as_many_gradients_in_a_row_as_may_be_are_left_out(
    crew: Callable[[int], Crew], caplog: pytest.LogCaptureFixture
) -> None:
    """What they came from is kept, and tells where it went wrong; a step that is taken begins the count anew."""
    policy = rows.policy()
    student = learner(A2C(), policy, crew(1), shards=2)
    student.rejects = Rejects(2)
    kept: dict[str, dict[str, Tensor]] = {}
    student.rejects.keep = lambda name, tensors: kept.setdefault(name, dict(tensors)) and "it is there"
    good, bad = rows.trajectory(policy), rows.trajectory(policy)
    bad.reward[0, 1] = torch.inf

    for slab, count in ((bad, 1), (bad, 2), (good, 2), (bad, 3), (bad, 4)):
        before = parameters(policy)
        metrics = student.step(slab)
        assert metrics["faults/skipped_gradients"] == count
        assert torch.equal(parameters(policy), before) == (slab is bad)
        assert metrics["train/minibatches"] == float(slab is good)
    state, facts = student.state()
    successor = learner(A2C(), copy.deepcopy(policy), crew(1), shards=2)
    successor.rejects = Rejects(2)
    successor.load(copy.deepcopy(state), json.loads(json.dumps(facts)))
    with pytest.raises(
        FloatingPointError, match="gradient of update 6 is not finite"
    ):  # of its first, the third bad one
        successor.step(bad)
    assert successor.rejects.count == 5
    with pytest.raises(FloatingPointError, match="gradient of update 6 is not finite") as caught:
        student.step(bad)
    assert caught.value.__notes__ == ["it is there"]
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("the gradient of update 1 is not finite (norm nan, "), "the first time it is said, too"
    assert told.endswith("It is left out; from here on faults/skipped_gradients counts. it is there")
    for name, value in student.state()[0].items():
        assert torch.equal(value, state[name]), name
    assert list(kept) == ["update-1", "update-2", "update-4", "update-5", "update-6"]
    found = kept["update-6"]
    assert torch.isinf(found["batch.0.columns.return"]).any()
    assert torch.isfinite(found["batch.1.columns.return"]).all()
    assert {name.removeprefix("at.") for name in found if name.startswith("at.")} == set(policy.state_dict())


class Watched(APPO):
    """APPO that keeps what it is told about the target policy."""

    def prepare(self, trajectory: Trajectory, reward: Tensor, evaluate: Evaluate) -> Prepared:
        told = evaluate()
        seen.append(told)
        return super().prepare(trajectory, reward, lambda: told)


seen: list[Evaluation] = []


@pytest.mark.parametrize("period", [1, 2, 3])
def test_target_policy_is_refreshed_by_updates(crew: Callable[[int], Crew], period: int) -> None:
    """It is the policy as it was before updates 1, 1 + period, ...; the slab is shown to it whole, in shards or not."""
    seen.clear()
    network = Network(hidden=(11,), core="gru", core_size=5, normalize_obs=True)
    policy = rows.policy(network)
    student = learner(Watched(target_period=period, **ONE_BATCH), policy, crew(2), shards=3)
    target = copy.deepcopy(policy)
    for update in range(7):
        if update % period == 0:
            target = copy.deepcopy(policy)
        slab = rows.trajectory(policy, seed=update)
        expected = rows.evaluation(target, slab)
        student.step(slab)
        for name, column in expected._asdict().items():
            torch.testing.assert_close(getattr(seen[update], name), column, rtol=1e-5, atol=1e-6)
        if update % period:
            assert not torch.allclose(expected.value, rows.evaluation(policy, slab).value, atol=1e-4)
    assert len(seen) == 7


@pytest.mark.parametrize("period", [1, 2])
def test_a_slab_of_the_newest_policy_is_shown_to_no_other(crew: Callable[[int], Crew], period: int) -> None:
    """Where every row is of the policy at the start of the update, what it stored is what it would say now."""
    seen.clear()
    policy = rows.policy()
    student = learner(Watched(target_period=period, **ONE_BATCH), policy, crew(1))
    for update in range(3):
        slab = rows.trajectory(policy, seed=update)
        slab.version.fill_(update)
        if update == 2:
            slab.version[0, 1] = 1
        student.step(slab)
        stored = seen[update].log_prob is slab.log_prob and seen[update].value is slab.extras["value"]
        assert stored == (period == 1 and update < 2)


def test_a_loaded_target_policy_is_the_one_that_was_saved(crew: Callable[[int], Crew]) -> None:
    """Between two refreshes the target is neither the first policy nor the newest."""
    algorithm = APPO(target_period=3, epochs=2, batch_size=rows.ROWS * 2)
    straight = rows.policy()
    student = learner(algorithm, straight, crew(1))
    for update in range(5):
        student.step(rows.trajectory(straight, seed=update))
    tensors, facts = student.state()
    tensors = {name: value.clone() for name, value in tensors.items()}
    resumed = rows.policy()
    successor = learner(algorithm, resumed, crew(1))
    successor.load(tensors, facts)
    for update in range(5, 8):
        slab = rows.trajectory(straight, seed=update)
        student.step(slab)
        successor.step(slab)
        assert torch.equal(parameters(resumed), parameters(straight)), update
    before = tensors | {name: tensors[name.replace("target.", "policy.")] for name in tensors if "target." in name}
    forgetful = learner(algorithm, rows.policy(), crew(1))
    forgetful.load(before, facts)
    forgetful.step(rows.trajectory(straight, seed=5))
    successor.load(tensors, facts)
    successor.step(rows.trajectory(straight, seed=5))
    assert not torch.equal(parameters(forgetful.policy), parameters(successor.policy)), "the test is to need the target"


def test_skipped_rows_are_counted_and_teach_nothing(crew: Callable[[int], Crew]) -> None:
    policy = rows.policy()
    student = learner(A2C(), policy, crew(1))
    slab, before = rows.trajectory(policy), parameters(policy)
    student.skip(slab)
    assert (student.steps, student.version) == (int(slab.valid.sum()), 0)
    assert student.steps < rows.ROWS * rows.COLUMNS
    assert torch.equal(parameters(policy), before)


@pytest.mark.parametrize("core", ["none", "lstm"])
@pytest.mark.parametrize(
    "algorithm",
    [
        A2C(normalize_advantage=True),
        PPO(epochs=1, batch_size=rows.ROWS * 2),
        APPO(epochs=1, batch_size=rows.ROWS * 2),
        APPO(epochs=1, batch_size=rows.ROWS * 2, target_period=2),
        IMPALA(),
    ],
    ids=["a2c", "ppo", "appo", "appo with a target", "impala"],
)
def test_columns_that_are_not_fresh_are_counted_and_teach_nothing(
    crew: Callable[[int], Crew], algorithm: SlabAlgorithm, core: Literal["none", "lstm"]
) -> None:
    """Whatever they hold, the parameters are the same; the reward scale sees them."""
    network = Network(hidden=(11,), core=core, core_size=4)
    fresh = torch.arange(rows.COLUMNS) % 2 == 0
    found: list[Tensor] = []
    for bonus in (0.0, 5.0):
        policy = rows.policy(network)
        student = learner(algorithm, policy, crew(1))
        slab = rows.trajectory(policy)
        slab.version.fill_(-1)
        slab.reward[:, ~fresh] += bonus
        slab.log_prob[:, ~fresh] -= bonus / 10
        student.step(slab, fresh=fresh)
        assert student.steps == int(slab.valid.sum())
        found.append(parameters(policy))
    assert torch.equal(found[0], found[1])
    scaled = learner(algorithm, policy, crew(1), reward="scale")
    scaled.step(slab, fresh=fresh)
    assert bool((scaled.state()[0]["return_scale.ret"][~fresh] != 0).any())
    all_of_it = learner(algorithm, policy := rows.policy(network), crew(1))
    all_of_it.step(slab)
    assert not torch.equal(parameters(policy), found[0])


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "rmsprop_tf"])
@pytest.mark.parametrize("kind", [A2C, IMPALA])
def test_a_loaded_learner_goes_on_as_if_never_stopped(
    crew: Callable[[int], Crew], kind: type[A2C] | type[IMPALA], optimizer: str
) -> None:
    network = Network(hidden=(11,), normalize_obs=True)
    algorithm = kind(optimizer=optimizer)
    straight = rows.policy(network)
    student = learner(algorithm, straight, crew(1), reward="scale")
    student.step(rows.trajectory(straight, seed=0))
    tensors, facts = student.state()
    tensors = {name: value.clone() for name, value in tensors.items()}
    student.step(rows.trajectory(straight, seed=1))

    resumed = rows.policy(network)
    successor = learner(algorithm, resumed, crew(1), reward="scale")
    successor.load(tensors, facts)
    successor.step(rows.trajectory(resumed, seed=1))
    assert successor.version == student.version == 2
    assert successor.steps == student.steps
    assert torch.equal(parameters(resumed), parameters(straight))


class Awkward(nn.Module):
    """A torso whose gradients come as PyTorch likes: permuted images, one tensor for two parameters, expanded ones."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(4, 6, 3)
        self.first, self.second = nn.Parameter(torch.full((6,), 0.1)), nn.Parameter(torch.full((6,), -0.1))

    def forward(self, obs: Tensor) -> Tensor:
        features = self.convolution(obs.permute(0, 3, 1, 2)).relu().mean((2, 3))
        return features + (self.first + self.second)


IMAGES = EnvSpec("images", gymnasium.spaces.Box(0.0, 1.0, (9, 9, 4), np.float32), gymnasium.spaces.Discrete(5), 6)


def image_slab(policy: ActorCritic, seed: int) -> Trajectory:
    """A slab of noise with the log-probabilities and values that `policy` gives it."""
    random = torch.Generator().manual_seed(seed)
    slab = allocate(IMAGES, policy, rows.ROWS)
    slab.obs.copy_(torch.rand(slab.obs.shape, generator=random))
    slab.reward.copy_(torch.randn(slab.reward.shape, generator=random))
    slab.action.copy_(torch.randint(0, 5, slab.action.shape, generator=random))
    slab.valid.fill_(True)
    with torch.no_grad():
        out = policy.unroll(slab.obs, (), None)
        slab.extras["value"].copy_(out.value)
        slab.log_prob.copy_(policy.unroll(slab.obs[:-1], (), None).distribution.log_prob(slab.action))
    return slab


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_gradients_of_any_layout_are_applied_as_they_are_meant(crew: Callable[[int], Crew], shards: int) -> None:
    """Against PyTorch's own way: one loss, `backward()`, unfused Adam."""
    algorithm = A2C(optimizer="adam", lr=1e-2, max_grad_norm=0.05, anneal_lr=False)
    torch.manual_seed(4)
    policy = make_actor_critic(IMAGES, Network(), Awkward(), 3)
    twin = copy.deepcopy(policy)
    student = learner(algorithm, policy, crew(1), shards)
    optimizer = torch.optim.Adam(twin.parameters(), lr=1e-2, eps=algorithm.eps, fused=False)
    for number in range(3):
        slab = image_slab(policy, number)
        prepared = algorithm.prepare(slab, slab.reward, rows.unused)
        weight = torch.full(slab.reward.shape, 1 / slab.reward.numel())
        batch = Batch(slab.obs[:-1], slab.action, slab.log_prob, weight > 1, (), weight, prepared.columns)
        optimizer.zero_grad()
        algorithm.loss(twin, batch, 0.0)[0].backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
        optimizer.step()
        student.step(slab)
        for name, parameter in twin.named_parameters():
            torch.testing.assert_close(policy.get_parameter(name), parameter, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "rmsprop_tf"])
def test_a_convolutional_learner_survives_contiguous_storage(crew: Callable[[int], Crew], optimizer: str) -> None:
    """A checkpoint stores tensors without their memory layout; convolutions here are channels-last."""
    algorithm = A2C(optimizer=optimizer)
    network = Network(torso="impala_resnet")
    straight = make_actor_critic(IMAGES, network, None, 3)
    student = learner(algorithm, straight, crew(1), 2)
    student.step(image_slab(straight, 0))
    tensors, facts = student.state()
    tensors = {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    slab = image_slab(straight, 1)
    student.step(slab)
    resumed = make_actor_critic(IMAGES, network, None, 3)
    successor = learner(algorithm, resumed, crew(1), 2)
    successor.load(tensors, facts)
    successor.step(slab)
    for name, parameter in straight.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name


def test_annealed_learning_rate_follows_the_steps(crew: Callable[[int], Crew]) -> None:
    policy = rows.policy()
    student = learner(A2C(lr=1.0, lr_scaling="num_envs", anneal_lr=True), policy, crew(1))
    assert student.step(rows.trajectory(policy))["train/learning_rate"] == rows.COLUMNS
    student.steps = 2_500
    assert student.step(rows.trajectory(policy))["train/learning_rate"] == pytest.approx(rows.COLUMNS * 0.75)


def test_weights_are_a_snapshot(crew: Callable[[int], Crew]) -> None:
    """What is published does not move with the policy, and version 0 is what the policy starts with."""
    policy = rows.policy()
    student = learner(A2C(), policy, crew(1))
    first = student.weights()
    start = parameters(policy)
    student.step(rows.trajectory(policy))
    assert (first.version, student.weights().version) == (0, 1)
    names = [name for name, _ in policy.named_parameters()]
    assert torch.equal(torch.cat([first.tensors[name].flatten() for name in names]), start)
    assert not torch.equal(parameters(policy), start)


def test_the_pace_is_a_factor_on_the_learning_rate_and_is_saved(crew: Callable[[int], Crew]) -> None:
    """A divergence far below the desired one raises the rate of the next update, also after a resume."""
    algorithm = replace(PLAIN_PPO, lr=1e-4, desired_kl=1.0)
    policy = rows.policy()
    slab = rows.trajectory(policy)
    one = learner(algorithm, policy, crew(1))
    rates = [one.step(slab)["train/learning_rate"] for _ in range(2)]
    assert rates == pytest.approx([1e-4, 1.2e-4])
    other = learner(algorithm, rows.policy(), crew(1))
    other.load(*one.state())
    assert other.step(slab)["train/learning_rate"] == pytest.approx(1.44e-4)
