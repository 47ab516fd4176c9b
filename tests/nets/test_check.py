from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from slipstream.nets.actor_critic import ActorCritic, make_actor_critic
from slipstream.nets.check import check_policy, check_torso
from slipstream.nets.policy import Outputs
from slipstream.nets.trunk import Network
from slipstream.tree import Tree
from slipstream.types import Act, EnvSpec

VECTOR = spaces.Box(-1, 1, (4,), np.float32)
SPEC = EnvSpec("test", VECTOR, spaces.Discrete(3), 2)


class Torso(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, obs: Tensor) -> Any:
        return self.function(obs)


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda x: x.sum(1), "got float32 [3]"),
        (lambda x: x.long(), "got int64 [3, 4]"),
        (lambda x: (x, x), "got (float32 [3, 4], float32 [3, 4])"),
        (lambda x: x.T, "got float32 [4, 3]"),
        (lambda x: x[:, :0], "got float32 [3, 0]"),
        (lambda x: x[:3], "with N=5, got float32 [3, 4]"),
        (lambda x: None, "got NoneType"),
        (lambda x: x @ torch.zeros(5, 2), "but it raised RuntimeError("),
        (lambda x: x["image"], "but it raised IndexError("),
    ],
)
def test_a_torso_of_the_wrong_shape_is_told_what_came_out(function: Callable[[Tensor], Any], got: str):
    with pytest.raises(
        ValueError, match=r"torso Torso: expected float features \[N, F\] from float32 \[\d, 4\]"
    ) as error:
        make_actor_critic(SPEC, Network(), Torso(function))
    assert got in str(error.value)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Dropout(), "torso Sequential: a forward draws from PyTorch's global generator, as nn.Dropout does"),
        (nn.BatchNorm1d(4), "torso Sequential: a forward changes its buffer '1.running_mean', as batch normalisation"),
    ],
)
def test_a_torso_that_draws_or_remembers_is_refused(layer: nn.Module, message: str):
    torso = nn.Sequential(nn.Linear(4, 4), layer)
    generator, before = torch.get_rng_state(), {key: value.clone() for key, value in torso.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        check_torso(torso, VECTOR)
    assert torch.equal(torch.get_rng_state(), generator)
    assert check_torso(torso.eval(), VECTOR) == 4
    assert all(torch.equal(value, before[key]) for key, value in torso.state_dict().items() if "running" in key)


def test_a_policy_that_draws_is_refused():
    with pytest.raises(ValueError, match=r"policy Whole: a forward draws from PyTorch's global generator"):
        check_policy(Whole(change=lambda act: act._replace(log_prob=act.log_prob + torch.rand(()))), SPEC)


def test_a_good_torso_tells_its_features():
    assert check_torso(Torso(lambda x: torch.cat([x, x], 1)), VECTOR) == 8


class Whole(nn.Module):
    """A user's whole policy, good unless one of its answers is replaced."""

    dice_width = 1
    recurrent = False

    def __init__(
        self, change: Callable[[Act], Act] | None = None, value: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.inner: ActorCritic = make_actor_critic(SPEC, Network())
        self.change, self.change_value = change, value

    def initial_state(self, batch: int) -> Tree:
        return ()

    def act(self, obs: Tree, state: Tree, dice: Tensor, greedy: bool = False, slot: Tensor | None = None) -> Act:
        act = self.inner.act(obs, state, dice, greedy)
        return self.change(act) if self.change else act

    def unroll(self, obs: Tree, state0: Tree, first: Tensor | None) -> Outputs:
        outputs = self.inner.unroll(obs, state0, first)
        return outputs._replace(value=self.change_value(outputs.value)) if self.change_value else outputs

    def observe(self, obs: Tree, valid: Tensor) -> None:
        self.inner.observe(obs, valid)


@pytest.mark.parametrize("core", ["none", "lstm", "gru"])
@pytest.mark.parametrize("action", [spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.Box(-1, 1, (2, 3))])
def test_our_own_policies_pass(core: str, action: spaces.Space[object]):
    spec = EnvSpec("test", VECTOR, action, 2)
    for share in (True, False):
        check_policy(make_actor_critic(spec, Network(core=core, core_size=7, share_torso=share)), spec)  # type: ignore[arg-type]


def test_a_good_whole_policy_passes():
    check_policy(Whole(), SPEC)


@pytest.mark.parametrize("member", ["dice_width", "recurrent", "initial_state", "act", "unroll"])
def test_a_missing_member_is_named(member: str):
    policy = Whole()
    object.__setattr__(policy, member, None)
    with pytest.raises(ValueError, match=rf"policy Whole: expected .*named '{member}'"):
        check_policy(policy, SPEC)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a._replace(action=a.action.float()), "Whole.act, action: expected int64 [5], got float32 [5]"),
        (lambda a: a._replace(action=a.action.unsqueeze(1)), "Whole.act, action: expected int64 [5], got int64 [5, 1]"),
        (lambda a: a._replace(log_prob=a.log_prob.double()), "log_prob: expected float32 [5], got float64 [5]"),
        (lambda a: a._replace(extras={}), "extras['value']: expected float32 [5], got NoneType"),
        (
            lambda a: a._replace(extras=a.extras | {"more": a.log_prob.bfloat16()}),
            "Whole.act, extras['more']: expected a tensor of a dtype that NumPy has, got bfloat16 [5]",
        ),
        (lambda a: a._replace(state=(a.log_prob,)), "act returned state (float32 [5]), expected ()"),
        (lambda a: a.action, "act must return slipstream.types.Act, got int64 [5]"),
    ],
)
def test_a_wrong_answer_of_act_is_described(change: Callable[[Act], Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_policy(Whole(change=change), SPEC)


def test_a_wrong_answer_of_unroll_is_described():
    with pytest.raises(
        ValueError, match=re.escape("unroll of [3, 5], value: expected float32 [3, 5], got float32 [3, 5, 1]")
    ):
        check_policy(Whole(value=lambda value: value.unsqueeze(-1)), SPEC)


def test_a_state_must_agree_with_recurrent():
    policy = Whole()
    policy.recurrent = True
    with pytest.raises(ValueError, match="recurrent=True, but initial_state has 0 leaves"):
        check_policy(policy, SPEC)


def test_a_class_in_place_of_a_network_is_named():
    with pytest.raises(
        ValueError, match=re.escape("policy: expected a network, got the class Whole; make one: Whole(")
    ):
        check_policy(Whole, SPEC)
    with pytest.raises(
        ValueError, match=re.escape("torso: expected a network, got the class Linear; make one: Linear(")
    ):
        check_torso(nn.Linear, SPEC.observation_space)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=re.escape("torso: expected a torch.nn.Module, got function")):
        check_torso(lambda obs: obs, SPEC.observation_space)  # pyright: ignore[reportArgumentType]
