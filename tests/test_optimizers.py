from __future__ import annotations

import copy
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from slipstream.optimizers import OptimizerKind, RMSpropTF, make_optimizer

KINDS: list[OptimizerKind] = ["adam", "rmsprop", "rmsprop_tf"]
GRADIENTS = [0.3, -1.7, 0.0, 25.0, -0.001]


def run(kind: OptimizerKind, lr: float, eps: float, **options: float) -> list[float]:
    """A scalar parameter, from 1, after each of `GRADIENTS`."""
    parameter = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = make_optimizer(kind, [parameter], lr, eps, **options)
    found: list[float] = []
    for gradient in GRADIENTS:
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        found.append(parameter.item())
    return found


@pytest.mark.parametrize("initial", [1.0, 0.0])
@pytest.mark.parametrize("eps", [0.1, 1e-5])
def test_rmsprop_tf_has_epsilon_under_the_root_and_starts_at_one(initial: float, eps: float):
    p, ms, expected = 1.0, initial, []
    for g in GRADIENTS:
        ms = 0.9 * ms + 0.1 * g * g
        p -= 0.02 * g / math.sqrt(ms + eps)
        expected.append(p)
    np.testing.assert_allclose(
        run("rmsprop_tf", 0.02, eps, decay=0.9, initial_mean_square=initial), expected, rtol=1e-12
    )


def test_rmsprop_is_torchs_and_another_algorithm_at_large_epsilon():
    p, ms, expected = 1.0, 0.0, []
    for g in GRADIENTS:
        ms = 0.99 * ms + 0.01 * g * g
        p -= 0.02 * g / (math.sqrt(ms) + 0.1)
        expected.append(p)
    got = run("rmsprop", 0.02, 0.1)
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert abs(got[0] - run("rmsprop_tf", 0.02, 0.1)[0]) > 0.02


def test_adam_is_algorithm_1_of_its_paper():
    p, m, v, expected = 1.0, 0.0, 0.0, []
    for t, g in enumerate(GRADIENTS, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        p -= 0.02 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-5)
        expected.append(p)
    np.testing.assert_allclose(run("adam", 0.02, 1e-5), expected, rtol=1e-9)


def network(seed: int) -> nn.Sequential:
    """Odd sizes, and one convolution in channels-last order, as the library's torsos have it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(7, 10_007), nn.Linear(13, 11))
    weight = net[0].weight
    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return net


def descend(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[Tensor]:
    for step in steps:
        for place, parameter in enumerate(net.parameters()):
            noise = np.random.default_rng((step, place)).normal(size=parameter.shape).astype(np.float32)
            parameter.grad = torch.empty_like(parameter).copy_(torch.from_numpy(noise))
        optimizer.step()
    return [parameter.detach().clone() for parameter in net.parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_optimizer_gives_the_same_bits(kind: OptimizerKind):
    net = network(0)
    optimizer = make_optimizer(kind, net.parameters(), 0.01, 1e-5)
    descend(net, optimizer, range(3))
    saved_net, saved_state = copy.deepcopy(net), copy.deepcopy(optimizer.state_dict())
    uninterrupted = descend(net, optimizer, range(3, 6))
    resumed_optimizer = make_optimizer(kind, saved_net.parameters(), 0.01, 1e-5)
    resumed_optimizer.load_state_dict(saved_state)
    resumed = descend(saved_net, resumed_optimizer, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(uninterrupted, resumed, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_math_threads_does_not_change_a_bit(kind: OptimizerKind):
    threads = torch.get_num_threads()
    found: list[list[Tensor]] = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            net = network(0)
            found.append(descend(net, make_optimizer(kind, net.parameters(), 0.01, 1e-5), range(3)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_size_is_read_from_the_group(kind: OptimizerKind):
    net = network(0)
    optimizer = make_optimizer(kind, net.parameters(), 0.01, 1e-5)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    optimizer.param_groups[0]["lr"] = 0.0
    after = descend(net, optimizer, range(2))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_rmsprop_tf_leaves_parameters_without_a_gradient_alone_and_runs_a_closure():
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = RMSpropTF([used, unused], lr=0.1, eps=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 3.0
    assert (used < 1).all()
    assert torch.equal(unused, torch.ones(2))
    assert unused not in optimizer.state


def test_no_rule_imports_the_compiler() -> None:
    """It takes a second, in which a run could have begun."""
    program = """
import sys
import torch
from slipstream.optimizers import make_optimizer

for kind in ("adam", "rmsprop", "rmsprop_tf"):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer(kind, [parameter], 0.1, 1e-5)
    parameter.grad = torch.ones(3)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert (parameter < 1).all()
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_rules_are_pytorchs_own() -> None:
    parameter = nn.Parameter(torch.ones(3))
    assert isinstance(make_optimizer("adam", [parameter], 0.1, 1e-5), torch.optim.Adam)
    assert isinstance(make_optimizer("rmsprop", [parameter], 0.1, 1e-5), torch.optim.RMSprop)
