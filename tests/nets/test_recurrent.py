from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from slipstream.nets.recurrent import Core, State

T, B, F, H = 11, 3, 5, 7
Kind = Literal["lstm", "gru"]
KINDS: list[Kind] = ["lstm", "gru"]


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def core(kind: Kind) -> Core:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Core(kind, F, H)


def state(kind: Kind) -> State:
    return tuple(random(seed, B, H) for seed in range(2 if kind == "lstm" else 1))


def starts(share: float) -> Tensor:
    return torch.rand(T, B, generator=torch.Generator().manual_seed(3)) < share


def stepwise(core: Core, features: Tensor, state: State, first: Tensor) -> tuple[Tensor, State]:
    outputs: list[Tensor] = []
    for t in range(len(features)):
        state = tuple(part * (~first[t]).unsqueeze(1) for part in state)
        output, state = core.step(features[t], state)
        outputs.append(output)
    return torch.stack(outputs), state


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_unrolling_is_stepping_with_resets(kind: Kind, share: float):
    net, first = core(kind), starts(share)
    output, after = net(random(5, T, B, F), state(kind), first)
    expected, last = stepwise(net, random(5, T, B, F), state(kind), first)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(after, last)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_stepping(kind: Kind):
    net, first = core(kind), starts(0.2)
    found = [
        torch.autograd.grad(unroll(random(5, T, B, F), state(kind), first)[0].square().sum(), list(net.parameters()))
        for unroll in (net, lambda *inputs: stepwise(net, *inputs))
    ]
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_reset_forgets_everything_before_it_in_its_column_only(kind: Kind):
    net, first = core(kind), torch.zeros(T, B, dtype=torch.bool)
    first[4, 1] = True
    features, changed = random(5, T, B, F), random(5, T, B, F)
    changed[:4] += 1.0
    one, other = (net(x, state(kind), first)[0] for x in (features, changed))
    assert torch.equal(one[4:, 1], other[4:, 1])
    assert not torch.isclose(one[4:, [0, 2]], other[4:, [0, 2]]).all()
    assert not torch.isclose(one[:4], other[:4]).any(dim=2).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_reset_survives_a_state_that_is_not_finite(kind: Kind):
    broken = tuple(torch.full_like(part, float("nan")) for part in state(kind))
    first = torch.zeros(T, B, dtype=torch.bool)
    first[0] = True
    assert torch.isfinite(core(kind)(random(5, T, B, F), broken, first)[0]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_episode_starts_from_zeros(kind: Kind):
    net, features = core(kind), random(5, T, B, F)
    assert [tuple(part.shape) for part in net.initial_state(B)] == [(B, H)] * (2 if kind == "lstm" else 1)
    first = torch.zeros(T, B, dtype=torch.bool)
    expected = net(features, net.initial_state(B), first)[0]
    first[0] = True
    assert torch.equal(net(features, state(kind), first)[0], expected)
