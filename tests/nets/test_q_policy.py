from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from gymnasium import Space, spaces
from torch import Tensor, nn

from slipstream import dice, tree
from slipstream.nets.noisy import NoisyLinear
from slipstream.nets.q_policy import QHeads, QPolicy, make_q_policy
from slipstream.nets.trunk import Network, Precision, packed
from slipstream.tree import Tree
from slipstream.types import EnvSpec
from slipstream.weights import copy_into

T, B, A = 7, 3, 5
MANY = 9001
VECTOR = spaces.Box(-np.inf, np.inf, (4,), np.float32)
IMAGE = spaces.Box(0, 255, (1, 36, 40), np.uint8)
MIXED = spaces.Dict({"image": IMAGE, "vector": VECTOR})
MASKED = spaces.Dict({"action_mask": spaces.MultiBinary(A), "features": VECTOR})
DISCRETE = spaces.Discrete(A)
Memory = Literal["none", "lstm", "gru"]

VALUE, CATEGORICAL = QHeads(), QHeads("categorical", 11, low=-3.0, high=7.0)
QUANTILE = QHeads("quantile", 13)
DUELING = QHeads(dueling=True)
RAINBOW = QHeads("categorical", 11, low=-3.0, high=7.0, dueling=True, noisy=True)
ALL = [VALUE, CATEGORICAL, QUANTILE, DUELING, QHeads(noisy=True), QHeads("quantile", 13, dueling=True), RAINBOW]


def make(
    obs: Space[Any] = VECTOR, heads: QHeads = VALUE, seed: int = 0, evaluation_epsilon: float = 0.001, **network: Any
) -> QPolicy:
    spec = EnvSpec("test", obs, DISCRETE, B)
    return make_q_policy(spec, Network(**network), None, seed, heads, evaluation_epsilon)


def observations(space: Space[Any], *leading: int) -> Tree:
    generator = np.random.default_rng(0)
    if space is MASKED:
        mask = torch.from_numpy(generator.random((*leading, A)) < 0.5)
        mask[..., 2] = True
        return {"action_mask": mask.to(torch.int8), "features": observations(VECTOR, *leading)}
    if space is MIXED:
        return {"image": observations(IMAGE, *leading), "vector": observations(VECTOR, *leading)}
    if space is IMAGE:
        return torch.from_numpy(generator.integers(0, 256, (*leading, 1, 36, 40), np.uint8))
    return torch.from_numpy(generator.normal(size=(*leading, 4)).astype(np.float32))


def uniforms(rows: int, width: int = 2, row: int = 0) -> Tensor:
    return torch.from_numpy(dice.uniform(dice.keys(0, "act", range(rows)), row, 1, width)[0])


def noise(policy: QPolicy, row: int = 0) -> Tensor:
    return uniforms(1, policy.noise_width, row)[0]


def slots(rows: int) -> Tensor:
    return torch.arange(rows) % B


@pytest.mark.parametrize("space", [VECTOR, IMAGE, MIXED, MASKED])
@pytest.mark.parametrize("heads", ALL)
def test_rows_and_flat_samples_give_the_same_numbers(space: Space[Any], heads: QHeads):
    policy, obs = make(space, heads), observations(space, T, B)
    flat = tree.map(lambda leaf: leaf.flatten(0, 1), obs)
    rest = () if heads.distribution == "value" else (heads.outputs,)
    output = policy.unroll(obs)
    assert output.shape == (T, B, A, *rest)
    assert output.dtype == torch.float32
    assert policy.unroll(flat).shape == (T * B, A, *rest)
    torch.testing.assert_close(policy.unroll(flat), output.flatten(0, 1))
    q = policy.values(output, obs)
    assert q.shape == (T, B, A)
    torch.testing.assert_close(policy.values(policy.unroll(flat), flat), q.flatten(0, 1))
    assert policy.unroll_state(flat)[1] == ()
    assert not policy.recurrent


@pytest.mark.parametrize("core", ["none", "lstm", "gru"])
@pytest.mark.parametrize("heads", [VALUE, CATEGORICAL, RAINBOW])
def test_unrolling_sees_what_acting_saw(core: Memory, heads: QHeads):
    policy, obs = make(MASKED, heads, core=core, core_size=8), observations(MASKED, T, B)
    assert policy.recurrent == (core != "none")
    if policy.noise_width:
        policy.renoise(noise(policy))
        policy.renoise(noise(policy).expand(B, -1))
    policy.exploration.zero_()
    first = torch.zeros(T, B, dtype=torch.bool)
    first[0], first[3, 1], first[5, 0] = True, True, True
    state = policy.initial_state(B)
    taken: list[Tensor] = []
    for t in range(T):
        state = tree.map(lambda part, t=t: part * (~first[t]).unsqueeze(1), state)
        act = policy.act(tree.map(lambda leaf, t=t: leaf[t], obs), state, uniforms(B, row=t), slot=slots(B))
        state = act.state
        taken.append(act.action)
        assert torch.equal(act.log_prob, torch.zeros(B))
        assert not act.extras
    output, after = policy.unroll_state(obs, policy.initial_state(B), first)
    q = policy.values(output, obs)
    action = torch.stack(taken)
    assert action.dtype == torch.int64
    assert len(action.unique()) > 1
    assert torch.equal(q.argmax(-1), action)
    assert len(tree.leaves(after)) == len(tree.leaves(state)) == {"none": 0, "lstm": 2, "gru": 1}[core]
    for mine, its in zip(tree.leaves(after), tree.leaves(state), strict=True):
        assert mine.shape == (B, 8)
        torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("core", ["lstm", "gru"])
def test_a_burn_in_hands_on_the_state_it_ends_in(core: Memory):
    policy, obs = make(heads=DUELING, core=core, core_size=8), observations(VECTOR, T, B)
    first = torch.zeros(T, B, dtype=torch.bool)
    first[1, 0], first[4, 2] = True, True
    whole = policy.unroll(obs, policy.initial_state(B), first)
    _, state = policy.unroll_state(obs[:3], policy.initial_state(B), first[:3])
    torch.testing.assert_close(policy.unroll(obs[3:], state, first[3:]), whole[3:])
    cold = policy.unroll(obs[3:], policy.initial_state(B), first[3:])
    assert not torch.isclose(cold, whole[3:]).all()


def test_a_recurrent_policy_needs_to_know_where_episodes_start():
    policy = make(core="lstm")
    with pytest.raises(ValueError, match="needs `first`"):
        policy.unroll(observations(VECTOR, T, B), policy.initial_state(B))


def test_categorical_values_are_means_over_the_atoms():
    policy, obs = make(heads=CATEGORICAL), observations(VECTOR, B)
    output = policy.unroll(obs)
    q = policy.values(output, obs)
    for n in range(B):
        for a in range(A):
            probability = [math.exp(x) for x in output[n, a].tolist()]
            assert sum(probability) == pytest.approx(1.0, rel=1e-5)
            expected = sum(p * (-3.0 + z) for z, p in enumerate(probability))
            assert q[n, a].item() == pytest.approx(expected, rel=1e-4)


def test_values_of_quantiles_are_their_mean():
    policy, obs = make(heads=QUANTILE), observations(VECTOR, B)
    output = policy.unroll(obs)
    np.testing.assert_allclose(policy.values(output, obs).detach(), output.detach().numpy().mean(-1), rtol=1e-5)


@pytest.mark.parametrize("heads", [DUELING, QHeads("quantile", 13, dueling=True), RAINBOW])
def test_dueling_advantages_count_only_against_their_mean(heads: QHeads):
    policy, obs = make(heads=heads), observations(VECTOR, B)
    before = policy.unroll(obs).detach()
    bias = policy.head.action_stream.output.bias.data.view(A, heads.outputs)
    bias += torch.linspace(-3, 5, heads.outputs)
    torch.testing.assert_close(policy.unroll(obs).detach(), before, rtol=1e-4, atol=1e-5)
    bias[1] += torch.linspace(-3, 5, heads.outputs) + 1
    assert not torch.isclose(policy.unroll(obs), before).all()


def test_the_mean_of_a_dueling_head_is_its_value():
    policy, obs = make(heads=DUELING), observations(VECTOR, B)
    assert policy.head.value_stream is not None
    value = policy.head.value_stream(policy.trunk(obs, (), None)[0], False).squeeze(-1)
    torch.testing.assert_close(policy.unroll(obs).mean(-1), value)
    policy.head.value_stream.output.bias.data += 2
    torch.testing.assert_close(policy.unroll(obs).mean(-1), value + 2)


@pytest.mark.parametrize("heads", [DUELING, QHeads(noisy=True)])
def test_streams_stand_in_for_the_last_layer_of_the_torso(heads: QHeads):
    """Convolutions 36x40 -> 8x9 -> 3x3 -> 1x1 of 64 channels, then 512."""
    hidden = make(IMAGE, heads).head.action_stream.hidden
    assert hidden is not None
    assert hidden.weight.shape == (512, 64)
    assert not [layer for layer in make(IMAGE, heads).trunk.modules() if isinstance(layer, nn.Linear)]
    policy = make(heads=heads, hidden=(11, 13))
    assert [tuple(p.shape) for p in policy.trunk.parameters()] == [(11, 4), (11,)]
    hidden, output = policy.head.action_stream.hidden, policy.head.action_stream.output
    assert hidden is not None
    assert (hidden.weight.shape, output.weight.shape) == ((13, 11), (A, 13))
    hidden = make(MIXED, heads, hidden=(11, 13)).head.action_stream.hidden
    assert hidden is not None
    assert hidden.weight.shape == (512 + 13, 64 + 11)
    hidden = make(heads=heads, hidden=(11,)).head.action_stream.hidden
    assert hidden is not None
    assert hidden.weight.shape == (11, 4)


def test_without_streams_the_head_is_one_layer_on_the_whole_torso():
    policy = make(IMAGE, CATEGORICAL)
    assert policy.head.action_stream.hidden is None
    assert policy.head.action_stream.output.weight.shape == (A * 11, 512)


def test_streams_follow_a_core_and_a_users_own_torso():
    hidden = make(heads=DUELING, core="gru", core_size=8, hidden=(11, 13)).head.action_stream.hidden
    assert hidden is not None
    assert hidden.weight.shape == (8, 8)
    torso = nn.Linear(4, 6)
    weight = torso.weight.clone()
    policy = make_q_policy(EnvSpec("test", VECTOR, DISCRETE, B), Network(), torso, heads=DUELING)
    assert policy.trunk.torso is torso
    assert torch.equal(torso.weight, weight)
    hidden = policy.head.action_stream.hidden
    assert hidden is not None
    assert hidden.weight.shape == (6, 6)
    assert policy.unroll(observations(VECTOR, T, B)).shape == (T, B, A)


def test_the_gradient_that_enters_the_trunk_is_scaled_and_no_other():
    scale = 1 / math.sqrt(2)
    plain, scaled = make(heads=DUELING), make(heads=QHeads(dueling=True, gradient_scale=scale))
    obs = observations(VECTOR, B)
    assert torch.equal(plain.unroll(obs), scaled.unroll(obs))
    for policy in (plain, scaled):
        policy.unroll(obs).square().sum().backward()
    for (name, mine), its in zip(scaled.named_parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        assert its.grad is not None
        assert its.grad.abs().sum() > 0
        factor = scale if name.startswith("trunk.") else 1.0
        torch.testing.assert_close(mine.grad, its.grad * factor)


@pytest.mark.parametrize("heads", [DUELING, RAINBOW])
def test_weights_are_a_function_of_the_seed_alone(heads: QHeads):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = make(IMAGE, heads)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    other, third = make(IMAGE, heads), make(IMAGE, heads, seed=1)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    assert not torch.equal(one.head.action_stream.output.weight, third.head.action_stream.output.weight)


def test_the_head_starts_with_the_gains_of_a_value_head():
    policy = make(heads=DUELING, hidden=(11, 13))
    for stream in (policy.head.action_stream, policy.head.value_stream):
        assert stream is not None
        assert stream.hidden is not None
        for layer, gain in ((stream.hidden, math.sqrt(2)), (stream.output, 1.0)):
            weight = layer.weight.detach()
            gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
            torch.testing.assert_close(gram, gain**2 * torch.eye(len(gram)), rtol=0, atol=1e-5)
            assert (layer.bias == 0).all()


def test_every_layer_of_a_noisy_head_is_noisy_and_no_other():
    policy = make(heads=replace(RAINBOW, sigma0=0.3), hidden=(11, 13))
    layers = [layer for layer in policy.modules() if isinstance(layer, NoisyLinear)]
    assert not [layer for layer in policy.head.modules() if isinstance(layer, nn.Linear)]
    sizes = [(11, 13), (13, A * 11), (11, 13), (13, 11)]
    assert [(len(layer.noise_in), len(layer.noise_out)) for layer in layers] == sizes
    assert policy.noise_width == sum(i + o for i, o in sizes)
    for layer in layers:
        np.testing.assert_allclose(layer.weight_sigma.detach(), 0.3 / math.sqrt(layer.weight.shape[1]), rtol=1e-6)
    assert make(heads=DUELING).noise_width == 0


def test_noise_is_shared_out_among_the_layers():
    policy, u = make(heads=RAINBOW, hidden=(11, 13)), uniforms(1, 140)[0]
    assert policy.noise_width == 140
    policy.renoise(u)
    begin = 0
    for layer in (layer for layer in policy.modules() if isinstance(layer, NoisyLinear)):
        own = NoisyLinear(len(layer.noise_in), len(layer.noise_out))
        own.renoise(u[begin : begin + own.noise_width])
        assert torch.equal(layer.noise_in, own.noise_in)
        assert torch.equal(layer.noise_out, own.noise_out)
        begin += own.noise_width
    assert begin == 140
    make(heads=DUELING).renoise(torch.zeros(0))


def test_noise_is_for_learning_and_for_slots_that_collect():
    policy = make(heads=QHeads(noisy=True, sigma0=20.0), evaluation_epsilon=0.0)
    obs, u = observations(VECTOR, 101), uniforms(101)
    policy.exploration.zero_()
    calm = policy.unroll(obs).argmax(-1)
    policy.renoise(noise(policy))
    noisy = policy.unroll(obs).argmax(-1)
    assert (noisy != calm).any()
    policy.renoise(torch.stack([noise(policy, row) for row in range(1, 4)]))
    by_slot = policy.act(obs, (), u, slot=slots(101)).action
    assert (by_slot != calm).any()
    for slot in range(3):
        policy.renoise(noise(policy, slot + 1))
        mine = slots(101) == slot
        assert torch.equal(by_slot[mine], policy.unroll(obs).argmax(-1)[mine]), "every slot has its own"
    policy.renoise(noise(policy))
    before = copy.deepcopy(policy.state_dict())
    assert torch.equal(policy.unroll(obs).argmax(-1), noisy)
    assert torch.equal(policy.act(obs, (), u).action, calm)
    assert torch.equal(policy.act(obs, (), u, greedy=True).action, calm)
    assert torch.equal(policy.act(obs, (), u, greedy=True, slot=slots(101)).action, calm)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


def test_slots_explore_by_their_own_rates():
    policy, obs, u = make(), observations(VECTOR, MANY), uniforms(MANY)
    policy.exploration.copy_(torch.tensor([0.0, 0.25, 1.0]))
    slot, best = slots(MANY), policy.unroll(obs).argmax(-1)
    act = policy.act(obs, (), u, slot=slot)
    for number, epsilon in enumerate([0.0, 0.25, 1.0]):
        mine = slot == number
        missed = (act.action != best)[mine].float().mean().item()
        assert missed == pytest.approx(epsilon * (A - 1) / A, abs=0.02 if epsilon else 0.0)
        away = (act.action - best)[mine] % A
        counts = torch.bincount(away, minlength=A) / mine.sum()
        np.testing.assert_allclose(counts[1:], epsilon / A, atol=0.015)
    again = policy.act(obs, (), u, slot=slot)
    assert torch.equal(again.action, act.action)
    assert policy.exploration.shape == (B,)
    assert "exploration" in policy.state_dict()
    assert (make().exploration == 1).all()


def test_evaluation_has_a_rate_of_its_own_and_greedy_acting_none():
    policy, obs, u = make(evaluation_epsilon=0.5), observations(VECTOR, MANY), uniforms(MANY)
    best = policy.unroll(obs).argmax(-1)
    missed = (policy.act(obs, (), u).action != best).float().mean().item()
    assert missed == pytest.approx(0.5 * (A - 1) / A, abs=0.02)
    for slot in (None, slots(MANY)):
        act = policy.act(obs, (), u, greedy=True, slot=slot)
        assert torch.equal(act.action, best)
        assert (act.log_prob == 0).all()


def test_the_first_of_equals_is_taken():
    policy = make()
    for parameter in policy.head.parameters():
        parameter.data.zero_()
    assert (policy.act(observations(VECTOR, B), (), uniforms(B), greedy=True).action == 0).all()


@pytest.mark.parametrize("space", [VECTOR, MASKED])
def test_log_probabilities_are_those_of_the_exploring_policy(space: Space[Any]):
    policy, obs, u = make(space), observations(space, 997), uniforms(997)
    rates = [0.1, 0.6, 1.0]
    policy.exploration.copy_(torch.tensor(rates))
    act = policy.act(obs, (), u, slot=slots(997))
    best = policy.values(policy.unroll(obs), obs).argmax(-1)
    seen: set[tuple[int, bool]] = set()
    for n in range(997):
        count = int(obs["action_mask"][n].sum()) if space is MASKED else A
        epsilon, is_best = rates[n % B], bool(act.action[n] == best[n])
        expected = math.log(epsilon / count + (1 - epsilon if is_best else 0.0))
        assert act.log_prob[n].item() == pytest.approx(expected, abs=1e-5)
        seen.add((n % B, is_best))
    assert len(seen) == 2 * B
    assert act.log_prob.dtype == torch.float32


def test_masked_actions_are_never_taken_and_allowed_ones_all_are():
    policy, obs = make(MASKED, init="default"), observations(MASKED, MANY)
    allowed = obs["action_mask"] != 0
    assert (~allowed).any(0).sum() == A - 1
    last = 1 - 2.0**-23
    ends = torch.tensor([[0.0, 0.0], [0.0, last], [last, 0.0], [last, last]]).repeat(MANY // 4 + 1, 1)[:MANY]
    for u in (uniforms(MANY), ends):
        for greedy, slot in ((True, None), (False, None), (False, slots(MANY))):
            action = policy.act(obs, (), u, greedy, slot).action
            assert allowed[torch.arange(MANY), action].all()
    rows = allowed.sum(1) == 3
    action = policy.act(obs, (), uniforms(MANY), slot=slots(MANY)).action[rows]
    place = allowed[rows].int().cumsum(1)[torch.arange(len(action)), action]
    np.testing.assert_allclose(torch.bincount(place) / len(action), [0, 1 / 3, 1 / 3, 1 / 3], atol=0.02)


def test_values_of_masked_actions_are_the_least_there_are():
    policy, obs = make(MASKED), observations(MASKED, T, B)
    obs["action_mask"][2, 1] = 0
    output = policy.unroll(obs)
    q, lowest = policy.values(output, obs), torch.finfo(torch.float32).min
    for t in range(T):
        for b in range(B):
            for a in range(A):
                free = obs["action_mask"][t, b, a] or (t, b) == (2, 1)
                assert q[t, b, a] == (output[t, b, a] if free else lowest)
    row = tree.map(lambda leaf: leaf[2], obs)
    act = policy.act(row, (), uniforms(B), greedy=True)
    assert act.action[1] == output[2, 1].argmax()


def test_normalisation_belongs_to_the_policy_and_moves_only_when_told():
    policy, plain = make(MASKED, normalize_obs=True), make(MASKED)
    obs = observations(MASKED, T, B)
    obs["features"] = obs["features"] * 50 + 3
    valid = torch.ones(T, B, dtype=torch.bool)
    valid[1, 2] = valid[4, 0] = False
    policy.observe(obs, valid)
    rows = obs["features"][valid].double()
    scaled = ((obs["features"] - rows.mean(0)) / rows.var(0, unbiased=False).sqrt()).float()
    torch.testing.assert_close(policy.unroll(obs), plain.unroll(obs | {"features": scaled}))
    plain.observe(obs, valid)
    assert plain.moments is None


def test_acting_has_no_gradient():
    policy, obs = make(core="gru"), observations(VECTOR, B)
    act = policy.act(obs, policy.initial_state(B), uniforms(B), slot=slots(B))
    assert not any(tensor.requires_grad for tensor in (act.log_prob, *act.state))


@pytest.mark.parametrize("heads", ALL)
def test_learning_reaches_all_parameters(heads: QHeads):
    policy, obs = make(heads=heads), observations(VECTOR, 11)
    if policy.noise_width:
        policy.renoise(noise(policy))
    output = policy.unroll(obs)
    loss = policy.values(output, obs)[:, 1].square().sum() + output.square().sum()
    assert all(g is not None and g.abs().sum() > 0 for g in torch.autograd.grad(loss, list(policy.parameters())))


def test_a_policy_can_be_copied_and_its_state_loaded():
    policy, other = make(heads=RAINBOW), make(heads=RAINBOW, seed=1)
    policy.renoise(noise(policy))
    policy.exploration.copy_(torch.tensor([0.1, 0.2, 0.3]))
    obs = observations(VECTOR, B)
    other.load_state_dict(policy.state_dict())
    assert "head.atoms" not in policy.state_dict()
    for clone in (other, copy.deepcopy(policy)):
        assert torch.equal(clone.unroll(obs), policy.unroll(obs))
        assert torch.equal(clone.exploration, policy.exploration)


@pytest.mark.parametrize("heads", [QHeads(), DUELING, RAINBOW], ids=["plain", "dueling", "rainbow"])
def test_bfloat16_is_the_torsos_and_that_of_hidden_layers_in_its_place(heads: QHeads):
    policy, exact = make(IMAGE, heads, precision="bfloat16"), make(IMAGE, heads)
    passed: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}
    for name, layer in policy.named_modules():
        if isinstance(layer, nn.Linear | NoisyLinear):
            layer.register_forward_hook(
                lambda layer, given, out, name=name: passed.update({name: (layer, given[0], out)})
            )
    obs = observations(IMAGE, B)
    output, reference = policy.unroll(obs), exact.unroll(obs)
    rounded = {
        name: not torch.equal(layer.forward(given.float()), out.float())
        for name, (layer, given, out) in list(passed.items())
    }
    assert output.dtype == torch.float32
    assert not torch.equal(output, reference)
    torch.testing.assert_close(output, reference, rtol=0.05, atol=0.05)
    assert len(rounded) >= 2
    assert all(differs != name.endswith("output") for name, differs in rounded.items())
    gradients = torch.autograd.grad(output.sum(), list(policy.parameters()))
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [QHeads(), DUELING, RAINBOW], ids=["plain", "dueling", "rainbow"])
def test_a_packed_copy_follows_weights_and_noise_and_says_the_same_bits(heads: QHeads, precision: Precision):
    policy = make(IMAGE, heads, precision=precision)
    replica = packed(policy)
    layers = [replica.head.action_stream.hidden or replica.trunk.torso, replica.head.action_stream.output]
    hidden, output = ({parameter.dtype for parameter in layer.parameters()} for layer in layers)
    assert hidden == {torch.bfloat16 if precision == "bfloat16" else torch.float32}
    assert output == {torch.float32}
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    newer = make(IMAGE, heads, seed=1)
    if newer.noise_width:
        newer.renoise(noise(newer))
    for one in (policy, newer):
        policy.load_state_dict(one.state_dict())
        copy_into(replica, policy.state_dict())
        shown = observations(IMAGE, B), (), torch.full((B, 2), 0.5)
        for slot in (None, torch.arange(B)):
            said, repeated = (tree.leaves(tuple(each.act(*shown, slot=slot))) for each in (policy, replica))
            assert all(map(torch.equal, said, repeated))
        assert torch.equal(policy.unroll(shown[0]), replica.unroll(shown[0]))


@pytest.mark.parametrize(
    ("action", "instead"),
    [(spaces.Box(-1, 1, (2,)), "sac, td3 or ddpg"), (spaces.MultiDiscrete([2, 3]), "ppo")],
)
def test_other_actions_are_refused_and_what_takes_them_is_named(action: Space[Any], instead: str):
    with pytest.raises(ValueError, match=rf"Q-learning wants Discrete actions; use {instead}"):
        make_q_policy(EnvSpec("test", VECTOR, action, B), Network())


def test_a_mask_that_does_not_fit_the_actions_is_refused():
    with pytest.raises(ValueError, match=r"'action_mask' has 5 entries; the action space Discrete\(4\) takes 4"):
        make_q_policy(EnvSpec("test", MASKED, spaces.Discrete(4), B), Network())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"outputs": 2}, "outputs of a value head: expected 1 per action, got 2"),
        ({"distribution": "categorical", "outputs": 1}, "of a categorical head: expected at least 2 per action, got 1"),
        ({"distribution": "quantile", "outputs": 0}, "of a quantile head: expected at least 1 per action, got 0"),
        (
            {"distribution": "categorical", "outputs": 5, "low": 2.0, "high": 2.0},
            "expected low < high, got 2.0 and 2.0",
        ),
    ],
)
def test_heads_that_mean_nothing_are_refused(given: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        QHeads(**given)
