from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import Space, spaces

from slipstream import dice
from slipstream.nets.actor_critic import ActorCritic, make_actor_critic
from slipstream.nets.small import SmallActor, small_actor
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
    found = small_actor(policy, SLOTS, CPU)
    assert found is not None
    return found


def rows(count: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    obs = list(torch.randn(count, SLOTS, FEATURES, generator=generator))
    return obs, list(torch.from_numpy(dice.uniform(dice.keys(1, "act", range(SLOTS)), 0, count, 1)))


def assert_acts_alike(quick: SmallActor, policy: ActorCritic) -> None:
    equal, chosen = 0, set[int]()
    for obs, uniform in zip(*rows(50), strict=True):
        wanted, got = policy.act(obs, (), uniform), quick.act(obs.numpy(), uniform.numpy())
        same = got.action == wanted.action
        equal += int(same.sum())
        chosen |= set(got.action.tolist())
        assert got.action.dtype == wanted.action.dtype
        torch.testing.assert_close(got.log_prob[same], wanted.log_prob[same], rtol=1e-5, atol=1e-5)
        assert got.extras.keys() == wanted.extras.keys()
        for name, value in wanted.extras.items():
            torch.testing.assert_close(got.extras[name], value, rtol=1e-5, atol=1e-5)
    assert equal >= 249, "a number falls between two roundings once in a long while"
    assert len(chosen) >= 3


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("hidden", [(8,), (8, 6), (4, 4, 4)])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("remember", [True, False])
def test_it_acts_as_the_policy_does(activation: Any, hidden: tuple[int, ...], share: bool, remember: bool) -> None:
    network = Network(hidden=hidden, activation=activation, share_torso=share, init="default")
    policy = actor(network, remember=remember)
    assert_acts_alike(small(policy), policy)


def test_it_follows_what_is_copied_into_the_policy() -> None:
    policy, other = actor(Network(share_torso=False)), actor(Network(share_torso=False, init="paac"))
    quick = small(policy)
    policy.load_state_dict(other.state_dict())
    assert_acts_alike(quick, other)


def test_a_policy_that_acts_in_a_way_of_its_own_does() -> None:
    class Own(ActorCritic):
        pass

    assert small_actor(Own(EnvSpec("made-up-v1", VECTOR, CHOICE, num_envs=SLOTS), Network()), SLOTS, CPU) is None


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
    policy = make_actor_critic(EnvSpec("made-up-v1", obs, actions, num_envs=SLOTS), network)
    assert small_actor(policy, SLOTS, CPU) is None


def test_so_do_those_on_a_device_with_a_torso_of_their_own_or_for_many_slots() -> None:
    spec = EnvSpec("made-up-v1", VECTOR, CHOICE, num_envs=SLOTS)
    assert small_actor(make_actor_critic(spec, Network()), SLOTS, torch.device("meta")) is None
    assert small_actor(make_actor_critic(spec, Network(), torch.nn.Linear(FEATURES, 8)), SLOTS, CPU) is None
    policy = make_actor_critic(spec, Network(hidden=(64, 64)))
    assert small_actor(policy, 64, CPU) is not None
    assert small_actor(policy, 65, CPU) is None
