from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import Space, spaces
from torch import nn

from slipstream import dice
from slipstream.nets.actor_critic import ActorCritic, make_actor_critic
from slipstream.nets.small import Acts, SmallActor, acting
from slipstream.nets.torso import Torso
from slipstream.nets.trunk import Network
from slipstream.types import EnvSpec

SLOTS, FEATURES, ACTIONS = 5, 3, 4
CPU = torch.device("cpu")
VECTOR, CHOICE = spaces.Box(-1.0, 1.0, (FEATURES,)), spaces.Discrete(ACTIONS)


def actor(
    network: Network, obs: Space[Any] = VECTOR, actions: Space[Any] = CHOICE, remember: bool = False
) -> ActorCritic:
    policy = make_actor_critic(EnvSpec("made-up-v1", obs, actions, num_envs=SLOTS), network, remember=remember)
    with torch.no_grad():
        for parameter in policy.parameters():  # far from uniform, and with biases
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return policy


def small(policy: ActorCritic) -> SmallActor:
    found = acting(policy, SLOTS, CPU)
    assert isinstance(found, SmallActor)
    return found


def acts_itself(policy: ActorCritic, slots: int = SLOTS, device: torch.device = CPU) -> bool:
    return acting(policy, slots, device) is policy


def rows(count: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    obs = list(torch.randn(count, SLOTS, FEATURES, generator=generator))
    return obs, list(torch.from_numpy(dice.uniform(dice.keys(1, "act", range(SLOTS)), 0, count, 1)))


def assert_acts_alike(quick: Acts, policy: ActorCritic, greedy: bool = False) -> None:
    equal, chosen = 0, set[int]()
    for obs, uniform in zip(*rows(50), strict=True):
        wanted, got = (one.act(obs, (), uniform, greedy) for one in (policy, quick))
        same = got.action == wanted.action
        equal += int(same.sum())
        chosen |= set(got.action.tolist())
        assert got.action.dtype == wanted.action.dtype
        torch.testing.assert_close(got.log_prob[same], wanted.log_prob[same], rtol=1e-5, atol=1e-5)
        assert got.extras.keys() == wanted.extras.keys()
        for name, value in wanted.extras.items():
            torch.testing.assert_close(got.extras[name], value, rtol=1e-5, atol=1e-5)
    assert equal >= 249, "a number falls between two roundings once in a long while"
    assert greedy or len(chosen) >= 2


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("hidden", [(8,), (8, 6), (4, 4, 4)])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("remember", [True, False])
def test_it_acts_as_the_policy_does(activation: Any, hidden: tuple[int, ...], share: bool, remember: bool) -> None:
    network = Network(hidden=hidden, activation=activation, share_torso=share, init="default")
    policy = actor(network, remember=remember)
    for greedy in (False, True):
        assert_acts_alike(small(policy), policy, greedy)


def test_it_follows_what_is_copied_into_the_policy() -> None:
    policy, other = actor(Network(share_torso=False)), actor(Network(share_torso=False, init="paac"))
    quick = small(policy)
    policy.load_state_dict(other.state_dict())
    assert_acts_alike(quick, other)


def test_a_policy_that_acts_in_a_way_of_its_own_does() -> None:
    class Own(ActorCritic):
        pass

    assert acts_itself(Own(EnvSpec("made-up-v1", VECTOR, CHOICE, num_envs=SLOTS), Network()))


def test_a_copy_of_a_policy_has_its_own() -> None:
    policy = actor(Network())
    replica = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
    assert_acts_alike(small(replica), replica)


@pytest.mark.parametrize(
    ("network", "obs", "actions"),
    [
        (Network(core="gru", core_size=4), VECTOR, CHOICE),
        (Network(normalize_obs=True), VECTOR, CHOICE),
        (Network(latent=4), VECTOR, CHOICE),
        (Network(precision="bfloat16"), VECTOR, CHOICE),
        (Network(hidden=(64, 1000)), VECTOR, CHOICE),
        (Network(), VECTOR, spaces.Box(-1.0, 1.0, (2,))),
        (Network(), VECTOR, spaces.MultiDiscrete([2, 2])),
        (Network(), spaces.Discrete(3), CHOICE),
        (Network(), spaces.Box(0, 255, (FEATURES,), np.uint8), CHOICE),
        (Network(), spaces.Box(-1.0, 1.0, (2, 2)), CHOICE),
        (Network(), spaces.Box(0, 255, (4, 40, 40), np.uint8), CHOICE),
        (Network(), spaces.Dict({"a": VECTOR, "action_mask": spaces.MultiBinary(ACTIONS)}), CHOICE),
    ],
)
def test_others_act_themselves(network: Network, obs: Space[Any], actions: Space[Any]) -> None:
    assert acts_itself(make_actor_critic(EnvSpec("made-up-v1", obs, actions, num_envs=SLOTS), network))


def test_so_do_those_on_a_device_and_for_many_slots() -> None:
    assert acts_itself(actor(Network()), device=torch.device("meta"))
    policy = actor(Network(hidden=(64, 64)))
    assert not acts_itself(policy, 64)
    assert acts_itself(policy, 65)


def test_so_do_those_with_something_of_their_own() -> None:
    """Torsos, layers, hooks: what a `SmallActor` would pass over in silence."""

    class Far(Torso):
        def forward(self, obs: Any) -> torch.Tensor:
            return super().forward(obs * 100)

    spec = EnvSpec("made-up-v1", VECTOR, CHOICE, num_envs=SLOTS)
    assert acts_itself(make_actor_critic(spec, Network(), Far(VECTOR)))
    assert acts_itself(make_actor_critic(spec, Network(), nn.Linear(FEATURES, 8)))
    other, mixed, hooked, normed = (actor(Network()) for _ in range(4))
    for policy, layers in ((other, {1: nn.ELU(), 3: nn.ELU()}), (mixed, {1: nn.ReLU()})):
        network = policy.trunk.perceptron
        assert network is not None
        for place, layer in layers.items():
            network[place] = layer
        assert acts_itself(policy)
    hooked.value_head.register_forward_hook(lambda *given: None)
    assert acts_itself(hooked)
    nn.utils.parametrizations.weight_norm(normed.policy_head)
    assert acts_itself(normed)
