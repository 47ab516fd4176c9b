from __future__ import annotations

import copy
from typing import Literal

import numpy as np
import pytest
import torch
from gymnasium import Space, spaces
from torch import Tensor, nn

from slipstream import dice, tree
from slipstream.nets.actor_critic import ActorCritic, make_actor_critic
from slipstream.nets.trunk import Network, Precision, packed
from slipstream.tree import Tree
from slipstream.types import EnvSpec
from slipstream.weights import copy_into

T, B = 7, 3
VECTOR = spaces.Box(-np.inf, np.inf, (4,), np.float32)
IMAGE = spaces.Box(0, 255, (1, 36, 40), np.uint8)
MASKED = spaces.Dict({"action_mask": spaces.MultiBinary(5), "features": VECTOR})
DISCRETE, CHOICES, BOX = spaces.Discrete(5), spaces.MultiDiscrete([2, 3]), spaces.Box(-1, 1, (2, 3))
Memory = Literal["none", "lstm", "gru"]


def spec(obs: Space[object] = VECTOR, action: Space[object] = DISCRETE) -> EnvSpec:
    return EnvSpec("test", obs, action, B)


def observations(space: Space[object], *leading: int) -> Tree:
    generator = np.random.default_rng(0)
    if isinstance(space, spaces.Dict):
        mask = torch.from_numpy(generator.random((*leading, 5)) < 0.5)
        mask[..., 2] = True
        return {"action_mask": mask.to(torch.int8), "features": observations(VECTOR, *leading)}
    if space is IMAGE:
        return torch.from_numpy(generator.integers(0, 256, (*leading, 1, 36, 40), np.uint8))
    return torch.from_numpy(generator.normal(size=(*leading, 4)).astype(np.float32))


def uniforms(policy: ActorCritic, rows: int) -> Tensor:
    return torch.from_numpy(dice.uniform(dice.keys(0, "act", range(B)), 0, rows, policy.dice_width))


def play(policy: ActorCritic, obs: Tree, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Actions, log-probabilities and values of acting row by row, as a collector does."""
    state, u = policy.initial_state(B), uniforms(policy, T)
    actions: list[Tensor] = []
    log_probs: list[Tensor] = []
    values: list[Tensor] = []
    for t in range(T):
        alive = (~first[t]).unsqueeze(1)
        state = tree.map(lambda part, alive=alive: part * alive, state)
        act = policy.act(tree.map(lambda leaf, t=t: leaf[t], obs), state, u[t])
        state = act.state
        actions.append(act.action)
        log_probs.append(act.log_prob)
        values.append(act.extras["value"])
    return torch.stack(actions), torch.stack(log_probs), torch.stack(values)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("core", ["none", "lstm", "gru"])
@pytest.mark.parametrize(
    ("obs_space", "action_space"),
    [(VECTOR, BOX), (VECTOR, CHOICES), (MASKED, DISCRETE), (MASKED, CHOICES), (IMAGE, DISCRETE)],
)
def test_unrolling_sees_what_acting_saw(
    obs_space: Space[object], action_space: Space[object], core: Memory, share: bool
):
    policy = make_actor_critic(spec(obs_space, action_space), Network(core=core, core_size=8, share_torso=share))
    obs, first = observations(obs_space, T, B), torch.zeros(T, B, dtype=torch.bool)
    first[0], first[3, 1], first[5, 0] = True, True, True
    action, log_prob, value = play(policy, obs, first)
    outputs = policy.unroll(obs, policy.initial_state(B), first)
    torch.testing.assert_close(outputs.distribution.log_prob(action), log_prob)
    torch.testing.assert_close(outputs.value, value)
    assert action.shape == (T, B, *(action_space.shape or ()))
    assert outputs.distribution.entropy().shape == outputs.value.shape == (T, B)
    assert log_prob.dtype == value.dtype == torch.float32


def test_rows_and_flat_samples_give_the_same_numbers():
    policy = make_actor_critic(spec(IMAGE), Network())
    obs = observations(IMAGE, T, B)
    rows, flat = policy.unroll(obs), policy.unroll(obs.flatten(0, 1))
    assert torch.equal(rows.value.flatten(), flat.value)
    assert torch.equal(rows.distribution.entropy().flatten(), flat.distribution.entropy())


def test_the_dice_decide_the_action_and_nothing_else_does():
    policy = make_actor_critic(spec(action=BOX), Network(log_std_init=-0.5))
    obs, u = observations(VECTOR, B), uniforms(policy, 1)[0]
    torch.manual_seed(0)
    one = policy.act(obs, (), u)
    torch.manual_seed(1)
    assert torch.equal(policy.act(obs, (), u).action, one.action)
    assert not torch.isclose(policy.act(obs, (), u.roll(1, 0)).action, one.action).any()
    greedy = policy.act(obs, (), u, greedy=True)
    assert torch.equal(greedy.action, policy.unroll(obs).distribution.mode())
    assert (greedy.log_prob > one.log_prob).all()
    noise = (one.action - greedy.action).flatten(1) / np.exp(-0.5)
    torch.testing.assert_close(torch.special.ndtr(noise.double()).float(), u, rtol=0, atol=1e-4)


def test_masked_actions_are_never_taken():
    policy = make_actor_critic(spec(MASKED), Network(init="default"))
    obs = observations(MASKED, 997)
    for u in (torch.zeros(997, 1), torch.full((997, 1), 1 - 2.0**-23), torch.rand(997, 1)):
        for greedy in (True, False):
            action = policy.act(obs, (), u, greedy).action
            assert obs["action_mask"][torch.arange(997), action].all()


def test_acting_has_no_gradient_and_learning_has():
    policy = make_actor_critic(spec(), Network())
    obs = observations(VECTOR, B)
    assert not policy.act(obs, (), uniforms(policy, 1)[0]).log_prob.requires_grad
    outputs = policy.unroll(obs)
    loss = outputs.value.sum() + outputs.distribution.log_prob(torch.arange(B)).sum()
    assert all(g is not None and g.abs().sum() > 0 for g in torch.autograd.grad(loss, list(policy.parameters())))


def test_separate_trunks_share_nothing():
    policy = make_actor_critic(spec(action=BOX), Network(share_torso=False, core="gru", core_size=8))
    outputs = policy.unroll(observations(VECTOR, T, B), policy.initial_state(B), torch.zeros(T, B, dtype=torch.bool))
    policy.zero_grad()
    outputs.value.sum().backward()
    touched = {name.split(".")[0] for name, p in policy.named_parameters() if p.grad is not None}
    assert touched == {"value_trunk", "value_head"}


def test_the_gradient_of_the_entropy_bonus_raises_the_entropy_of_the_policy():
    for action in (DISCRETE, CHOICES, BOX):
        policy = make_actor_critic(spec(action=action), Network(init="default"))
        obs = observations(VECTOR, 13)
        optimizer = torch.optim.SGD(policy.parameters(), 0.05)
        entropies: list[float] = []
        for _ in range(4):
            entropy = policy.unroll(obs).distribution.entropy().mean()
            entropies.append(entropy.item())
            optimizer.zero_grad()
            (-entropy).backward()
            optimizer.step()
        assert entropies == sorted(entropies)
        assert entropies[-1] > entropies[0]


def test_normalisation_belongs_to_the_policy_and_moves_only_when_told():
    policy = make_actor_critic(spec(MASKED), Network(normalize_obs=True))
    plain = make_actor_critic(spec(MASKED), Network())
    obs = observations(MASKED, T, B)
    obs["features"] = obs["features"] * 50 + 3
    before = policy.unroll(obs).value
    assert torch.equal(policy.unroll(obs).value, before)
    valid = torch.ones(T, B, dtype=torch.bool)
    valid[1, 2] = valid[4, 0] = False
    policy.observe(obs, valid)
    rows = obs["features"][valid].double()
    scaled = ((obs["features"] - rows.mean(0)) / rows.var(0, unbiased=False).sqrt()).float()
    torch.testing.assert_close(policy.unroll(obs).value, plain.unroll(obs | {"features": scaled}).value)
    other = make_actor_critic(spec(MASKED), Network(normalize_obs=True), seed=5)
    other.load_state_dict(policy.state_dict())
    assert torch.equal(other.unroll(obs).value, policy.unroll(obs).value)
    plain.observe(obs, valid)


@pytest.mark.parametrize("core", ["none", "lstm"])
def test_bfloat16_is_the_torsos_alone(core: Memory):
    exact = make_actor_critic(spec(IMAGE), Network(init="default", core=core))
    policy = make_actor_critic(spec(IMAGE), Network(init="default", core=core, precision="bfloat16"))
    for mine, its in zip(policy.parameters(), exact.parameters(), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, its)
    obs, state, first = observations(IMAGE, 1, B), policy.initial_state(B), torch.zeros(1, B, dtype=torch.bool)
    outputs, reference = policy.unroll(obs, state, first), exact.unroll(obs, state, first)
    act = policy.act(obs[0], state, uniforms(policy, 1)[0])
    assert outputs.value.dtype == act.log_prob.dtype == act.extras["value"].dtype == torch.float32
    total = sum(outputs.distribution.log_prob(torch.full((1, B), action)).exp() for action in range(5))
    torch.testing.assert_close(total, torch.ones(1, B), rtol=0, atol=1e-6)
    assert not torch.equal(outputs.value, reference.value)
    torch.testing.assert_close(outputs.value, reference.value, rtol=0.05, atol=0.02)
    gradients = torch.autograd.grad(outputs.value.sum(), list(policy.trunk.parameters()))
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("share_torso", [True, False])
def test_a_packed_copy_follows_weights_and_says_the_same_bits(precision: Precision, share_torso: bool):
    policy = make_actor_critic(spec(IMAGE), Network(precision=precision, share_torso=share_torso))
    replica, newer = packed(policy), make_actor_critic(spec(IMAGE), Network(share_torso=share_torso), seed=1)
    casts = {parameter.dtype for parameter in replica.trunk.torso.parameters()}
    assert casts == {torch.bfloat16 if precision == "bfloat16" else torch.float32}
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    for one in (policy, newer):
        policy.load_state_dict(one.state_dict())
        copy_into(replica, policy.state_dict())
        shown = observations(IMAGE, B), (), uniforms(policy, 1)[0]
        said, repeated = (tree.leaves(tuple(each.act(*shown))) for each in (policy, replica))
        assert len(said) > 2
        assert all(map(torch.equal, said, repeated))


def test_a_users_own_torso_is_not_packed():
    own = nn.Sequential(nn.Flatten(), nn.Linear(4, 7))
    replica = packed(make_actor_critic(spec(), Network(precision="bfloat16"), own))
    assert {parameter.dtype for parameter in replica.parameters()} == {torch.float32}


def test_auto_is_not_a_precision_of_networks():
    with pytest.raises(ValueError, match=r"net\.precision=auto is for configurations"):
        make_actor_critic(spec(IMAGE), Network(precision="auto"))


def test_a_recurrent_policy_needs_to_know_where_episodes_start():
    policy = make_actor_critic(spec(), Network(core="lstm"))
    assert policy.recurrent
    with pytest.raises(ValueError, match="needs `first`"):
        policy.unroll(observations(VECTOR, T, B), policy.initial_state(B))
    assert not make_actor_critic(spec(), Network()).recurrent


@pytest.mark.parametrize("action", [spaces.Discrete(4), BOX])
def test_a_mask_that_does_not_fit_the_actions_is_refused(action: Space[object]):
    with pytest.raises(ValueError, match=r"'action_mask' has 5 entries; the action space"):
        make_actor_critic(spec(MASKED, action), Network())


class Halves(nn.Module):
    """A user's torso: two features."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        nn.init.constant_(self.linear.weight, 0.25)

    def forward(self, obs: Tensor) -> Tensor:
        return self.linear(obs)


def test_a_users_torso_keeps_its_weights_and_is_copied_for_the_value():
    torso = Halves()
    policy = make_actor_critic(spec(), Network(share_torso=False), torso)
    assert policy.policy_head.in_features == policy.value_head.in_features == 2
    assert policy.trunk.torso is torso
    assert (torso.linear.weight == 0.25).all()
    assert policy.value_trunk is not None
    assert isinstance(policy.value_trunk.torso, Halves)
    assert policy.value_trunk.torso is not torso
    assert policy.unroll(observations(VECTOR, T, B)).value.shape == (T, B)


def test_a_policy_can_be_copied_and_its_state_loaded():
    policy = make_actor_critic(spec(IMAGE), Network())
    other = make_actor_critic(spec(IMAGE), Network(), seed=1)
    obs = observations(IMAGE, B)
    other.load_state_dict(policy.state_dict())
    for clone in (other, copy.deepcopy(policy)):
        assert torch.equal(clone.unroll(obs).value, policy.unroll(obs).value)
