from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from slipstream import dice
from slipstream.nets.initialize import keyed_initialisation
from slipstream.nets.noisy import NoisyLinear

INPUTS, OUTPUTS = 7, 5


def layer(inputs: int = INPUTS, outputs: int = OUTPUTS, sigma0: float = 0.5) -> NoisyLinear:
    with keyed_initialisation(0, "test"):
        return NoisyLinear(inputs, outputs, sigma0)


def uniforms(width: int, row: int = 0) -> Tensor:
    return torch.from_numpy(dice.uniform(dice.keys(0, "noise", [0]), row, 1, width)[0, 0])


def rows(*leading: int) -> Tensor:
    return torch.randn(*leading, INPUTS, generator=torch.Generator().manual_seed(0))


def explicit(net: NoisyLinear, x: Tensor) -> Tensor:
    """The layer with all of its weights written down, output by output."""
    y = torch.empty(*x.shape[:-1], OUTPUTS)
    for j in range(OUTPUTS):
        total = net.bias[j] + net.bias_sigma[j] * net.noise_out[j]
        for i in range(INPUTS):
            total = total + (net.weight[j, i] + net.weight_sigma[j, i] * net.noise_out[j] * net.noise_in[i]) * x[..., i]
        y[..., j] = total
    return y


@pytest.mark.parametrize("leading", [(3,), (2, 3)])
def test_it_is_the_linear_layer_with_perturbed_weights(leading: tuple[int, ...]):
    net, x = layer(), rows(*leading)
    net.weight_sigma.data.mul_(torch.linspace(-1, 3, OUTPUTS * INPUTS).view(OUTPUTS, INPUTS))
    net.bias_sigma.data.mul_(torch.linspace(2, -1, OUTPUTS))
    net.renoise(uniforms(net.noise_width))
    torch.testing.assert_close(net(x), explicit(net, x))
    weigh = torch.linspace(-1, 1, OUTPUTS)
    parameters = list(net.parameters())
    mine = torch.autograd.grad((net(x) * weigh).square().sum(), parameters)
    its = torch.autograd.grad((explicit(net, x) * weigh).square().sum(), parameters)
    assert len(mine) == 4
    for gradient, expected in zip(mine, its, strict=True):
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_the_mean_has_no_noise_and_neither_has_a_new_layer():
    net, x = layer(), rows(3)
    plain = torch.nn.functional.linear(x, net.weight, net.bias)
    assert torch.equal(net(x), plain)
    net.renoise(uniforms(net.noise_width))
    assert torch.equal(net(x, mean=True), plain)
    assert not torch.isclose(net(x), plain).any()


def test_the_noise_is_a_function_of_the_dice_alone():
    net, other = layer(), layer()
    u, later = uniforms(net.noise_width), uniforms(net.noise_width, 1)
    assert net.noise_width == INPUTS + OUTPUTS
    net.renoise(u)
    other.renoise(later)
    assert not torch.isclose(net.noise_in, other.noise_in).any()
    assert not torch.isclose(net.noise_out, other.noise_out).any()
    other.renoise(u)
    assert torch.equal(net.noise_in, other.noise_in)
    assert torch.equal(net.noise_out, other.noise_out)
    noise = torch.cat([net.noise_in, net.noise_out]).double()
    xi = noise.sign() * noise.square()
    torch.testing.assert_close(torch.special.ndtr(xi), u.double(), rtol=0, atol=1e-6)


def test_both_ends_of_the_dice_are_finite_and_as_far_from_the_middle():
    net = layer(1, 1)
    net.renoise(torch.tensor([0.0, 1.0 - 2.0**-23]))
    assert net.noise_in.item() == pytest.approx(-math.sqrt(5.3), rel=0.01)
    assert net.noise_out.item() == pytest.approx(math.sqrt(5.3), rel=0.01)


def test_the_noise_has_the_moments_of_the_paper():
    """E f(xi) = 0 and E f(xi)^2 = E |xi| = sqrt(2 / pi)."""
    net = layer(1, 99991)
    net.renoise(uniforms(net.noise_width))
    assert net.noise_out.mean().item() == pytest.approx(0, abs=0.02)
    assert net.noise_out.square().mean().item() == pytest.approx(math.sqrt(2 / math.pi), rel=0.02)


def test_weights_start_as_in_the_paper():
    net = layer(101, 103, sigma0=0.3)
    bound = 1 / math.sqrt(101)
    for parameter in (net.weight, net.bias):
        assert 0.95 * bound < parameter.abs().max() <= bound
        assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)
    for parameter in (net.weight_sigma, net.bias_sigma):
        np.testing.assert_allclose(parameter.detach().numpy(), 0.3 * bound, rtol=1e-6)
    assert torch.equal(net.weight, layer(101, 103).weight)


def test_the_noise_travels_with_the_state():
    net, other, x = layer(), layer(), rows(3)
    net.renoise(uniforms(net.noise_width))
    assert not torch.equal(other(x), net(x))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x))
