from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream import slab
from slipstream.algos import DQN, SAC, TD3, Rainbow
from slipstream.algos.exploring import Exploration
from slipstream.algos.replaying import Networks, ReplayAlgorithm
from slipstream.crew import Crew
from slipstream.loader import Loader
from slipstream.nets.trunk import Network
from slipstream.rejects import Rejects
from slipstream.replay import rows
from slipstream.replay.options import ReplayOptions
from slipstream.replay.windows import Windows
from slipstream.replay_learner import ReplayLearner
from slipstream.rewards import RewardTransform, TrainingReward
from slipstream.types import EnvSpec, Trajectory

SLOTS, UNROLL = 4, 3
SMALL = ReplayOptions(capacity=400, ratio=0.3, learning_starts=20)
CONTINUOUS = gymnasium.spaces.Box(-2.0, 2.0, (2,), np.float32)


def spec(actions: gymnasium.Space[Any] | None = None) -> EnvSpec:
    observations = gymnasium.spaces.Box(-1.0, 1.0, (3,), np.float32)
    return EnvSpec("made-up", observations, actions or gymnasium.spaces.Discrete(3), SLOTS)


@pytest.fixture
def learner() -> Callable[..., ReplayLearner]:
    open_: list[Crew | Loader] = []

    def make(
        algorithm: ReplayAlgorithm, shards: int = 1, workers: int = 1, reward: RewardTransform = "raw"
    ) -> ReplayLearner:
        crew, loader = Crew(workers), Loader(0, torch.device("cpu"))
        open_.extend((loader, crew))
        own = spec(CONTINUOUS if isinstance(algorithm, SAC | TD3) else None)
        policy = algorithm.make_policy(own, Network(hidden=(8,)), None, 3)
        like = slab.layout(own, policy, UNROLL)
        stored = rows.Rows(rows.allocate(rows.layout(like, algorithm.replay.capacity, 1)), UNROLL, like["obs"])
        return ReplayLearner(
            algorithm,
            Networks(policy, algorithm.make_critic(own, Network(hidden=(8,)), None, 3)),
            Windows(stored, 1, algorithm.span, algorithm.replay.alpha),
            crew,
            loader,
            num_envs=SLOTS,
            shards=shards,
            loss_dice=algorithm.loss_dice(own),
            total_steps=10_000,
            seed=1,
            reward=TrainingReward(reward, SLOTS, algorithm.gamma),
        )

    yield make
    for each in open_:
        each.close()


def slabs(
    student: ReplayLearner, count: int, seed: int = 0, actions: gymnasium.Space[Any] | None = None
) -> list[Trajectory]:
    """Slabs of random rows, with a dead row now and then."""
    random = torch.Generator().manual_seed(seed)
    made: list[Trajectory] = []
    dead = torch.zeros(SLOTS, dtype=torch.bool)
    for _ in range(count):
        filled = slab.allocate(spec(actions), student.policy, UNROLL)
        filled.obs.copy_(torch.rand(filled.obs.shape, generator=random) * 2 - 1)
        if made:
            filled.obs[0] = made[-1].obs[UNROLL]
        filled.reward.copy_(torch.randn(filled.reward.shape, generator=random))
        if filled.action.is_floating_point():
            filled.action.copy_(torch.rand(filled.action.shape, generator=random) * 4 - 2)
        else:
            filled.action.copy_(torch.randint(0, 3, filled.action.shape, generator=random))
        for t in range(UNROLL):
            filled.valid[t] = ~dead
            filled.terminated[t] = ~dead & (torch.rand(SLOTS, generator=random) < 0.1)
            dead = filled.terminated[t].clone()
        made.append(filled)
    return made


def parameters(student: ReplayLearner) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in student.policy.parameters()])


def priorities(student: ReplayLearner) -> NDArray[np.float64]:
    found = student.windows.priorities
    assert found is not None
    return found.tree.leaves


@pytest.mark.parametrize("ratio", [0.3, 0.01, 1e-6, 1.0, 2.7, 1 / 3])
def test_the_ratio_is_exact_whatever_is_carried(learner: Callable[..., ReplayLearner], ratio: float) -> None:
    """After s steps floor((s - learning_starts) * ratio) gradient steps, at every update."""
    student = learner(DQN(batch_size=8, replay=replace(SMALL, ratio=ratio)))
    exact = Fraction(ratio).limit_denominator(10**6)
    assert exact > 0
    taken = 0.0
    for each in slabs(student, 40):
        due_at = student.due_at
        metrics = student.step(each)
        assert metrics["train/gradient_steps"] == max(int((student.steps - 20) * exact), 0)
        assert (metrics["train/gradient_steps"] > taken) == (student.steps >= due_at), "it is known when one is due"
        taken = metrics["train/gradient_steps"]
    assert student.steps == sum(int(each.valid.sum()) for each in slabs(student, 40)) < 40 * UNROLL * SLOTS


def test_a_metric_is_the_mean_over_the_gradient_steps_that_had_it(
    learner: Callable[..., ReplayLearner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The actor of TD3 has a loss in every third of them, and only there."""
    student = learner(TD3(batch_size=8, policy_delay=3, replay=replace(SMALL, ratio=1.0)))
    step, had = student._apply, list[dict[str, torch.Tensor]]()

    def noted(*given: Any) -> dict[str, torch.Tensor]:
        had.append(step(*given))
        return had[-1]

    monkeypatch.setattr(student, "_apply", noted)
    compared = 0
    for each in slabs(student, 6, actions=CONTINUOUS):
        had.clear()
        metrics = student.step(each)
        for name in {name for every in had for name in every}:
            values = [float(every[name]) for every in had if name in every]
            assert len(values) < len(had) or name not in ("actor_loss", "grad_norm/policy")
            assert float(metrics[f"train/{name}"]) == pytest.approx(sum(values) / len(values), rel=1e-5)
            compared += name == "actor_loss"
    assert compared >= 3


def test_learning_begins_when_a_batch_is_there_if_that_is_later(learner: Callable[..., ReplayLearner]) -> None:
    """And not with all at once that were due before."""
    student = learner(DQN(batch_size=32, replay=replace(SMALL, ratio=1.0, learning_starts=0)))
    steps, taken = 0, list[float]()
    begins = student.due_at - 1
    assert begins == student.windows.rows_to(32) - SLOTS * UNROLL == 2 * SLOTS * UNROLL
    for each in slabs(student, 8):
        steps += int(each.valid.sum())
        taken.append(student.step(each)["train/gradient_steps"])
        assert taken[-1] == max(steps - begins, 0)
    assert taken[1] == 0 < taken[2] < SLOTS * UNROLL < taken[-1]


def test_a_slab_that_is_skipped_is_stored_and_counted(learner: Callable[..., ReplayLearner]) -> None:
    student = learner(DQN(batch_size=8, replay=SMALL))
    for each in slabs(student, 6):
        student.skip(each)
    assert student.version == 0
    (last,) = slabs(student, 1, seed=5)
    assert student.step(last)["train/gradient_steps"] == int((student.steps - 20) * Fraction(3, 10)) > 10


@pytest.mark.parametrize("algorithm", [DQN(batch_size=12, replay=SMALL), SAC(batch_size=12, replay=SMALL)])
def test_shards_are_parts_of_one_gradient(learner: Callable[..., ReplayLearner], algorithm: ReplayAlgorithm) -> None:
    """Up to rounding, and up to what losses draw: their dice are the shards' own."""
    algorithm = replace(algorithm, lr=1e-3)
    found: list[torch.Tensor] = []
    for shards, workers in ((1, 1), (3, 1), (3, 2)):
        student = learner(algorithm, shards, workers)
        for each in slabs(student, 4, actions=CONTINUOUS if isinstance(algorithm, SAC) else None):
            student.step(each)
        found.append(parameters(student))
    assert torch.equal(found[1], found[2]), "who computes a shard changes nothing"
    if isinstance(algorithm, DQN):
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_batches_are_shared_out_or_refused(learner: Callable[..., ReplayLearner]) -> None:
    with pytest.raises(ValueError, match=r"algo.batch_size=8 does not share out equally over 3 shards; use 6 or 9"):
        learner(DQN(batch_size=8, replay=SMALL), 3)


def test_a_replay_that_never_holds_a_batch_is_refused(learner: Callable[..., ReplayLearner]) -> None:
    """40 rows are 9 in each of 4 slots, which leaves 8: the observation after the last one needs a place as well."""
    small = replace(SMALL, capacity=40)
    message = r"algo.replay.capacity=40 keeps no more than 32 windows, and algo.batch_size=33 are wanted at once"
    with pytest.raises(ValueError, match=message):
        learner(DQN(batch_size=33, replay=small))
    student = learner(DQN(batch_size=32, replay=small))
    for each in slabs(student, 8):
        metrics = student.step(each)
    assert metrics["train/gradient_steps"] > 10


def targets(student: ReplayLearner) -> dict[str, torch.Tensor]:
    """Parameters of the target networks, by the names of those that they follow."""
    tensors = student.state()[0]
    names = {f"policy.{name}" for name, _ in student.policy.named_parameters()}
    names |= {name for name in tensors if name.startswith("critic.")}
    return {name: tensors[f"target.{name}"].clone() for name in names}


def test_the_target_is_copied_when_its_time_has_come(learner: Callable[..., ReplayLearner]) -> None:
    """Counted in collected steps, whatever the ratio."""
    student = learner(DQN(batch_size=8, lr=0.01, target_every=50, replay=replace(SMALL, ratio=1.0)))
    copies, before = 0, targets(student)
    for each in slabs(student, 30):
        last = student.steps
        student.step(each)
        after = targets(student)
        moved = any(not torch.equal(before[name], after[name]) for name in before)
        assert moved == (student.steps // 50 > max(last, 20) // 50)
        copies, before = copies + moved, after
    assert copies >= 5


def test_the_target_follows_by_tau(learner: Callable[..., ReplayLearner]) -> None:
    student = learner(SAC(batch_size=8, tau=0.25, replay=replace(SMALL, ratio=1 / 12, learning_starts=12)))
    steps_alone = 0
    for each in slabs(student, 6, actions=CONTINUOUS):
        old, taken = targets(student), student.state()[1]["gradient_steps"]
        student.step(each)
        if student.state()[1]["gradient_steps"] == taken + 1:
            steps_alone += 1
            online = student.state()[0]
            for name, value in targets(student).items():
                torch.testing.assert_close(value, 0.75 * old[name] + 0.25 * online[name])
    assert steps_alone >= 2


def test_exploration_is_set_for_the_next_unroll(learner: Callable[..., ReplayLearner]) -> None:
    rates = Exploration(initial=1.0, final=0.4, least=0.1, steps=100)
    student = learner(DQN(batch_size=8, exploration=rates, replay=SMALL))
    assert student.policy.exploration.tolist() == [1.0] * SLOTS
    for each in slabs(student, 20):
        student.step(each)
    assert student.policy.exploration[0] == pytest.approx(0.4)
    assert student.policy.exploration[-1] == pytest.approx(0.1)
    assert student.weights().tensors["exploration"].tolist() == student.policy.exploration.tolist()


def test_acting_noise_is_that_of_the_version(learner: Callable[..., ReplayLearner]) -> None:
    """Every version has its own, whatever gradients there were, and so has every slot."""
    student = learner(Rainbow(batch_size=8, replay=replace(SMALL, alpha=0.5)))
    noises: list[torch.Tensor] = []
    for each in slabs(student, 5):
        student.step(each)
        weights = student.weights().tensors
        noises.append(torch.cat([value.flatten() for name, value in weights.items() if "slot_noise" in name]))
    assert len(noises[0]) == SLOTS * student.policy.noise_width > 0
    (first, *others) = (value for name, value in student.weights().tensors.items() if name.endswith("slot_noise_in"))
    assert all(not torch.equal(each[0], each[1]) for each in (first, *others))
    assert all(not torch.equal(one, other) for one, other in pairwise(noises))
    idle = learner(Rainbow(batch_size=8, replay=replace(SMALL, alpha=0.5, learning_starts=10**6)))
    for each in slabs(idle, 5):
        idle.step(each)
    own = [value.flatten() for name, value in idle.weights().tensors.items() if "slot_noise" in name]
    assert torch.equal(noises[-1], torch.cat(own))


def test_errors_become_priorities(learner: Callable[..., ReplayLearner]) -> None:
    student = learner(DQN(batch_size=64, replay=replace(SMALL, alpha=1.0, ratio=0.1)))
    for each in slabs(student, 8):
        student.step(each)
    leaves = priorities(student)
    drawable = leaves[leaves > 0]
    assert len(set(drawable.round(9).tolist())) > len(drawable) / 2, "most have an error of their own by now"


@pytest.mark.parametrize("taken", [0, 1, 12])
def test_every_resumption_collects_as_much_before_it_learns(learner: Callable[..., ReplayLearner], taken: int) -> None:
    """Wherever it was interrupted: before the first gradient step, or while the replay was being refilled."""
    student = learner(DQN(batch_size=4, replay=SMALL))
    for each in slabs(student, taken):
        student.step(each)
    for _ in range(3):
        successor = learner(DQN(batch_size=4, replay=SMALL))
        successor.load(*student.state())
        student, start, before = successor, successor.steps, successor.state()[1]["gradient_steps"]
        (few,) = slabs(student, 1, seed=3)
        assert student.step(few)["train/gradient_steps"] == before
        assert student.steps < start + 20
    for each in slabs(student, 12, seed=9):
        metrics = student.step(each)
        assert metrics["train/gradient_steps"] == before + max(int((student.steps - start - 20) * Fraction(3, 10)), 0)
    assert metrics["train/gradient_steps"] > before + 10


@pytest.mark.parametrize("algorithm", [DQN(batch_size=8, replay=SMALL), TD3(batch_size=8, replay=SMALL)])
def test_a_resumed_learner_refills_its_replay_first(
    learner: Callable[..., ReplayLearner], algorithm: ReplayAlgorithm
) -> None:
    """Counters, networks and optimisers go on; the gradient steps of the time without rows are not made up for."""
    actions = CONTINUOUS if isinstance(algorithm, TD3) else None
    student = learner(algorithm)
    for each in slabs(student, 10, actions=actions):
        student.step(each)
    tensors, facts = student.state()
    saved = {name: value.clone() for name, value in tensors.items()}
    successor = learner(algorithm)
    successor.load(saved, facts)
    assert torch.equal(parameters(successor), parameters(student))
    again, _ = successor.state()
    assert all(torch.equal(value, again[name]) for name, value in saved.items())
    start, taken = successor.steps, facts["gradient_steps"]
    due_at = successor.due_at
    for each in slabs(successor, 12, seed=9, actions=actions):
        metrics = successor.step(each)
        gained = max(int((successor.steps - start - 20) * Fraction(3, 10)), 0)
        assert metrics["train/gradient_steps"] == taken + gained
        assert (successor.steps - start < 20) <= (gained == 0)
        assert (successor.steps < due_at) == (gained == 0)


@pytest.mark.parametrize("kind", [DQN, SAC])
def test_a_gradient_that_is_not_finite_is_refused(
    learner: Callable[..., ReplayLearner], kind: type[DQN] | type[SAC]
) -> None:
    """Nothing but the replay's rows has changed: parameters, targets, optimisers and priorities are as before."""
    algorithm = kind(batch_size=64, lr=1e-3, replay=replace(SMALL, alpha=0.6, learning_starts=60))
    student, twin = learner(algorithm), learner(algorithm)
    *good, bad = slabs(student, 9, actions=CONTINUOUS if kind is SAC else None)
    bad.reward.fill_(float("nan"))
    for each in good:
        student.step(each)
        twin.step(each)
    twin.skip(bad)
    with pytest.raises(FloatingPointError, match="gradient of update 9 is not finite"):
        student.step(bad)
    (found, facts), (expected, others) = student.state(), twin.state()
    assert (facts.pop("rejects")["count"], others.pop("rejects")["count"]) == (1, 0)
    assert facts == others, "it was the first gradient step of its update that failed"
    assert facts["gradient_steps"] > 0
    assert any(name.startswith("optimizer.") for name in expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert np.array_equal(priorities(student), priorities(twin))
    assert len(set(priorities(twin).tolist())) > 10, "errors have told them apart"


def test_a_gradient_that_is_not_finite_may_be_left_out(learner: Callable[..., ReplayLearner]) -> None:
    """Parameters and priorities are as before; the gradient step counts as taken, so that the ratio holds."""
    student = learner(DQN(batch_size=64, lr=1e-3, replay=replace(SMALL, alpha=0.6, learning_starts=60)))
    student.rejects = Rejects(1000)
    kept: list[dict[str, Tensor]] = []
    student.rejects.keep = lambda name, tensors: str(kept.append(dict(tensors)))
    *good, bad = slabs(student, 9)
    bad.reward.fill_(float("nan"))
    for each in good:
        student.step(each)
    before, taken = parameters(student), student.state()[1]["gradient_steps"]
    metrics = student.step(bad)
    assert torch.equal(parameters(student), before)
    assert metrics["faults/skipped_gradients"] == len(kept) == student.state()[1]["gradient_steps"] - taken > 0
    assert torch.isnan(kept[0]["batch.0.items.reward"]).any()


def test_parts_of_the_parameters_lose_patience_apart(learner: Callable[..., ReplayLearner]) -> None:
    """The critic's gradient is never finite, the actor's always."""
    student = learner(SAC(batch_size=64, replay=replace(SMALL, learning_starts=60)))
    student.rejects = Rejects(3)
    good = slabs(student, 30, actions=CONTINUOUS)
    with pytest.raises(FloatingPointError, match="not finite"):  # noqa: PT012
        for each in good:
            each.reward.fill_(float("nan"))
            student.step(each)
    assert student.rejects.count == 4


def test_rewards_are_transformed_when_they_are_drawn(learner: Callable[..., ReplayLearner]) -> None:
    """Rows hold raw rewards, so that a scale that moves holds for old rows too."""
    found = {}
    for reward in ("raw", "sign", "clip", "scale"):
        student = learner(DQN(batch_size=8, lr=0.01, replay=SMALL), reward=reward)
        for each in slabs(student, 8):
            each.reward.mul_(3.0)
            student.step(each)
        found[reward] = parameters(student)
        stored = student._windows.rows.column("reward", np.zeros(4, np.int64), np.arange(4))
        torch.testing.assert_close(stored, 3.0 * torch.cat([each.reward[:, 0] for each in slabs(student, 2)])[:4])
    assert len({tuple(value.tolist()) for value in found.values()}) == 4


def test_the_last_slab_still_has_a_learning_rate(learner: Callable[..., ReplayLearner]) -> None:
    """Progress is that before a slab, as in `Learner`: an annealed rate is 0 after the last gradient step only."""
    student = learner(DQN(batch_size=8, lr=1.0, anneal_lr=True, replay=SMALL))
    rates = []
    for trajectory in slabs(student, 12):
        before = student.steps
        found = student.step(trajectory)
        if "train/learning_rate" in found:
            rates.append((found["train/learning_rate"], 1.0 - before / 10_000))
    assert len(rates) > 3
    assert [rate for rate, _ in rates] == pytest.approx([expected for _, expected in rates])
