from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import Space, spaces
from torch import Tensor, nn
from torch.distributions import AffineTransform, Normal, TanhTransform, TransformedDistribution

from slipstream import dice
from slipstream.nets.continuous import (
    DeterministicActor,
    GaussianActor,
    Temperature,
    make_critics,
    make_deterministic_actor,
    make_gaussian_actor,
)
from slipstream.nets.trunk import Network
from slipstream.tree import Tree
from slipstream.types import EnvSpec

T, B, D = 7, 3, 6
MANY = 3001
VECTOR = spaces.Box(-np.inf, np.inf, (4,), np.float32)
IMAGE = spaces.Box(0, 255, (1, 36, 40), np.uint8)
MIXED = spaces.Dict({"image": IMAGE, "vector": VECTOR})
LOW = np.array([[-1.0, -2.0, 0.0], [-0.5, 3.0, -7.0]], np.float32)
HIGH = np.array([[1.0, 5.0, 0.1], [0.5, 4.0, -1.0]], np.float32)
BOX = spaces.Box(LOW, HIGH)
LAST = 1 - 2.0**-23
Actor = GaussianActor | DeterministicActor


def spec(obs: Space[Any] = VECTOR, action: Space[Any] = BOX) -> EnvSpec:
    return EnvSpec("test", obs, action, B)


def gaussian(obs: Space[Any] = VECTOR, seed: int = 0, **network: Any) -> GaussianActor:
    return make_gaussian_actor(spec(obs), Network(**network), None, seed)


def deterministic(obs: Space[Any] = VECTOR, seed: int = 0, sigma: float = 0.1, **network: Any) -> DeterministicActor:
    return make_deterministic_actor(spec(obs), Network(**network), None, seed, sigma)


def observations(space: Space[Any], *leading: int) -> Tree:
    generator = np.random.default_rng(0)
    if space is MIXED:
        return {"image": observations(IMAGE, *leading), "vector": observations(VECTOR, *leading)}
    if space is IMAGE:
        return torch.from_numpy(generator.integers(0, 256, (*leading, 1, 36, 40), np.uint8))
    return torch.from_numpy(generator.normal(size=(*leading, 4)).astype(np.float32))


def flat(obs: Tree) -> Tree:
    return {key: flat(child) for key, child in obs.items()} if isinstance(obs, dict) else obs.flatten(0, 1)


def uniforms(*leading: int, width: int = 1 + D) -> Tensor:
    rows = math.prod(leading)
    return torch.from_numpy(dice.uniform(dice.keys(0, "act", range(rows)), 0, 1, width)[0]).view(*leading, width)


def slots(rows: int) -> Tensor:
    return torch.arange(rows) % B


def within(action: Tensor) -> bool:
    return bool((action >= torch.from_numpy(LOW)).all() and (action <= torch.from_numpy(HIGH)).all())


@pytest.mark.parametrize("space", [VECTOR, IMAGE, MIXED])
def test_rows_and_flat_samples_give_the_same_numbers(space: Space[Any]):
    obs, u = observations(space, T, B), uniforms(T, B, width=D)
    actor = gaussian(space)
    action, log_prob = actor.sample(obs, u)
    assert action.shape == (T, B, 2, 3)
    assert log_prob.shape == (T, B)
    assert action.dtype == log_prob.dtype == torch.float32
    other, its = actor.sample(flat(obs), u.flatten(0, 1))
    torch.testing.assert_close(action.flatten(0, 1), other)
    torch.testing.assert_close(log_prob.flatten(), its)
    for policy in (actor, deterministic(space)):
        mean = policy.mean_action(obs)
        assert mean.shape == (T, B, 2, 3)
        torch.testing.assert_close(mean.flatten(0, 1), policy.mean_action(flat(obs)))
    critics = make_critics(spec(space), Network(), count=2)
    q = critics(obs, action)
    assert q.shape == (2, T, B)
    assert q.dtype == torch.float32
    torch.testing.assert_close(q.flatten(1), critics(flat(obs), other))


@pytest.mark.parametrize("make", [gaussian, deterministic])
def test_actions_are_within_the_bounds_whatever_the_dice_and_the_weights(make: Any):
    actor: Actor = make(init="default")
    obs = observations(VECTOR, MANY)
    ends = torch.tensor([[0.9, 0.0], [0.9, LAST], [0.0, 0.0], [0.0, LAST]])
    ends = torch.cat([ends[:, :1], ends[:, 1:].expand(4, D)], 1).repeat(MANY // 4 + 1, 1)[:MANY]
    for scale, rate in ((1.0, 0.5), (1000.0, 0.0), (1.0, 1.0)):
        actor.body.head.weight.data.mul_(scale)
        actor.exploration.fill_(rate)
        for u in (uniforms(MANY), ends):
            for greedy, slot in ((True, None), (False, None), (False, slots(MANY))):
                act = actor.act(obs, (), u, greedy, slot)
                assert within(act.action)
                assert act.action.dtype == torch.float32
                assert act.action.shape == (MANY, 2, 3)
                assert act.log_prob.isfinite().all()


@pytest.mark.parametrize("make", [gaussian, deterministic])
def test_slots_act_uniformly_by_their_own_rates(make: Any):
    actor: Actor = make()
    assert (actor.exploration == 1).all()
    assert "exploration" in actor.state_dict()
    obs, u, slot = observations(VECTOR, MANY), uniforms(MANY), slots(MANY)
    rates = [0.0, 0.3, 1.0]
    actor.exploration.copy_(torch.tensor(rates))
    act = actor.act(obs, (), u, slot=slot)
    anywhere = torch.from_numpy(LOW) + torch.from_numpy(HIGH - LOW) * (u[:, 1:].view(-1, 2, 3) + 2.0**-24)
    uniform = torch.isclose(act.action, anywhere).flatten(1).all(1)
    density = -float(np.log(HIGH - LOW).sum())
    for number, rate in enumerate(rates):
        mine = slot == number
        assert uniform[mine].float().mean().item() == pytest.approx(rate, abs=0.02 if 0 < rate < 1 else 0.0)
        np.testing.assert_allclose(act.log_prob[mine & uniform], density, rtol=1e-5)
    assert not torch.isclose(act.log_prob[~uniform], torch.tensor(density)).any()
    quarter = (act.action[slot == 2] - torch.from_numpy(LOW)) / torch.from_numpy(HIGH - LOW) < 0.25
    np.testing.assert_allclose(quarter.float().mean(0), 0.25, atol=0.03)


def test_sac_draws_where_nobody_explores():
    actor, obs, u = gaussian(init="default"), observations(VECTOR, 101), uniforms(101)
    drawn, log_prob = actor.sample(obs, u[:, 1:])
    actor.exploration.zero_()
    for slot in (None, slots(101)):
        act = actor.act(obs, (), u, slot=slot)
        assert torch.equal(act.action, drawn)
        assert torch.equal(act.log_prob, log_prob)
        assert not act.log_prob.requires_grad
        assert act.state == ()
        assert not act.extras
        greedy = actor.act(obs, (), u, greedy=True, slot=slot)
        assert torch.equal(greedy.action, actor.mean_action(obs))
    assert not torch.isclose(greedy.action, drawn).all(0).any()


def test_sac_draws_from_the_squashed_normal_distribution():
    actor, obs, u = gaussian(init="default"), observations(VECTOR, 101), uniforms(101, width=D)
    mean, z = actor.body(obs).double().chunk(2, dim=-1)
    std = (-5 + 3.5 * (1 + z.tanh())).exp()
    low, high = torch.from_numpy(LOW).double().flatten(), torch.from_numpy(HIGH).double().flatten()
    squash = [TanhTransform(), AffineTransform((low + high) / 2, (high - low) / 2)]
    expected = TransformedDistribution(Normal(mean, std), squash)
    action, log_prob = actor.sample(obs, u)
    x = mean + std * torch.special.ndtri(u.double() + 2.0**-24)
    torch.testing.assert_close(
        action.flatten(1).double(), (low + high) / 2 + (high - low) / 2 * x.tanh(), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        log_prob.double(), expected.log_prob(action.flatten(1).double()).sum(1), rtol=1e-3, atol=1e-3
    )


def test_the_standard_deviation_stays_in_its_range_and_keeps_a_gradient():
    actor, obs = gaussian(), observations(VECTOR, 101)
    middle = actor.distribution(obs).log_std
    torch.testing.assert_close(middle, torch.full_like(middle, -1.5), rtol=0, atol=0.1)
    actor.body.head.bias.data[D:] = 3.0
    log_std = actor.distribution(obs).log_std
    assert (log_std > 1.9).all()
    assert (log_std < 2.0).all()
    (gradient,) = torch.autograd.grad(log_std.sum(), [actor.body.head.bias])
    assert (gradient[D:] > 0).all()
    actor.body.head.bias.data[D:] = -300.0
    torch.testing.assert_close(actor.distribution(obs).log_std, torch.full_like(middle, -5.0))


def test_td3_adds_noise_in_units_of_half_the_range_for_slots_that_collect_only():
    actor, obs, u = deterministic(sigma=0.3, init="default"), observations(VECTOR, MANY), uniforms(MANY)
    actor.exploration.zero_()
    mean = actor.mean_action(obs)
    for greedy, slot in ((True, None), (True, slots(MANY)), (False, None)):
        act = actor.act(obs, (), u, greedy, slot)
        assert torch.equal(act.action, mean)
        assert (act.log_prob == 0).all()
    act = actor.act(obs, (), u, slot=slots(MANY))
    xi = torch.special.ndtri(u[:, 1:].double() + 2.0**-24).view(-1, 2, 3)
    noisy = mean.double() + torch.from_numpy(HIGH - LOW).double() / 2 * 0.3 * xi
    expected = noisy.clamp(torch.from_numpy(LOW), torch.from_numpy(HIGH))
    torch.testing.assert_close(act.action.double(), expected, rtol=0, atol=1e-5)
    assert (noisy != expected).any()
    std = torch.from_numpy(HIGH - LOW).flatten() / 2 * 0.3
    log_prob = Normal(0.0, std).log_prob(std * xi.flatten(1)).sum(1)
    torch.testing.assert_close(act.log_prob, log_prob.float(), rtol=1e-4, atol=1e-4)


def test_the_deterministic_action_is_the_squashed_output():
    actor, obs = deterministic(init="default"), observations(VECTOR, 11)
    x = actor.body(obs).view(-1, 2, 3)
    low, high = torch.from_numpy(LOW), torch.from_numpy(HIGH)
    torch.testing.assert_close(actor.mean_action(obs), low + (high - low) * (1 + x.tanh()) / 2)
    assert torch.equal(actor.bounds[0], low.flatten())
    assert torch.equal(actor.bounds[1], high.flatten())


def test_saturated_actions_are_not_rounded_past_the_bounds():
    generator = np.random.default_rng(0)
    low = generator.normal(size=997).astype(np.float32)
    box = spaces.Box(low, low + generator.exponential(size=997).astype(np.float32))
    actor = make_deterministic_actor(spec(action=box), Network())
    for end, sign in ((box.low, -1.0), (box.high, 1.0)):
        actor.body.head.bias.data.fill_(100 * sign)
        action = actor.mean_action(observations(VECTOR, B)).detach().numpy()
        assert (action >= box.low).all()
        assert (action <= box.high).all()
        np.testing.assert_allclose(action, np.broadcast_to(end, (B, 997)), atol=1e-6)


@pytest.mark.parametrize("init", ["orthogonal", "default"])
def test_weights_are_a_function_of_the_seed_alone(init: str):
    def built(seed: int) -> list[nn.Module]:
        return [
            gaussian(seed=seed, init=init),
            deterministic(seed=seed, init=init),
            make_critics(spec(), Network(init=init), None, seed),
        ]

    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = built(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    for mine, same, other in zip(one, built(0), built(1), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), same.parameters(), strict=True))
        assert not any(
            torch.equal(a, b) for a, b in zip(mine.parameters(), other.parameters(), strict=True) if a.dim() > 1
        )


def test_actions_begin_in_the_middle():
    obs = observations(VECTOR, 101)
    for actor in (gaussian(), deterministic()):
        away = (actor.mean_action(obs) - torch.from_numpy(LOW + HIGH) / 2) / torch.from_numpy(HIGH - LOW)
        assert 0 < away.abs().max() < 0.05


def test_critics_are_perceptrons_of_what_is_seen_and_done():
    critics = make_critics(spec(), Network(hidden=(11, 13), activation="relu"), count=3)
    obs, action = observations(VECTOR, B), gaussian().sample(observations(VECTOR, B), uniforms(B, width=D))[0]
    scaled = (2 * action - torch.from_numpy(LOW + HIGH)) / torch.from_numpy(HIGH - LOW)
    q = critics(obs, action)
    assert q.shape == (3, B)
    for number in range(3):
        weights = list(critics.critics[number].parameters())
        assert [tuple(weight.shape) for weight in weights] == [(11, 4 + D), (11,), (13, 11), (13,), (1, 13), (1,)]
        h = torch.cat([obs, scaled.flatten(1)], 1)
        for weight, bias in ((weights[0], weights[1]), (weights[2], weights[3])):
            h = (h @ weight.T + bias).relu()
        torch.testing.assert_close(q[number], (h @ weights[4].T + weights[5]).squeeze(1))
    assert not torch.isclose(q[0], q[1]).any()


def test_critics_start_with_the_gains_of_a_value_network():
    critics = make_critics(spec(), Network(hidden=(11, 13)))
    for critic in critics.critics:
        for layer, gain in ((critic.joint[0], math.sqrt(2)), (critic.joint[2], math.sqrt(2)), (critic.head, 1.0)):
            weight = layer.weight.detach()
            gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
            torch.testing.assert_close(gram, gain**2 * torch.eye(len(gram)), rtol=0, atol=1e-5)
            assert (layer.bias == 0).all()


def test_critics_share_nothing():
    critics = make_critics(spec(), Network(), count=2)
    obs, action = observations(VECTOR, B), torch.from_numpy(LOW).expand(B, 2, 3)
    critics(obs, action)[0].sum().backward()
    for number in (0, 1):
        for parameter in critics.critics[number].parameters():
            assert parameter.grad is not None
            assert (parameter.grad.abs().sum() > 0) == (number == 0)


def test_the_gradient_of_a_critic_reaches_the_actor_through_the_action():
    obs, critics = observations(VECTOR, 11), make_critics(spec(), Network())
    for actor in (gaussian(), deterministic()):
        action = (
            actor.sample(obs, uniforms(11, width=D))[0] if isinstance(actor, GaussianActor) else actor.mean_action(obs)
        )
        gradients = torch.autograd.grad(critics(obs, action).amin(0).sum(), list(actor.parameters()))
        assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_images_and_vectors_join_the_action_in_a_critic():
    critics = make_critics(spec(MIXED), Network(hidden=(11,)), count=1)
    critic = critics.critics[0]
    assert critic.joint[0].weight.shape == (11, 512 + 4 + D)
    obs, action = observations(MIXED, B), torch.from_numpy(LOW).expand(B, 2, 3)
    before = critics(obs, action)
    for other in (obs | {"image": 255 - obs["image"]}, obs | {"vector": obs["vector"] + 1}):
        assert not torch.isclose(critics(other, action), before).any()


def test_every_network_has_a_copy_of_a_users_torso():
    torso = nn.Linear(4, 6)
    weight = torso.weight.clone()
    actor = make_gaussian_actor(spec(), Network(), torso)
    critics = make_critics(spec(), Network(hidden=(11,)), torso, count=2)
    assert actor.body.trunk.torso is torso
    torsos = [critic.trunk.torso for critic in critics.critics]
    assert len({id(each) for each in (torso, *torsos)}) == 3
    assert all(torch.equal(each.weight, weight) for each in (torso, *torsos))
    assert critics.critics[0].joint[0].weight.shape == (11, 6 + D)


def test_critics_see_what_the_actor_normalised():
    actor, plain = gaussian(MIXED, normalize_obs=True), gaussian(MIXED)
    obs = observations(MIXED, T, B)
    obs["vector"] = obs["vector"] * 50 + 3
    valid = torch.ones(T, B, dtype=torch.bool)
    valid[1, 2] = False
    actor.observe(obs, valid)
    rows = obs["vector"][valid].double()
    scaled = obs | {"vector": ((obs["vector"] - rows.mean(0)) / rows.var(0, unbiased=False).sqrt()).float()}
    torch.testing.assert_close(actor.normalised(obs)["vector"], scaled["vector"])
    assert actor.normalised(obs)["image"] is obs["image"]
    torch.testing.assert_close(actor.mean_action(obs), plain.mean_action(scaled))
    assert plain.normalised(obs) is obs
    plain.observe(obs, valid)


def test_the_temperature_is_positive_and_learned_by_its_logarithm():
    temperature = Temperature(0.2)
    assert temperature().item() == pytest.approx(0.2)
    assert [name for name, _ in temperature.named_parameters()] == ["log_alpha"]
    (gradient,) = torch.autograd.grad(temperature(), [temperature.log_alpha])
    assert gradient.item() == pytest.approx(0.2)
    assert Temperature()().item() == 1.0


@pytest.mark.parametrize("make", [gaussian, deterministic])
def test_a_policy_can_be_copied_and_its_state_loaded(make: Any):
    actor, other = make(normalize_obs=True), make(normalize_obs=True, seed=1)
    obs = observations(VECTOR, B)
    actor.exploration.copy_(torch.tensor([0.1, 0.2, 0.3]))
    actor.observe(obs, torch.ones(B, dtype=torch.bool))
    other.load_state_dict(actor.state_dict())
    for clone in (other, copy.deepcopy(actor)):
        assert torch.equal(clone.mean_action(obs), actor.mean_action(obs))
        assert torch.equal(clone.exploration, actor.exploration)
    assert (actor.dice_width, actor.noise_width, actor.recurrent) == (1 + D, 0, False)
    assert actor.initial_state(B) == ()
    actor.renoise(torch.zeros(0))


def test_an_action_may_be_a_single_number():
    single = spec(action=spaces.Box(-2, 3, (), np.float32))
    for actor in (make_gaussian_actor(single, Network()), make_deterministic_actor(single, Network())):
        act = actor.act(observations(VECTOR, B), (), uniforms(B, width=2), slot=slots(B))
        assert act.action.shape == (B, 1)
        assert make_critics(single, Network())(observations(VECTOR, B), act.action).shape == (2, B)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (spaces.Discrete(4), r"Discrete\(4\): sac, td3 and ddpg want a Box; use dqn or rainbow"),
        (spaces.MultiDiscrete([2, 3]), "sac, td3 and ddpg want a Box; use ppo"),
        (spaces.Box(-np.inf, 1, (2,)), "want finite bounds, low < high, for every entry"),
        (spaces.Box(-3e38, 3e38, (2,)), "want finite bounds, low < high, for every entry"),
        (spaces.Box(np.array([0, 1], np.float32), np.ones(2, np.float32)), "want finite bounds, low < high"),
    ],
)
def test_other_actions_are_refused_and_what_takes_them_is_named(action: Space[Any], message: str):
    for make in (make_gaussian_actor, make_deterministic_actor, make_critics):
        with pytest.raises(ValueError, match=message):
            make(spec(action=action), Network())


def test_memory_is_refused():
    for make in (make_gaussian_actor, make_deterministic_actor, make_critics):
        with pytest.raises(
            ValueError, match=r"net.core=lstm: sac, td3 and ddpg have no recurrent form; use --net.core none"
        ):
            make(spec(), Network(core="lstm"))
