from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from slipstream.nets.actor_critic import ActorCritic, make_actor_critic
from slipstream.nets.initialize import Init, initialise, keyed_initialisation
from slipstream.nets.trunk import Network
from slipstream.types import EnvSpec

IMAGES = EnvSpec("images", spaces.Box(0, 255, (4, 36, 36), np.uint8), spaces.Discrete(6), 4)
INITS: list[Init] = ["orthogonal", "paac", "default"]


def policy(init: Init = "orthogonal", seed: int = 0) -> ActorCritic:
    return make_actor_critic(IMAGES, Network(init=init, core="lstm", core_size=16, share_torso=False), seed=seed)


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("init", INITS)
def test_weights_are_a_function_of_the_seed_alone(init: Init):
    torch.manual_seed(1)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    one = policy(init)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    torch.manual_seed(2)
    assert same(one, policy(init))
    assert not same(one, policy(init, seed=1))


@pytest.mark.parametrize("init", INITS)
def test_weights_do_not_depend_on_the_number_of_math_threads(init: Init):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = policy(init)
        torch.set_num_threads(3)
        assert same(one, policy(init))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_the_generator_is_restored_after_an_error():
    state, threads = torch.get_rng_state(), torch.get_num_threads()

    def fail() -> None:
        with keyed_initialisation(0, "test"):
            torch.rand(3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_generators_of_gpus_are_left_alone(monkeypatch: pytest.MonkeyPatch):
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.manual_seed(1)
    assert seeded == [1]  # what is replaced here is what torch calls
    with keyed_initialisation(0, "test"):
        torch.rand(3)
    assert seeded == [1]


def gram(weight: Tensor) -> Tensor:
    matrix = weight.detach().flatten(1)
    return matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix


def test_orthogonal_weights_have_the_gains_of_the_field():
    net = policy("orthogonal")
    layers = [layer for layer in net.trunk.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len(layers) == 4
    for layer, gain in [*((layer, math.sqrt(2)) for layer in layers), (net.policy_head, 0.01), (net.value_head, 1.0)]:
        product = gram(layer.weight)
        torch.testing.assert_close(product, gain**2 * torch.eye(len(product)), rtol=0, atol=gain**2 * 1e-4)
        assert (layer.bias == 0).all()
    assert net.trunk.core is not None
    for name, parameter in net.trunk.core.named_parameters():
        if "weight" in name:
            torch.testing.assert_close(gram(parameter), torch.eye(len(gram(parameter))), rtol=0, atol=1e-4)
        else:
            assert (parameter == 0).all()


def test_paac_weights_fill_the_interval_of_one_over_the_root_of_the_fan_in():
    net = policy("paac")
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    for layer in layers:
        bound = 1 / math.sqrt(layer.weight[0].numel())
        values = torch.cat([layer.weight.detach().flatten(), layer.bias.detach()])
        assert 0.9 * bound < values.abs().max() <= bound or len(values) < 50
        assert values.abs().max() <= bound
        if len(values) > 1000:
            assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
            assert abs(values.mean().item()) < 0.05 * bound


def test_default_leaves_what_torch_drew():
    layer = nn.Linear(5, 3)
    before = layer.weight.clone()
    initialise(layer, "default")
    assert torch.equal(layer.weight, before)
    initialise(layer, "orthogonal")
    assert not torch.equal(layer.weight, before)


def test_both_trunks_start_differently():
    net = policy()
    assert net.value_trunk is not None
    assert not same(net.trunk, net.value_trunk)


def test_channels_last_order_survives_initialisation():
    for init in INITS:
        weights = [p for p in policy(init).parameters() if p.dim() == 4]
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
