"""SAC, and what SAC, TD3 and DDPG share: a start with random actions, step sizes, refusals."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor, nn

from slipstream.algos import DDPG, SAC, TD3
from slipstream.algos.replaying import Loss, Networks
from slipstream.nets.trunk import Network
from slipstream.replay.options import ReplayOptions
from slipstream.types import EnvSpec
from tests.algos import windows
from tests.algos.windows import DISCRETE, LOPSIDED, MANY_CHOICES, SLOTS, Draw, N, Past

Array = NDArray[np.float64]
Layers = list[Array]
D = 2
TINY = Network(hidden=(3,), init="default")
USUAL = SAC(gamma=0.9, n_step=3, alpha=0.3, batch_size=N)
FAMILY = [SAC(), TD3(), DDPG()]
family = pytest.mark.parametrize("algorithm", FAMILY, ids=[each.name for each in FAMILY])


def made(
    algorithm: Any, network: Network = TINY, spec: EnvSpec = LOPSIDED
) -> tuple[Networks[Any, Any], Networks[Any, Any], Past, Draw]:
    """Networks, others for the targets (with other statistics of observations, if any), rows and windows of them."""
    online, target = (windows.networks(algorithm, spec, network, seed) for seed in (0, 1))
    if isinstance(algorithm, SAC):
        target.critic.temperature.log_alpha.data.fill_(1.0)
    shown = windows.past(spec, online.policy)
    online.policy.observe(3.0 * shown.obs[:20] + 1.0, torch.ones(20, SLOTS, dtype=torch.bool))
    target.policy.observe(2.0 * shown.obs[20:60] - 1.0, torch.ones(40, SLOTS, dtype=torch.bool))
    return online, target, shown, windows.draw(algorithm, shown, spec)


def arrays(module: nn.Module) -> Layers:
    """Weights and biases in turn, of a perceptron; they must come in this order."""
    return [parameter.detach().double().numpy().copy() for parameter in module.parameters()]


def perceptron(layers: Layers, x: Array) -> Array:
    """Linear layers with tanh between them."""
    for weight, bias in zip(layers[0:-2:2], layers[1:-2:2], strict=True):
        x = np.tanh(weight @ x + bias)
    return layers[-2] @ x + layers[-1]


def normalised(policy: Any, seen: Tensor) -> Array:
    """An observation `[1, *O]` as a policy's networks see it, `[*O]`."""
    moments = policy.body.moments
    x = seen[0].double().numpy()
    if moments is None:
        return x
    return np.clip((x - moments.mean.numpy()) / np.sqrt(moments.variance.numpy() + 1e-8), -10, 10)


def scaled(action: Tensor) -> Array:
    """An action within the lopsided bounds, brought to [-1, 1]."""
    return (action.double().numpy() - np.array([0.0, 1.0])) / 2.0


def gaussian(layers: Layers, x: Array, u: list[float]) -> tuple[Array, float]:
    """Haarnoja et al. (2018b), appendix C: an action within [-1, 1] and its log-density there."""
    output, y, log_prob = perceptron(layers, x), np.zeros(D), 0.0
    for d in range(D):
        log_std = -5 + 3.5 * (1 + math.tanh(output[D + d]))
        xi = NormalDist().inv_cdf(u[d] + 2.0**-24)
        x_d = output[d] + math.exp(log_std) * xi
        y[d] = math.tanh(x_d)
        # log(1 - tanh(x)^2) = -2 log(cosh(x)), which differences of 1 - y^2 near 1 could not tell.
        log_cosh = abs(x_d) + math.log1p(math.exp(-2 * abs(x_d))) - math.log(2)
        log_prob += -0.5 * xi**2 - log_std - 0.5 * math.log(2 * math.pi) + 2 * log_cosh
    return y, log_prob


def critic(layers: Layers, x: Array, y: Array) -> float:
    return perceptron(layers, np.concatenate([x, y])).item()


def cells(drawn: Draw) -> list[tuple[int, int, float, list[float]]]:
    """Slot, first row, weight and dice of every window."""
    columns = (drawn.slots.tolist(), drawn.starts.tolist(), drawn.weight.tolist(), drawn.dice.tolist())
    return list(zip(*columns, strict=True))


def slope(function: Callable[[], float], arrays: Layers, step: float = 1e-5) -> Layers:
    """Gradient of a number by every entry of `arrays`, by central differences."""
    found: Layers = []
    for array in arrays:
        gradient = np.zeros_like(array)
        for place in np.ndindex(array.shape):
            kept = array[place]
            array[place] = kept + step
            above = function()
            array[place] = kept - step
            gradient[place] = (above - function()) / (2 * step)
            array[place] = kept
        found.append(gradient)
    return found


def assert_gradient(loss: Tensor, module: nn.Module, expected: Layers) -> None:
    gradients = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
    for (name, _), mine, its in zip(module.named_parameters(), gradients, expected, strict=True):
        assert np.abs(its).max() > 1e-4, name
        np.testing.assert_allclose(mine.numpy(), its, rtol=2e-3, atol=2e-5, err_msg=name)


def assert_critics_loss(
    got: Loss, rows: list[tuple[float, float, Array, Array]], critics: list[Layers], module: nn.Module
) -> None:
    """Half of the squared errors of all critics, by weight, goal, observation and action; gradient, metrics, errors."""

    def total() -> float:
        return sum(w * 0.5 * (goal - critic(layers, x, y)) ** 2 for w, goal, x, y in rows for layers in critics)

    q = [float(np.mean([critic(layers, x, y) for layers in critics])) for _, _, x, y in rows]
    q_mean = float(np.mean(q))
    assert got.loss.item() == pytest.approx(total(), rel=1e-4)
    assert {name: value.item() for name, value in got.metrics.items()} == pytest.approx(
        {"critic_loss": total(), "q_mean": q_mean}, rel=1e-4
    )
    assert got.error is not None
    errors = [np.mean([abs(goal - critic(layers, x, y)) for layers in critics]) for _, goal, x, y in rows]
    np.testing.assert_allclose(got.error.numpy(), errors, rtol=1e-4, atol=1e-5)
    assert_gradient(got.loss, module, slope(total, [array for layers in critics for array in layers]))


@pytest.mark.parametrize(("critics", "n_step", "normalize"), [(2, 1, False), (2, 3, True), (3, 3, False)])
def test_the_critics_loss_is_equation_5_with_the_least_target(critics: int, n_step: int, normalize: bool) -> None:
    """Haarnoja et al. (2018b), eq. 2, 3 and 5, in scalars; the action that follows is drawn from the online actor."""
    algorithm = replace(USUAL, n_step=n_step, critics=critics)
    online, target, shown, drawn = made(algorithm, replace(TINY, normalize_obs=normalize))
    assert windows.kinds(shown, drawn, n_step) == {"termination", "truncation", "whole"}
    actor = arrays(online.policy)
    theirs = [arrays(each) for each in target.critic.critics.critics]
    mine = [arrays(each) for each in online.critic.critics.critics]

    rows: list[tuple[float, float, Array, Array]] = []
    for slot, start, weight, u in cells(drawn):
        gain, discount, then = windows.outlook(shown, slot, start, n_step, 0.9)
        following = normalised(online.policy, shown.seen(slot, then))
        y, log_prob = gaussian(actor, following, u[:D])
        goal = gain + discount * (min(critic(layers, following, y) for layers in theirs) - 0.3 * log_prob)
        x = normalised(online.policy, shown.seen(slot, start))
        rows.append((weight, goal, x, scaled(shown.action[start, slot])))
    got = algorithm.critic_loss(online, target, windows.gathered(algorithm, shown, drawn), 0.3)
    assert_critics_loss(got, rows, mine, online.critic.critics)
    modules = (online.policy, online.critic.temperature, target.policy, target.critic)
    assert windows.gets_gradient(got.loss, *modules) == [False] * 4


@pytest.mark.parametrize(("critics", "normalize"), [(2, False), (2, True), (1, False)])
def test_the_actors_loss_is_equation_9_by_finite_differences(critics: int, normalize: bool) -> None:
    """Haarnoja et al. (2018b), eq. 7 and 9, through the action, for tiny networks: alpha log pi(a|o) - min_i Q_i."""
    algorithm = replace(USUAL, critics=critics)
    online, target, shown, drawn = made(algorithm, replace(TINY, normalize_obs=normalize))
    actor, judges = arrays(online.policy), [arrays(each) for each in online.critic.critics.critics]

    def oracle() -> tuple[float, float]:
        total, entropy = 0.0, 0.0
        for slot, start, weight, u in cells(drawn):
            x = normalised(online.policy, shown.seen(slot, start))
            y, log_prob = gaussian(actor, x, u[D : 2 * D])
            total += weight * (0.3 * log_prob - min(critic(layers, x, y) for layers in judges))
            entropy -= log_prob / len(drawn.weight)
        return total, entropy

    got = algorithm.actor_loss(online, target, windows.gathered(algorithm, shown, drawn), 0.3)
    total, entropy = oracle()
    assert got.loss.item() == pytest.approx(total, rel=1e-4)
    assert {name: value.item() for name, value in got.metrics.items()} == pytest.approx(
        {"actor_loss": total, "entropy": entropy}, rel=1e-4
    )
    assert got.error is None
    assert_gradient(got.loss, online.policy, slope(lambda: oracle()[0], actor))
    assert windows.gets_gradient(got.loss, online.critic.temperature, target.policy, target.critic) == [False] * 3


@pytest.mark.parametrize("target_entropy", [None, -0.7])
def test_the_temperatures_loss_is_equation_18(target_entropy: float | None) -> None:
    algorithm = replace(USUAL, target_entropy=target_entropy)
    online, target, shown, drawn = made(algorithm)
    actor, wanted = arrays(online.policy), -D if target_entropy is None else target_entropy
    total = 0.0
    for slot, start, weight, u in cells(drawn):
        _, log_prob = gaussian(actor, normalised(online.policy, shown.seen(slot, start)), u[2 * D :])
        total -= weight * 0.3 * (log_prob + wanted)
    got = algorithm.temperature_loss(online, target, windows.gathered(algorithm, shown, drawn), 0.3)
    assert got.loss.item() == pytest.approx(total, rel=1e-4)
    assert {name: value.item() for name, value in got.metrics.items()} == pytest.approx(
        {"ent_coef": 0.3, "ent_coef_loss": total}, rel=1e-4
    )
    assert got.error is None
    (gradient,) = torch.autograd.grad(got.loss, [online.critic.temperature.log_alpha], retain_graph=True)
    assert gradient.item() == pytest.approx(total, rel=1e-4)
    modules = (online.policy, online.critic.critics, target.policy, target.critic)
    assert windows.gets_gradient(got.loss, *modules) == [False] * 4


def test_importance_weights_count_in_all_three_losses() -> None:
    online, target, shown, drawn = made(USUAL)
    one = replace(drawn, weight=torch.eye(N)[4])
    alone = replace(drawn, slots=drawn.slots[4:5], starts=drawn.starts[4:5], dice=drawn.dice[4:5], weight=torch.ones(1))
    for phase in USUAL.phases(0):
        got = phase.loss(online, target, windows.gathered(USUAL, shown, one), 0.0)
        expected = phase.loss(online, target, windows.gathered(USUAL, shown, alone), 0.0)
        torch.testing.assert_close(got.loss, expected.loss)


@family
def test_the_losses_of_shards_add_up_to_that_of_the_batch(algorithm: Any) -> None:
    small = replace(algorithm, n_step=3, batch_size=N)
    online, target, shown, drawn = made(small)
    for phase in small.phases(1):
        whole = phase.loss(online, target, windows.gathered(small, shown, drawn), 0.0)
        loss: Callable[..., Loss] = partial(phase.loss, online, target, progress=0.0)
        windows.assert_same(windows.in_shards(loss, small, shown, drawn), whole)


@pytest.mark.parametrize(
    ("phase", "part"), [(0, "critic.critics."), (1, "policy."), (2, "critic.temperature.log_alpha")]
)
def test_a_phase_moves_its_part_and_nothing_else(phase: int, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    every = SAC.phases
    monkeypatch.setattr(SAC, "phases", lambda self, step: every(self, step)[phase : phase + 1])
    monkeypatch.setattr(SAC, "target_mix", lambda *given: 0.0)
    before, after = windows.learned(USUAL, LOPSIDED, 1)
    assert windows.moved(before, after) == {name for name in before if name.startswith(part)} != set()


def test_critics_come_first_then_the_actor_then_the_temperature() -> None:
    assert USUAL.parts == ("critic.critics", "policy", "critic.temperature")
    for step in (0, 1, 5):
        assert [(phase.part, phase.loss) for phase in USUAL.phases(step)] == [
            ("critic.critics", USUAL.critic_loss),
            ("policy", USUAL.actor_loss),
            ("critic.temperature", USUAL.temperature_loss),
        ]


def test_targets_follow_by_tau_after_every_gradient_step() -> None:
    assert [replace(USUAL, tau=0.25).target_mix(step, 3.0, 4.0) for step in range(3)] == [0.25] * 3
    before, after = windows.learned(replace(USUAL, tau=0.25), LOPSIDED, 1)
    online = {name for name in before if not name.startswith("target.")}
    assert windows.moved(before, after) == before.keys()
    for name in online:
        torch.testing.assert_close(after[f"target.{name}"], 0.75 * before[name] + 0.25 * after[name])


@pytest.mark.parametrize(
    "bounds", [((-2.0, 2.0), (-2.0, 2.0)), ((-2.0, 2.0), (-1.0, 3.0)), ((5.0, 5.5), (-90.0, 10.0))]
)
def test_entropy_is_that_of_actions_scaled_to_one_whatever_the_bounds(bounds: tuple[tuple[float, float], ...]) -> None:
    found: list[list[float]] = []
    for spec in (windows.bounded((-1.0, 1.0), (-1.0, 1.0)), windows.bounded(*bounds)):
        online, target, shown, drawn = made(USUAL, spec=spec)
        batch = windows.gathered(USUAL, shown, drawn)
        entropy = USUAL.actor_loss(online, target, batch, 0.0).metrics["entropy"]
        _, log_prob = online.policy.sample(batch.items.obs, batch.dice[:, D : 2 * D])
        found.append([entropy.item(), USUAL.temperature_loss(online, target, batch, 0.0).loss.item()])
        half = sum(math.log((high - low) / 2) for low, high in (bounds if len(found) == 2 else ((-1, 1), (-1, 1))))
        assert -batch.average(log_prob + half).item() == pytest.approx(entropy.item(), rel=1e-4)
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_the_usual_target_is_minus_the_entries_of_an_action() -> None:
    spec = replace(LOPSIDED, action_space=spaces.Box(-2.0, 2.0, (2, 3)))
    for given, expected in ((None, -6.0), (-1.5, -1.5)):
        algorithm = replace(USUAL, target_entropy=given)
        online, target, shown, drawn = made(algorithm, spec=spec)
        got = algorithm.temperature_loss(online, target, windows.gathered(algorithm, shown, drawn), 0.0).loss
        same = replace(USUAL, target_entropy=expected)
        assert torch.equal(got, same.temperature_loss(online, target, windows.gathered(same, shown, drawn), 0.0).loss)
    assert USUAL.loss_dice(spec) == 18


def test_the_temperature_rises_while_entropy_is_below_its_target_and_falls_above() -> None:
    online, target, shown, drawn = made(USUAL)
    batch = windows.gathered(USUAL, shown, drawn)
    log_alpha = online.critic.temperature.log_alpha
    _, log_prob = online.policy.sample(batch.items.obs, batch.dice[:, 2 * D :])
    # Both bounds are 4 apart, hence half of the range is 2.
    entropy = -(batch.mean(log_prob) / batch.weight.sum()).item() - 2 * math.log(2)
    for wanted, rises in ((entropy + 0.01, True), (entropy - 0.01, False)):
        told = replace(USUAL, target_entropy=wanted)
        (gradient,) = torch.autograd.grad(told.temperature_loss(online, target, batch, 0.0).loss, [log_alpha])
        assert (gradient.item() < 0) == rises
    for wanted, sign in ((50.0, 1), (-50.0, -1)):
        before, after = windows.learned(replace(USUAL, target_entropy=wanted, lr=0.01), LOPSIDED, 3)
        name = "critic.temperature.log_alpha"
        assert (after[name] - before[name]).item() == pytest.approx(sign * 0.03, rel=0.1)


def test_a_temperature_that_is_not_adapted_stays() -> None:
    fixed = replace(USUAL, adapt_alpha=False)
    assert fixed.parts == ("critic.critics", "policy")
    assert [phase.part for phase in fixed.phases(0)] == ["critic.critics", "policy"]
    before, after = windows.learned(fixed, LOPSIDED, 2)
    assert before.keys() - windows.moved(before, after) == {
        "critic.temperature.log_alpha",
        "target.critic.temperature.log_alpha",
    }
    assert after["critic.temperature.log_alpha"].exp().item() == pytest.approx(0.3)


def test_without_a_temperature_and_with_one_critic_it_is_ddpg_with_a_random_actor() -> None:
    """Dice in the middle draw the mean; DDPG's target actor is the online one, since SAC has no other."""
    sac, ddpg = replace(USUAL, alpha=1e-30, critics=1), DDPG(gamma=0.9, n_step=3, batch_size=N)
    online, target, shown, drawn = made(sac)
    plain, plain_target = (windows.networks(ddpg, LOPSIDED, TINY) for _ in range(2))
    for theirs, mine in ((plain, online), (plain_target, target)):
        theirs.critic.load_state_dict(mine.critic.critics.state_dict())
        body, its = theirs.policy.body, online.policy.body
        body.trunk.load_state_dict(its.trunk.state_dict())
        body.head.weight.data.copy_(its.head.weight[:D])
        body.head.bias.data.copy_(its.head.bias[:D])
    drawn = replace(drawn, dice=torch.full_like(drawn.dice, 0.5))
    batch = windows.gathered(sac, shown, drawn)
    windows.assert_same(
        sac.critic_loss(online, target, batch, 0.0),
        ddpg.critic_loss(plain, plain_target, replace(batch, dice=batch.dice[:, :D]), 0.0),
    )
    got = sac.actor_loss(online, target, batch, 0.0).loss
    expected = ddpg.phases(0)[1].loss(plain, plain_target, batch, 0.0).loss
    torch.testing.assert_close(got, expected)
    mine = torch.autograd.grad(got, list(online.policy.parameters()))
    theirs = torch.autograd.grad(expected, list(plain.policy.parameters()))
    for one, other in zip(mine, theirs, strict=True):
        assert other.any()
        torch.testing.assert_close(one[: len(other)], other, rtol=1e-4, atol=1e-6)


@family
def test_actions_are_random_until_learning_begins_and_the_policys_own_from_then_on(algorithm: Any) -> None:
    late = replace(algorithm, replay=ReplayOptions(learning_starts=50))
    for steps, rate in ((0, 1.0), (49, 1.0), (50, 0.0), (51, 0.0), (10**7, 0.0)):
        got = late.exploration_rates(steps, SLOTS)
        assert got.dtype == np.float32
        assert got.tolist() == [rate] * SLOTS


@family
def test_the_learning_rate_is_constant_or_falls_to_nothing(algorithm: Any) -> None:
    assert replace(algorithm, lr=0.25).learning_rate(0.75, 32) == 0.25
    assert replace(algorithm, lr=0.25, anneal_lr=True).learning_rate(0.75, 32) == 0.0625
    assert replace(algorithm, eps=0.125).optimizer_eps == 0.125


@family
def test_a_window_has_as_many_rows_as_a_return(algorithm: Any) -> None:
    assert replace(algorithm, n_step=4).span == 4
    assert algorithm.stride(7) == 1
    assert algorithm.replays
    assert algorithm.correction == "off_policy"
    assert algorithm.max_lag is None


SHARED = [
    ("lr", -1.0, "algo.lr must be at least 0, got -1.0"),
    ("eps", math.nan, "algo.eps must be at least 0, got nan"),
    ("n_step", 0, "algo.n_step must be at least 1, got 0"),
    ("batch_size", 0, "algo.batch_size must be at least 1, got 0"),
    ("max_grad_norm", 0.0, "algo.max_grad_norm must be above 0, got 0.0"),
    ("gamma", -0.1, "algo.gamma must be between 0 and 1, got -0.1"),
    ("tau", 0.0, "algo.tau must be above 0, got 0.0"),
    ("tau", 1.5, "algo.tau must be between 0 and 1, got 1.5"),
]


@family
@pytest.mark.parametrize(("name", "value", "message"), SHARED)
def test_shared_ranges(algorithm: Any, name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        replace(algorithm, **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("critics", 0, "algo.critics must be at least 1, got 0"), ("alpha", 0.0, "algo.alpha must be above 0, got 0.0")],
)
def test_ranges(name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        replace(SAC(), **{name: value})


@family
@pytest.mark.parametrize(("spec", "instead"), [(DISCRETE, "dqn or rainbow"), (MANY_CHOICES, "ppo")])
def test_other_actions_are_refused_and_what_takes_them_is_named(algorithm: Any, spec: EnvSpec, instead: str) -> None:
    for make in (algorithm.make_policy, algorithm.make_critic):
        with pytest.raises(ValueError, match=f"sac, td3 and ddpg want a Box; use {instead}$"):
            make(spec, TINY, None, 0)


@family
def test_memory_is_refused(algorithm: Any) -> None:
    for make in (algorithm.make_policy, algorithm.make_critic):
        with pytest.raises(ValueError, match=r"net\.core=lstm: sac, td3 and ddpg have no recurrent form"):
            make(LOPSIDED, replace(TINY, core="lstm"), None, 0)
