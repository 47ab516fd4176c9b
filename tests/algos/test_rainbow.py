from __future__ import annotations

import re
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from slipstream import dice
from slipstream.algos import C51, Rainbow
from slipstream.algos.exploring import Exploration
from slipstream.algos.replaying import Networks
from slipstream.nets.noisy import NoisyLinear
from slipstream.replay.options import ReplayOptions
from tests.algos import windows
from tests.algos.test_c51 import oracle
from tests.algos.windows import DISCRETE, SLOTS, Draw, N, Past

USUAL = Rainbow(gamma=0.9, atoms=11, v_min=-1.0, v_max=1.5, sigma0=2.0, batch_size=N)


def made(algorithm: Rainbow) -> tuple[Networks[Any, Any], Networks[Any, Any], Past, Draw]:
    """Networks with noise, others with other noise for the targets, rows and windows of them."""
    online, target = (windows.networks(algorithm, DISCRETE, seed=seed) for seed in (0, 1))
    renoise(online, 0)
    renoise(target, 1)
    shown = windows.past(DISCRETE, online.policy)
    return online, target, shown, windows.draw(algorithm, shown, DISCRETE)


def renoise(networks: Networks[Any, Any], number: int) -> None:
    width = networks.policy.noise_width
    networks.policy.renoise(torch.from_numpy(dice.uniform(dice.keys(0, "noise", [number]), 0, 1, width)[0, 0]))


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"noisy": False},
        {"double": False},
        {"dueling": False},
        {"n_step": 1},
        {"noisy": False, "double": False, "dueling": False, "n_step": 1},
    ],
    ids=str,
)
def test_loss_gradient_and_errors_are_those_of_c51_whatever_is_switched_off(switches: dict[str, Any]) -> None:
    """Noisy layers have their noise in all three forwards; their amounts of noise are learned."""
    algorithm = replace(USUAL, **switches)
    online, target, shown, drawn = made(algorithm)
    assert windows.kinds(shown, drawn, algorithm.n_step) == {"termination", "truncation", "whole"}
    got = algorithm.loss(online, target, windows.gathered(algorithm, shown, drawn), 0.3)
    expected, _ = oracle(algorithm, online.policy, target.policy, shown, drawn)
    windows.assert_same(got, expected)
    windows.assert_same_gradient(got.loss, expected.loss, online.policy)
    assert windows.gets_gradient(got.loss, target.policy) == [False]
    noisy = [layer for layer in online.policy.modules() if isinstance(layer, NoisyLinear)]
    assert len(noisy) == algorithm.noisy * (4 if algorithm.dueling else 2)
    assert (online.policy.head.value_stream is not None) == algorithm.dueling


def test_the_loss_of_shards_adds_up_to_that_of_the_batch() -> None:
    online, target, shown, drawn = made(USUAL)
    whole = USUAL.loss(online, target, windows.gathered(USUAL, shown, drawn), 0.0)
    loss = partial(USUAL.loss, online, target, progress=0.0)
    windows.assert_same(windows.in_shards(loss, USUAL, shown, drawn), whole)


def test_the_noise_of_both_networks_is_in_the_loss() -> None:
    online, target, shown, drawn = made(USUAL)
    batch = windows.gathered(USUAL, shown, drawn)
    found = [USUAL.loss(online, target, batch, 0.0).loss.item()]
    for networks in (online, target):
        renoise(networks, 2)
        found.append(USUAL.loss(online, target, batch, 0.0).loss.item())
    assert len(set(found)) == 3


def test_sigma0_is_the_initial_amount_of_noise() -> None:
    for sigma0 in (0.5, 2.0):
        policy = replace(USUAL, sigma0=sigma0).make_policy(DISCRETE, windows.SMALL, None, 0)
        for layer in (layer for layer in policy.modules() if isinstance(layer, NoisyLinear)):
            expected = torch.full_like(layer.weight_sigma, sigma0 / layer.weight.shape[1] ** 0.5)
            torch.testing.assert_close(layer.weight_sigma.data, expected)


def test_with_all_six_switched_off_it_is_c51() -> None:
    """Field by field, weight by weight, and in all that it answers."""
    off = Rainbow(
        double=False,
        dueling=False,
        noisy=False,
        n_step=1,
        lr=2e-4,
        eps=0.01,
        scale_eps=True,
        lr_scaling="sqrt",
        anneal_lr=True,
        batch_size=N,
        target_every=70,
        exploration=Exploration(steps=100),
        replay=ReplayOptions(learning_starts=50),
    )
    shared = {field.name: getattr(off, field.name) for field in fields(C51)}
    c51 = C51(**shared)
    online, target = (windows.networks(off, DISCRETE, seed=seed) for seed in (0, 1))
    theirs = windows.networks(c51, DISCRETE, seed=0)
    mine = online.policy.state_dict()
    assert mine.keys() == theirs.policy.state_dict().keys()
    assert all(torch.equal(value, mine[name]) for name, value in theirs.policy.state_dict().items())
    shown = windows.past(DISCRETE, online.policy)
    drawn = windows.draw(off, shown, DISCRETE)
    got = off.loss(online, target, windows.gathered(off, shown, drawn), 0.5)
    expected = c51.loss(theirs, target, windows.gathered(c51, shown, drawn), 0.5)
    assert torch.equal(got.loss, expected.loss)
    windows.assert_same(got, expected)
    for steps in (0, 50, 75, 1000):
        np.testing.assert_array_equal(off.exploration_rates(steps, SLOTS), c51.exploration_rates(steps, SLOTS))
        assert off.target_mix(0, steps, steps + 35.0) == c51.target_mix(0, steps, steps + 35.0)
    assert off.learning_rate(0.3, SLOTS) == c51.learning_rate(0.3, SLOTS)
    assert (off.optimizer_eps, off.span, off.parts) == (c51.optimizer_eps, c51.span, c51.parts)
    on = {field.name for field in fields(Rainbow) if field.name in ("double", "dueling", "noisy") and field.default}
    assert on == {"double", "dueling", "noisy"}


def test_noise_takes_the_place_of_epsilon_once_learning_has_begun() -> None:
    noisy = replace(
        USUAL, exploration=Exploration(initial=0.8, final=0.3, steps=100), replay=ReplayOptions(learning_starts=50)
    )
    for steps, noise, epsilon in ((0, 0.8, 0.8), (49, 0.8, 0.8), (50, 0.0, 0.8), (100, 0.0, 0.55), (150, 0.0, 0.3)):
        for algorithm, rate in ((noisy, noise), (replace(noisy, noisy=False), epsilon)):
            got = algorithm.exploration_rates(steps, SLOTS)
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, np.full(SLOTS, rate), atol=1e-6)


def test_an_initial_amount_of_noise_below_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=f"^{re.escape('algo.sigma0 must be at least 0, got -0.5')}$"):
        Rainbow(sigma0=-0.5)
