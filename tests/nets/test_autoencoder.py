from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from slipstream.nets.actor_critic import make_actor_critic
from slipstream.nets.autoencoder import AutoEncoder, Decoder, make_decoder
from slipstream.nets.trunk import Encoded, Network
from slipstream.types import EnvSpec

STACK = spaces.Box(0, 255, (4, 42, 45), np.uint8)
COLOUR = spaces.Box(0, 255, (36, 40, 3), np.uint8)


def spec(space: gymnasium.Space[object], stack: int = 1) -> EnvSpec:
    return EnvSpec("made-up", space, spaces.Discrete(3), 5, frame_stack=stack)


def decoder(options: AutoEncoder, space: gymnasium.Space[object] = STACK, stack: int = 4, seed: int = 0) -> Decoder:
    return make_decoder(spec(space, stack), options, 7, 6, seed)


def pictures(space: spaces.Box, rows: int = 3) -> Tensor:
    return torch.randint(0, 256, (rows, *space.shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def encoded(rows: int = 3) -> Encoded:
    generator = torch.Generator().manual_seed(2)
    return Encoded(torch.randn(rows, 7, generator=generator), torch.randn(rows, 6, generator=generator))


@pytest.mark.parametrize(
    ("space", "stack", "frames", "channels"),
    [(STACK, 4, "newest", 1), (STACK, 4, "stack", 4), (STACK, 1, "newest", 4), (COLOUR, 1, "newest", 3)],
)
def test_the_loss_is_the_mean_squared_error_of_what_is_drawn(
    space: spaces.Box, stack: int, frames: str, channels: int
) -> None:
    net = decoder(AutoEncoder(weight=0.3, frames=frames), space, stack)
    obs, code = pictures(space), encoded()
    drawn = net(code.latent)[""].detach().numpy()
    wanted = obs.numpy().astype(np.float64) / 255
    if space is COLOUR:
        wanted = wanted.transpose(0, 3, 1, 2)
    wanted = wanted[:, -channels:]
    assert drawn.shape == wanted.shape
    error = ((drawn - wanted) ** 2).mean(axis=(1, 2, 3))
    loss, parts = net.loss(code, obs, None)
    assert parts.keys() == {"reconstruction_loss"}
    np.testing.assert_allclose(parts["reconstruction_loss"], error, rtol=1e-5)
    np.testing.assert_allclose(loss.detach().numpy(), 0.3 * error, rtol=1e-5)


def test_every_image_of_an_observation_is_drawn() -> None:
    space = spaces.Dict({"a": COLOUR, "b": spaces.Box(-1, 1, (2,), np.float32), "c": STACK})
    net = decoder(AutoEncoder(weight=1.0, frames="stack"), space, 1)
    obs = {"a": pictures(COLOUR), "b": torch.zeros(3, 2), "c": pictures(STACK)}
    drawn = net(encoded().latent)
    assert {path: tuple(value.shape) for path, value in drawn.items()} == {"a": (3, 3, 36, 40), "c": (3, 4, 42, 45)}
    one = (drawn["a"] - obs["a"].permute(0, 3, 1, 2) / 255).square().flatten(1)
    other = (drawn["c"] - obs["c"] / 255).square().flatten(1)
    torch.testing.assert_close(net.loss(encoded(), obs, None)[0], torch.cat([one, other], 1).mean(1))


def test_without_images_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"autoencoder.weight=1.0: no observation of made-up is an image; set it to 0"):
        decoder(AutoEncoder(weight=1.0), spaces.Box(-1, 1, (2,), np.float32), 1)


def test_variational_draws_around_the_latent_and_pays_the_divergence() -> None:
    net = decoder(AutoEncoder(weight=2.0, variational=True, beta=3.0))
    obs, code = pictures(STACK), encoded()
    uniform = torch.rand(3, 6, generator=torch.Generator().manual_seed(3)) * 0.98
    log_variance = net.log_variance(code.features)
    noise = torch.special.ndtri(uniform + 2.0**-24)
    seen = code.latent + log_variance.exp().sqrt() * noise
    error = (net(seen)[""] - obs[:, -1:] / 255).square().flatten(1).mean(1)
    normal = torch.distributions.Normal(code.latent, log_variance.exp().sqrt())
    divergence = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(1)
    expected = 2.0 * (error + 3.0 * divergence / (42 * 45))
    loss, parts = net.loss(code, obs, uniform)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(parts["latent_kl"], divergence.detach(), rtol=1e-4, atol=1e-6)
    assert net.dice_width == 6


@pytest.mark.parametrize("shapes", [True, False])
def test_the_gradient_reaches_the_encoder_only_if_it_may(shapes: bool) -> None:
    net = decoder(AutoEncoder(weight=1.0, shapes_encoder=shapes))
    code = Encoded(*(part.requires_grad_() for part in encoded()))
    net.loss(code, pictures(STACK), None)[0].sum().backward()
    assert (code.latent.grad is not None) == shapes
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in net.parameters())


def test_in_bfloat16_it_draws_about_the_same_in_float32() -> None:
    options, obs, code = AutoEncoder(weight=1.0, variational=True), pictures(STACK), encoded()
    exact, quick = (make_decoder(spec(STACK, 4), options, 7, 6, 0, bfloat16) for bfloat16 in (False, True))
    uniform = torch.full((3, 6), 0.3)
    drawn = quick(code.latent)[""]
    assert drawn.dtype == torch.float32
    assert not torch.equal(drawn, exact(code.latent)[""])
    torch.testing.assert_close(drawn, exact(code.latent)[""], rtol=0.0, atol=0.01)
    losses = [net.loss(code, obs, uniform)[0].sum() for net in (exact, quick)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=0.0)
    ones, others = (
        torch.autograd.grad(loss, [*net.parameters()]) for loss, net in zip(losses, (exact, quick), strict=True)
    )
    assert all(float((one - other).norm() / one.norm()) < 0.1 for one, other in zip(ones, others, strict=True))


def test_weights_are_a_function_of_the_seed() -> None:
    options = AutoEncoder(weight=1.0)
    one, same, other = (next(decoder(options, seed=seed).parameters()) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("from_rl", [True, False])
@pytest.mark.parametrize("core", ["none", "gru"])
def test_heads_see_the_latent_and_may_leave_the_torso_alone(core: str, from_rl: bool) -> None:
    space = spaces.Box(0, 255, (4, 40, 40), np.uint8)
    network = Network(latent=5, latent_from_rl=from_rl, core=core, core_size=8)
    policy = make_actor_critic(spec(space, 4), network)
    obs = pictures(space, 6).unflatten(0, (2, 3))
    out = policy.unroll(obs, policy.initial_state(3), torch.zeros(2, 3, dtype=torch.bool))
    assert policy.trunk.encoded == (512, 5)
    assert out.encoded.latent.shape == (6, 5)
    torch.testing.assert_close(out.encoded.latent, policy.trunk.latent(out.encoded.features))
    out.value.sum().backward()
    assert (policy.trunk.latent.weight.grad is not None) == from_rl
    assert policy.value_head.weight.grad is not None
