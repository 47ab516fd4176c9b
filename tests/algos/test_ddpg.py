from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from slipstream.algos import DDPG, TD3
from slipstream.algos.replaying import Loss, Networks
from slipstream.nets.continuous import make_critics
from tests.algos import windows
from tests.algos.test_sac import (
    TINY,
    Array,
    D,
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
from tests.algos.windows import LOPSIDED, SLOTS, N

USUAL = DDPG(gamma=0.9, n_step=3, tau=0.25, batch_size=N)


@pytest.mark.parametrize("normalize", [False, True])
def test_losses_are_those_of_algorithm_1(normalize: bool) -> None:
    """Lillicrap et al. (2016), in scalars; half of the squared error, and -Q(o, mu(o)) by finite differences."""
    online, target, shown, drawn = made(USUAL, replace(TINY, normalize_obs=normalize))
    assert windows.kinds(shown, drawn, 3) == {"termination", "truncation", "whole"}
    actor, theirs = arrays(online.policy), (arrays(target.policy), arrays(target.critic))
    mine = arrays(online.critic)

    rows: list[tuple[float, float, Array, Array]] = []
    for slot, start, weight, _ in cells(drawn):
        gain, discount, then = windows.outlook(shown, slot, start, 3, 0.9)
        done = np.tanh(perceptron(theirs[0], normalised(target.policy, shown.seen(slot, then))))
        goal = gain + discount * critic(theirs[1], normalised(online.policy, shown.seen(slot, then)), done)
        x = normalised(online.policy, shown.seen(slot, start))
        rows.append((weight, goal, x, scaled(shown.action[start, slot])))

    def actor_oracle() -> float:
        total = 0.0
        for slot, start, weight, _ in cells(drawn):
            x = normalised(online.policy, shown.seen(slot, start))
            total -= weight * critic(mine, x, np.tanh(perceptron(actor, x)))
        return total

    batch = windows.gathered(USUAL, shown, drawn)
    first, second = (phase.loss(online, target, batch, 0.3) for phase in USUAL.phases(0))
    assert_critics_loss(first, rows, [mine], online.critic)
    assert windows.gets_gradient(first.loss, online.policy, target.policy, target.critic) == [False] * 3
    assert second.loss.item() == pytest.approx(actor_oracle(), rel=1e-4)
    assert {name: value.item() for name, value in second.metrics.items()} == {"actor_loss": second.loss.item()}
    assert second.error is None
    assert_gradient(second.loss, online.policy, slope(actor_oracle, actor))
    assert windows.gets_gradient(second.loss, target.policy, target.critic) == [False] * 2


def test_it_is_td3_with_one_critic_without_smoothing_and_delay() -> None:
    """In both losses, bit for bit, in what is due when, and in how targets follow."""
    td3 = TD3(gamma=0.9, n_step=3, tau=0.25, batch_size=N, policy_delay=1, target_noise=0.0)
    online, target, shown, drawn = made(USUAL)
    single = Networks(td3.make_policy(LOPSIDED, TINY, None, 0), make_critics(LOPSIDED, TINY, None, 5, 1))
    assert single.critic.state_dict().keys() == online.critic.state_dict().keys()
    for step in range(3):
        mine, theirs = USUAL.phases(step), td3.phases(step)
        assert [phase.part for phase in mine] == [phase.part for phase in theirs] == ["critic", "policy"]
        for one, other in zip(mine, theirs, strict=True):
            got = one.loss(online, target, windows.gathered(USUAL, shown, drawn), 0.0)
            expected: Loss = other.loss(online, target, windows.gathered(td3, shown, drawn), 0.0)
            assert torch.equal(got.loss, expected.loss)
            windows.assert_same(got, expected)
        assert USUAL.target_mix(step, 3.0, 4.0) == td3.target_mix(step, 3.0, 4.0) == 0.25
    assert (USUAL.parts, USUAL.span, USUAL.loss_dice(LOPSIDED)) == (td3.parts, td3.span, td3.loss_dice(LOPSIDED))
    assert USUAL.loss_dice(LOPSIDED) == D


def test_it_acts_as_td3_does() -> None:
    dice = torch.rand(SLOTS, 1 + D, generator=torch.Generator().manual_seed(0))
    obs = torch.randn(SLOTS, windows.FEATURES, generator=torch.Generator().manual_seed(1))
    acted: list[torch.Tensor] = []
    for algorithm in (DDPG(exploration_noise=0.3), TD3(exploration_noise=0.3), DDPG(exploration_noise=0.2)):
        policy = algorithm.make_policy(LOPSIDED, TINY, None, 7)
        policy.exploration.zero_()
        acted.append(policy.act(obs, (), dice, slot=torch.arange(SLOTS)).action)
    assert torch.equal(acted[0], acted[1])
    assert not torch.isclose(acted[0], acted[2]).any()


def test_every_gradient_step_moves_critic_actor_and_targets() -> None:
    before, after = windows.learned(USUAL, LOPSIDED, 1)
    assert windows.moved(before, after) == before.keys()
    for name in (name for name in before if not name.startswith("target.")):
        torch.testing.assert_close(after[f"target.{name}"], 0.75 * before[name] + 0.25 * after[name])


@pytest.mark.parametrize(("phase", "part"), [(0, "critic."), (1, "policy.")])
def test_a_phase_moves_its_part_and_nothing_else(phase: int, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    every = DDPG.phases
    monkeypatch.setattr(DDPG, "phases", lambda self, step: every(self, step)[phase : phase + 1])
    monkeypatch.setattr(DDPG, "target_mix", lambda *given: 0.0)
    before, after = windows.learned(USUAL, LOPSIDED, 1)
    assert windows.moved(before, after) == {name for name in before if name.startswith(part)} != set()


def test_exploration_noise_below_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=f"^{re.escape('algo.exploration_noise must be at least 0, got -0.1')}$"):
        DDPG(exploration_noise=-0.1)
