"""DQN, and what all of Q-learning shares with it: exploration, copies of the target, step sizes, refusals."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from slipstream import tree
from slipstream.algos import C51, DQN, QRDQN, R2D2, Rainbow
from slipstream.algos.exploring import Exploration, LrScaling
from slipstream.algos.replaying import Loss, Networks
from slipstream.nets.q_policy import QHeads, QPolicy, make_q_policy
from slipstream.replay.options import ReplayOptions
from slipstream.types import EnvSpec
from tests.algos import windows
from tests.algos.windows import DISCRETE, LOPSIDED, SLOTS, Draw, N, Past

USUAL = DQN(gamma=0.9, n_step=3, huber_delta=0.6, batch_size=N)
FAMILY = [DQN(), C51(), QRDQN(), Rainbow(noisy=False), R2D2()]
family = pytest.mark.parametrize("algorithm", FAMILY, ids=[each.name for each in FAMILY])


def made(algorithm: Any) -> tuple[Networks[Any, Any], Networks[Any, Any], Past, Draw]:
    """Networks, others for the targets, rows and windows of them."""
    online, target = (windows.networks(algorithm, DISCRETE, seed=seed) for seed in (0, 1))
    shown = windows.past(DISCRETE, online.policy)
    return online, target, shown, windows.draw(algorithm, shown, DISCRETE)


def oracle(algorithm: DQN, online: QPolicy, target: QPolicy, shown: Past, drawn: Draw) -> Loss:
    """Algorithm 1 of Mnih et al. (2015), transition by transition; targets are plain numbers."""
    total, q_mean, td_error, errors = torch.zeros(()), 0.0, 0.0, []
    for slot, start, weight in zip(drawn.slots.tolist(), drawn.starts.tolist(), drawn.weight.tolist(), strict=True):
        gain, discount, then = windows.outlook(shown, slot, start, algorithm.n_step, algorithm.gamma)
        following = target.unroll(shown.seen(slot, then))[0].tolist()
        judge = online.unroll(shown.seen(slot, then))[0].tolist() if algorithm.double else following
        best = max(shown.allowed(slot, then), key=judge.__getitem__)
        q = online.unroll(shown.seen(slot, start))[0, int(shown.action[start, slot])]
        delta = gain + discount * following[best] - q
        bound = algorithm.huber_delta
        huber = 0.5 * delta**2 if abs(delta.item()) <= bound else bound * (delta.abs() - 0.5 * bound)
        total = total + weight * huber
        q_mean += q.item() / len(drawn.slots)
        td_error += abs(delta.item()) / len(drawn.slots)
        errors.append(delta.item())
    metrics = {"loss": total.item(), "q_mean": q_mean, "td_error": td_error}
    return Loss(total, {name: torch.tensor(value) for name, value in metrics.items()}, torch.tensor(errors))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dueling", [False, True])
@pytest.mark.parametrize("n_step", [1, 3])
def test_loss_gradient_and_errors_are_those_of_algorithm_1(n_step: int, dueling: bool, double: bool) -> None:
    algorithm = replace(USUAL, n_step=n_step, dueling=dueling, double=double)
    online, target, shown, drawn = made(algorithm)
    assert windows.kinds(shown, drawn, n_step) == {"termination", "truncation", "whole"}
    got = algorithm.loss(online, target, windows.gathered(algorithm, shown, drawn), 0.3)
    expected = oracle(algorithm, online.policy, target.policy, shown, drawn)
    windows.assert_same(got, expected)
    windows.assert_same_gradient(got.loss, expected.loss, online.policy)
    assert expected.error is not None
    assert expected.error.abs().min() < 0.6 < expected.error.abs().max()
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


@pytest.mark.parametrize(
    ("algorithm", "heads", "scale"),
    [
        (DQN(dueling=True), QHeads(dueling=True), 0.5**0.5),
        (C51(dueling=True), QHeads("categorical", 51, dueling=True), 0.5**0.5),
        (QRDQN(dueling=True), QHeads("quantile", 200, dueling=True), 0.5**0.5),
        (Rainbow(noisy=False), QHeads("categorical", 51, dueling=True), 0.5**0.5),
        (R2D2(), QHeads(dueling=True), 1.0),
    ],
    ids=lambda each: getattr(each, "name", ""),
)
def test_two_streams_send_a_scaled_gradient_into_the_trunk(algorithm: Any, heads: QHeads, scale: float) -> None:
    """Wang et al. (2016), section 4.2, by 1/sqrt(2); not in R2D2, whose trunk ends in its core."""
    network = replace(windows.SMALL, core="lstm" if isinstance(algorithm, R2D2) else "none")
    policy = algorithm.make_policy(DISCRETE, network, None, 5)
    plain = make_q_policy(DISCRETE, network, None, 5, heads)
    obs = windows.past(DISCRETE, policy).obs
    first = torch.zeros(windows.ROWS + 1, SLOTS, dtype=torch.bool)
    said, expected = (each.unroll(obs, each.initial_state(SLOTS), first) for each in (policy, plain))
    assert torch.equal(said, expected)
    got = torch.autograd.grad(said.square().mean(), list(policy.trunk.parameters()))
    unscaled = torch.autograd.grad(expected.square().mean(), list(plain.trunk.parameters()))
    for mine, its in zip(got, unscaled, strict=True):
        assert its.any()
        torch.testing.assert_close(mine, scale * its, rtol=1e-4, atol=1e-6)


def test_only_the_online_network_moves_until_the_target_is_due() -> None:
    before, after = windows.learned(replace(USUAL, target_every=10**6), DISCRETE, 2)
    online = {name for name in before if name.startswith("policy.")}
    assert windows.moved(before, after) == online
    assert {f"target.{name}" for name in online} == before.keys() - online
    _, after = windows.learned(replace(USUAL, target_every=1), DISCRETE, 2)
    assert all(torch.equal(after[name], after[f"target.{name}"]) for name in online)
    before, after = windows.learned(replace(USUAL, target_every=1, tau=0.25), DISCRETE, 1)
    for name in online:
        torch.testing.assert_close(after[f"target.{name}"], 0.75 * before[name] + 0.25 * after[name])


@family
def test_the_target_moves_by_tau_when_a_multiple_of_collected_steps_is_crossed(algorithm: Any) -> None:
    every = replace(algorithm, target_every=30)
    slowly = replace(every, tau=0.25)
    table = [
        (0, 29.9, 0),
        (29.9, 30, 1),
        (30, 30.1, 0),
        (30, 59, 0),
        (59, 61, 1),
        (25, 100, 1),
        (30, 60, 1),
        (31, 59, 0),
    ]
    for number in (0, 7):
        assert [every.target_mix(number, before, now) for before, now, _ in table] == [due for *_, due in table]
        assert [slowly.target_mix(number, before, now) for before, now, _ in table] == [due / 4 for *_, due in table]


@pytest.mark.parametrize("pace", [0.3, 4.0, 7.0])
def test_copies_are_as_many_whatever_the_pace_of_gradient_steps(pace: float) -> None:
    algorithm = DQN(target_every=30)
    steps = [20 + number * pace for number in range(round(3000 / pace) + 1)]
    copies = sum(algorithm.target_mix(0, before, now) for before, now in pairwise(steps))
    assert copies == steps[-1] // 30


RATES = Exploration(initial=0.9, final=0.4, least=0.4**8, steps=500)


@family
def test_exploration_decays_by_slot_once_learning_has_begun(algorithm: Any) -> None:
    """Linearly from `initial`, to the rates of Horgan et al. (2018): 0.4^(1 + 7 i / (B - 1))."""
    late = replace(algorithm, exploration=RATES, replay=replace(algorithm.replay, learning_starts=1000))
    finals = np.array([0.4 ** (1 + 7 * slot / (SLOTS - 1)) for slot in range(SLOTS)])
    for steps, share in ((0, 0.0), (999, 0.0), (1000, 0.0), (1100, 0.2), (1250, 0.5), (1500, 1.0), (10**7, 1.0)):
        got = late.exploration_rates(steps, SLOTS)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, 0.9 + share * (finals - 0.9), atol=1e-6)


def test_one_final_rate_is_that_of_all_slots() -> None:
    algorithm = DQN(exploration=Exploration(initial=0.5, final=0.1, steps=10), replay=ReplayOptions(learning_starts=5))
    np.testing.assert_allclose(algorithm.exploration_rates(10, 7), np.full(7, 0.3), rtol=1e-6)
    np.testing.assert_allclose(algorithm.exploration_rates(20, 7), np.full(7, 0.1), rtol=1e-6)
    greedy = replace(algorithm, exploration=Exploration(final=0.0, steps=10))
    assert greedy.exploration_rates(15, 7).tolist() == [0.0] * 7


def test_a_decay_of_no_steps_begins_no_sooner_than_learning() -> None:
    algorithm = DQN(exploration=Exploration(initial=1.0, final=0.25, steps=0), replay=ReplayOptions(learning_starts=5))
    assert [algorithm.exploration_rates(steps, 1).item() for steps in (0, 4, 5, 6)] == [1.0, 1.0, 0.25, 0.25]


@family
def test_evaluation_explores_by_a_rate_of_its_own(algorithm: Any) -> None:
    network = replace(windows.SMALL, core="lstm" if isinstance(algorithm, R2D2) else "none")
    policy = replace(algorithm, exploration=Exploration(evaluation=1.0)).make_policy(DISCRETE, network, None, 0)
    obs = tree.map(lambda leaf: leaf[0], windows.past(DISCRETE, policy).obs)
    act = policy.act(obs, policy.initial_state(SLOTS), torch.full((SLOTS, 2), 0.5))
    torch.testing.assert_close(act.log_prob, -obs["action_mask"].sum(-1).float().log())


@family
@pytest.mark.parametrize(("rule", "factor"), [("none", 1.0), ("sqrt", 4.0), ("linear", 16.0)])
def test_the_learning_rate_grows_with_the_batch_by_rule(algorithm: Any, rule: LrScaling, factor: float) -> None:
    """From 32 on, whatever the slots; and falls to 0 if it is annealed."""
    scaled = replace(algorithm, lr=1e-3, lr_scaling=rule, batch_size=512)
    assert scaled.learning_rate(0.75, 3) == scaled.learning_rate(0.0, 64) == pytest.approx(1e-3 * factor)
    assert replace(scaled, batch_size=32).learning_rate(0.0, 3) == pytest.approx(1e-3)
    annealed = replace(scaled, anneal_lr=True)
    assert annealed.learning_rate(0.75, 3) == pytest.approx(0.25e-3 * factor)
    assert annealed.learning_rate(1.0, 3) == 0.0


@family
def test_epsilon_of_the_optimiser_may_be_over_the_batch(algorithm: Any) -> None:
    assert replace(algorithm, eps=0.01, batch_size=64).optimizer_eps == 0.01
    assert replace(algorithm, eps=0.01, batch_size=64, scale_eps=True).optimizer_eps == 0.01 / 64


@family
def test_one_optimiser_takes_one_step_without_dice(algorithm: Any) -> None:
    assert algorithm.parts == ("policy",)
    for number in (0, 5):
        assert [phase.part for phase in algorithm.phases(number)] == ["policy"]
    assert algorithm.loss_dice(DISCRETE) == 0
    assert replace(algorithm, n_step=4).span == (120 if isinstance(algorithm, R2D2) else 4)
    assert not list(algorithm.make_critic(DISCRETE, windows.SMALL, None, 0).parameters())
    assert algorithm.replays
    assert algorithm.correction == "off_policy"
    assert algorithm.max_lag is None


SHARED = [
    ("lr", -1.0, "algo.lr must be at least 0, got -1.0"),
    ("lr", math.nan, "algo.lr must be at least 0, got nan"),
    ("eps", -1e-5, "algo.eps must be at least 0, got -1e-05"),
    ("n_step", 0, "algo.n_step must be at least 1, got 0"),
    ("batch_size", 0, "algo.batch_size must be at least 1, got 0"),
    ("target_every", 0, "algo.target_every must be at least 1, got 0"),
    ("gamma", 1.5, "algo.gamma must be between 0 and 1, got 1.5"),
    ("tau", 0.0, "algo.tau must be above 0, got 0.0"),
    ("tau", 1.5, "algo.tau must be between 0 and 1, got 1.5"),
    ("max_grad_norm", 0.0, "algo.max_grad_norm must be above 0, got 0.0"),
]


@family
@pytest.mark.parametrize(("name", "value", "message"), SHARED)
def test_shared_ranges(algorithm: Any, name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        replace(algorithm, **{name: value})


def test_an_error_bound_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^algo\.huber_delta must be above 0, got 0\.0$"):
        DQN(huber_delta=0.0)


LEAST = "algo.exploration.final=0.01 is the epsilon of the first slot and algo.exploration.least="
TOO_GREAT = (
    "that of the last, which must be above 0 and at most as great; set least as well (none: final for all slots)"
)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("initial", 1.5, "algo.exploration.initial must be between 0 and 1, got 1.5"),
        ("final", -0.1, "algo.exploration.final must be between 0 and 1, got -0.1"),
        ("evaluation", math.nan, "algo.exploration.evaluation must be between 0 and 1, got nan"),
        ("steps", -1, "algo.exploration.steps must be at least 0, got -1"),
        ("least", 0.0, f"{LEAST}0 {TOO_GREAT}"),
        ("least", 0.02, f"{LEAST}0.02 {TOO_GREAT}"),
    ],
)
def test_ranges_of_exploration(name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        replace(Exploration(), **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("capacity", 0, "algo.replay.capacity must be at least 1, got 0"),
        ("ratio", 0.0, "algo.replay.ratio must be at least 1e-06, got 0.0"),
        ("ratio", 9e-7, "algo.replay.ratio must be at least 1e-06, got 9e-07"),
        ("learning_starts", -1, "algo.replay.learning_starts must be at least 0, got -1"),
        ("alpha", -0.5, "algo.replay.alpha must be at least 0, got -0.5"),
        ("alpha", math.inf, "algo.replay.alpha must be a finite number, got inf"),
        ("beta", 1.1, "algo.replay.beta must be between 0 and 1, got 1.1"),
    ],
)
def test_ranges_of_the_replay(name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        replace(ReplayOptions(), **{name: value})


def test_the_ends_of_the_ranges_are_allowed() -> None:
    for algorithm in FAMILY:
        replace(algorithm, lr=0.0, eps=0.0, n_step=1, batch_size=1, target_every=1, gamma=1.0, max_grad_norm=math.inf)
    Exploration(initial=0.0, final=0.0, steps=0, evaluation=1.0)
    Exploration(final=0.01, least=0.01)
    ReplayOptions(capacity=1, ratio=1e-6, learning_starts=0, alpha=0.0, beta=1.0)


@family
@pytest.mark.parametrize(("spec", "instead"), [(LOPSIDED, "sac, td3 or ddpg"), (windows.MANY_CHOICES, "ppo")])
def test_other_actions_are_refused_and_what_takes_them_is_named(algorithm: Any, spec: EnvSpec, instead: str) -> None:
    network = replace(windows.SMALL, core="lstm" if isinstance(algorithm, R2D2) else "none")
    with pytest.raises(ValueError, match=f"Q-learning wants Discrete actions; use {instead}$"):
        algorithm.make_policy(spec, network, None, 0)


@pytest.mark.parametrize("algorithm", [DQN(), C51(), QRDQN(), Rainbow()], ids=lambda each: each.name)
def test_a_memory_is_refused(algorithm: Any) -> None:
    message = rf"^net\.core=gru: {algorithm.name} learns from single transitions; use --net\.core none, or r2d2"
    with pytest.raises(ValueError, match=message):
        algorithm.make_policy(DISCRETE, replace(windows.SMALL, core="gru"), None, 0)
