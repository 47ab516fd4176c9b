from __future__ import annotations

import re
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch
from gymnasium import spaces

from slipstream.algos import TD3
from tests.algos import windows
from tests.algos.test_sac import (
    TINY,
    Array,
    D,
    Layers,
    arrays,
    assert_critics_loss,
    assert_gradient,
    cells,
    critic,
    made,
    normalised,
    perceptron,
    scaled,
    slope,
)
from tests.algos.windows import LOPSIDED, N

USUAL = TD3(gamma=0.9, n_step=3, target_noise=0.5, target_noise_clip=0.4, batch_size=N)


def smoothed(layers: Layers, x: Array, u: list[float], noise: float, clip: float) -> Array:
    """Fujimoto et al. (2018), section 5.3, of an action within [-1, 1]."""
    moves = [max(-clip, min(clip, noise * NormalDist().inv_cdf(each + 2.0**-24))) for each in u]
    return np.clip(np.tanh(perceptron(layers, x)) + np.array(moves), -1.0, 1.0)


@pytest.mark.parametrize(("n_step", "normalize"), [(1, False), (3, True)])
def test_the_critics_loss_is_that_of_algorithm_1(n_step: int, normalize: bool) -> None:
    """In scalars; actions of the target actor with noise that is clipped, and then to the bounds; the lesser target."""
    algorithm = replace(USUAL, n_step=n_step)
    online, target, shown, drawn = made(algorithm, replace(TINY, normalize_obs=normalize))
    assert windows.kinds(shown, drawn, n_step) == {"termination", "truncation", "whole"}
    actor = arrays(target.policy)
    theirs = [arrays(each) for each in target.critic.critics]
    mine = [arrays(each) for each in online.critic.critics]
    rows: list[tuple[float, float, Array, Array]] = []
    at_bounds: list[bool] = []
    for slot, start, weight, u in cells(drawn):
        gain, discount, then = windows.outlook(shown, slot, start, n_step, 0.9)
        y = smoothed(actor, normalised(target.policy, shown.seen(slot, then)), u, 0.5, 0.4)
        at_bounds.extend(np.abs(y) == 1.0)
        following = normalised(online.policy, shown.seen(slot, then))
        goal = gain + discount * min(critic(layers, following, y) for layers in theirs)
        x = normalised(online.policy, shown.seen(slot, start))
        rows.append((weight, goal, x, scaled(shown.action[start, slot])))
    assert 0 < sum(at_bounds) < len(at_bounds)
    got = algorithm.critic_loss(online, target, windows.gathered(algorithm, shown, drawn), 0.3)
    assert_critics_loss(got, rows, mine, online.critic)
    assert windows.gets_gradient(got.loss, online.policy, target.policy, target.critic) == [False] * 3


@pytest.mark.parametrize("normalize", [False, True])
def test_the_actor_climbs_the_first_critic_by_finite_differences(normalize: bool) -> None:
    online, target, shown, drawn = made(USUAL, replace(TINY, normalize_obs=normalize))
    actor, judge = arrays(online.policy), arrays(online.critic.critics[0])

    def oracle() -> float:
        total = 0.0
        for slot, start, weight, _ in cells(drawn):
            x = normalised(online.policy, shown.seen(slot, start))
            total -= weight * critic(judge, x, np.tanh(perceptron(actor, x)))
        return total

    got = USUAL.phases(1)[1].loss(online, target, windows.gathered(USUAL, shown, drawn), 0.3)
    assert got.loss.item() == pytest.approx(oracle(), rel=1e-4)
    assert list(got.metrics) == ["actor_loss"]
    assert got.metrics["actor_loss"].item() == got.loss.item()
    assert got.error is None
    assert_gradient(got.loss, online.policy, slope(oracle, actor))
    assert windows.gets_gradient(got.loss, *online.critic.critics, target.policy, target.critic) == [True] + [False] * 3


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_actor_and_targets_wait_for_every_dth_gradient_step(delay: int) -> None:
    algorithm = replace(USUAL, policy_delay=delay, tau=0.25)
    for step in range(7):
        now = step % delay == delay - 1
        assert [phase.part for phase in algorithm.phases(step)] == ["critic", "policy"][: 1 + now]
        assert algorithm.target_mix(step, 3.0, 4.0) == (0.25 if now else 0.0)
    assert algorithm.parts == ("critic", "policy")


def test_a_delayed_learner_moves_critics_first_and_all_at_last() -> None:
    slow = replace(USUAL, policy_delay=3, tau=0.25)
    before, after = windows.learned(slow, LOPSIDED, 2)
    assert windows.moved(before, after) == {name for name in before if name.startswith("critic.")}
    before, after = windows.learned(slow, LOPSIDED, 3)
    assert windows.moved(before, after) == before.keys()
    for name in (name for name in before if not name.startswith("target.")):
        torch.testing.assert_close(after[f"target.{name}"], 0.75 * before[name] + 0.25 * after[name])


@pytest.mark.parametrize(("phase", "part"), [(0, "critic."), (1, "policy.")])
def test_a_phase_moves_its_part_and_nothing_else(phase: int, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    every = TD3.phases
    monkeypatch.setattr(TD3, "phases", lambda self, step: every(self, step)[phase : phase + 1])
    monkeypatch.setattr(TD3, "target_mix", lambda *given: 0.0)
    before, after = windows.learned(replace(USUAL, policy_delay=1), LOPSIDED, 1)
    assert windows.moved(before, after) == {name for name in before if name.startswith(part)} != set()


def test_noise_on_the_targets_is_of_the_settings_and_clipped() -> None:
    online, target, shown, drawn = made(USUAL)
    batch = windows.gathered(USUAL, shown, drawn)
    losses = {
        (noise, clip): replace(USUAL, target_noise=noise, target_noise_clip=clip)
        .critic_loss(online, target, batch, 0.0)
        .loss.item()
        for noise, clip in ((0.5, 0.4), (0.5, 0.1), (0.2, 0.4), (0.0, 0.4), (0.5, 0.0))
    }
    assert len(set(losses.values())) == 4
    assert losses[0.0, 0.4] == losses[0.5, 0.0]
    other = replace(batch, dice=batch.dice.flip(0))
    assert USUAL.critic_loss(online, target, other, 0.0).loss.item() not in losses.values()


def test_there_are_two_critics_and_a_number_per_entry_for_their_noise() -> None:
    assert len(USUAL.make_critic(LOPSIDED, TINY, None, 0).critics) == 2
    assert USUAL.loss_dice(LOPSIDED) == D
    spec = replace(LOPSIDED, action_space=spaces.Box(-2.0, 2.0, (2, 3)))
    assert USUAL.loss_dice(spec) == 6


def test_exploration_noise_is_that_of_the_settings() -> None:
    """A draw one standard deviation above the mean: half of the range is 2."""
    dice = torch.tensor([[0.9, NormalDist().cdf(1.0), NormalDist().cdf(-1.0)]])
    for sigma in (0.05, 0.1):
        policy = replace(USUAL, exploration_noise=sigma).make_policy(LOPSIDED, TINY, None, 0)
        policy.exploration.zero_()
        obs = torch.zeros(1, windows.FEATURES)
        moved = policy.act(obs, (), dice, slot=torch.tensor([0])).action - policy.mean_action(obs)
        torch.testing.assert_close(moved, torch.tensor([[2 * sigma, -2 * sigma]]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("policy_delay", 0, "algo.policy_delay must be at least 1, got 0"),
        ("exploration_noise", -0.1, "algo.exploration_noise must be at least 0, got -0.1"),
        ("target_noise", -0.1, "algo.target_noise must be at least 0, got -0.1"),
        ("target_noise_clip", -0.1, "algo.target_noise_clip must be at least 0, got -0.1"),
    ],
)
def test_ranges(name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        replace(TD3(), **{name: value})
