from __future__ import annotations

from collections.abc import Callable

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from slipstream.algos import A2C, PPO
from slipstream.algos.algorithm import Algorithm
from slipstream.crew import Crew
from slipstream.learner import Learner, RewardTransform
from slipstream.nets.policy import ActorCritic, Network
from slipstream.types import Trajectory
from tests.algos import rows

SPACES = {
    "discrete": gymnasium.spaces.Discrete(5),
    "multi_discrete": gymnasium.spaces.MultiDiscrete([3, 2]),
    "box": gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32),
}
PLAIN_PPO = PPO(epochs=1, batch_size=rows.ROWS * rows.COLUMNS, normalize_advantage=False, anneal_lr=False)


def learner(
    algorithm: Algorithm,
    policy: ActorCritic,
    crew: Crew,
    shards: int = 1,
    reward: RewardTransform = "raw",
) -> Learner:
    return Learner(
        algorithm,
        policy,
        crew,
        num_envs=rows.COLUMNS,
        shards=shards,
        total_steps=10_000,
        seed=1,
        reward=reward,
    )


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
    algorithm: Algorithm,
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


@pytest.mark.parametrize("core", ["none", "lstm"])
def test_shards_add_up_to_the_gradient_of_the_whole(crew: Callable[[int], Crew], core: str) -> None:
    network = Network(hidden=(11,), core=core, core_size=5)
    whole = updated(A2C(), crew(1), shards=1, network=network)
    for shards in (2, 3, 6):
        torch.testing.assert_close(updated(A2C(), crew(1), shards=shards, network=network), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("core", ["none", "gru"])
@pytest.mark.parametrize("algorithm", [A2C(), PPO(epochs=2, batch_size=rows.ROWS * 2)], ids=["a2c", "ppo"])
def test_dead_rows_teach_nothing(crew: Callable[[int], Crew], algorithm: Algorithm, core: str) -> None:
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
    with pytest.raises(FloatingPointError, match="gradient of update 1 is not finite"):
        learner(A2C(), policy, crew(1)).step(slab)
    assert torch.equal(parameters(policy), before)


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "rmsprop_tf"])
def test_a_loaded_learner_goes_on_as_if_never_stopped(crew: Callable[[int], Crew], optimizer: str) -> None:
    network = Network(hidden=(11,), normalize_obs=True)
    algorithm = A2C(optimizer=optimizer)
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


def test_annealed_learning_rate_follows_the_steps(crew: Callable[[int], Crew]) -> None:
    policy = rows.policy()
    student = learner(A2C(lr=1.0, lr_scaling="num_envs", anneal_lr=True), policy, crew(1))
    assert student.step(rows.trajectory(policy))["train/learning_rate"] == rows.COLUMNS
    student.steps = 2_500
    assert student.step(rows.trajectory(policy))["train/learning_rate"] == pytest.approx(rows.COLUMNS * 0.75)
