from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import Space, spaces
from torch import Tensor, nn

from slipstream.nets.check import dummy_observations
from slipstream.nets.torso import (
    ImageEncoder,
    Torso,
    TorsoName,
    as_numbers,
    image_layout,
    impala_resnet,
    mlp,
    nature_cnn,
    nips_cnn,
)

N = 3


def pixels(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, np.uint8))


def image(*shape: int) -> spaces.Box:
    return spaces.Box(0, 255, shape, np.uint8)


def parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def test_networks_have_the_parameters_of_their_papers():
    """Counted by hand from the layer sizes for 84x84x4: in * out * k * k + out per convolution."""
    nature = (4 * 32 * 64 + 32) + (32 * 64 * 16 + 64) + (64 * 64 * 9 + 64) + (64 * 7 * 7 * 512 + 512)
    assert parameters(nature_cnn(4, 84, 84)) == nature == 1_684_128
    nips = (4 * 16 * 64 + 16) + (16 * 32 * 16 + 32) + (32 * 9 * 9 * 256 + 256)
    assert parameters(nips_cnn(4, 84, 84)) == nips
    sections = [(4, 16), (16, 32), (32, 32)]
    convolutions = sum(9 * i * o + o + 4 * (9 * o * o + o) for i, o in sections)
    assert parameters(impala_resnet(4, 84, 84)) == convolutions + 32 * 11 * 11 * 256 + 256
    assert parameters(mlp(5, (7, 3), "tanh")) == 5 * 7 + 7 + 7 * 3 + 3


def test_impala_section_is_convolution_pool_and_two_residual_blocks():
    """Written out with the functional forms, from the same weights."""
    net = impala_resnet(3, 16, 24)
    weights = iter(list(net.parameters()))
    conv = torch.nn.functional.conv2d
    x = torch.randn(N, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    h = x
    for _ in range(3):
        h = conv(h, next(weights), next(weights), padding=1)
        h = torch.nn.functional.max_pool2d(h, 3, 2, 1)
        for _ in range(2):
            inner = conv(h.relu(), next(weights), next(weights), padding=1)
            h = h + conv(inner.relu(), next(weights), next(weights), padding=1)
    h = torch.nn.functional.linear(h.relu().flatten(1), next(weights), next(weights)).relu()
    torch.testing.assert_close(net(x), h)
    assert next(weights, None) is None


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((4, 84, 84), ((0, 1, 2, 3), 4, 84, 84)),
        ((72, 96, 4), ((0, 3, 1, 2), 4, 72, 96)),
        ((40, 40, 40), ((0, 1, 2, 3), 40, 40, 40)),
        ((48, 64), ((0, 1, 2), 1, 48, 64)),
        ((4, 64, 80, 3), ((0, 1, 4, 2, 3), 12, 64, 80)),
        ((4, 3, 64, 80), ((0, 1, 2, 3, 4), 12, 64, 80)),
    ],
)
def test_the_smaller_outer_axis_holds_the_channels(shape: tuple[int, ...], expected: tuple[object, ...]):
    assert tuple(image_layout(shape)) == expected


def encode(space: spaces.Box, leaf: Tensor, seed: int = 0) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ImageEncoder(space, nature_cnn)(leaf)


def test_channels_first_and_last_give_the_same_features():
    first = pixels(N, 4, 40, 44)
    expected = encode(image(4, 40, 44), first)
    torch.testing.assert_close(encode(image(40, 44, 4), first.permute(0, 2, 3, 1).contiguous()), expected)
    assert expected.std() > 0


def test_a_stack_of_frames_joins_the_channels():
    leaf = pixels(N, 4, 40, 44, 3)
    joined = leaf.permute(0, 1, 4, 2, 3).reshape(N, 12, 40, 44)
    torch.testing.assert_close(encode(image(4, 40, 44, 3), leaf), encode(image(12, 40, 44), joined))


def test_bytes_are_divided_by_255_and_floats_are_not():
    leaf = pixels(N, 4, 40, 44)
    real = spaces.Box(0, 1, (4, 40, 44), np.float32)
    scaled = leaf.float() / 255
    kept = scaled.clone()
    torch.testing.assert_close(encode(real, scaled), encode(image(4, 40, 44), leaf))
    assert torch.equal(scaled, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 4, 5])
def test_pixels_become_the_same_numbers_in_channels_last_from_any_order_of_memory(channels: int, dtype: torch.dtype):
    planes = pixels(N, channels, 7, 11)
    last = planes.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    for given in (planes, last, pixels(N, 2 * channels, 7, 11)[:, ::2]):
        found = as_numbers(given, dtype)
        assert found.dtype == dtype
        assert torch.equal(found, given.to(dtype))
        assert found.is_contiguous(memory_format=torch.channels_last)
    floats = planes.float()
    as_numbers(floats, torch.float32).zero_()
    assert torch.equal(floats, planes.float())  # it is a copy


def test_weights_of_convolutions_are_channels_last():
    weights = [p for p in Torso(image(4, 84, 84)).parameters() if p.dim() == 4]
    assert len(weights) == 3
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


@pytest.mark.parametrize(
    ("name", "shape", "features"),
    [
        ("auto", (4, 84, 84), 512),
        ("auto", (7, 7, 3), 64),
        ("nips_cnn", (4, 84, 84), 256),
        ("nature_cnn", (36, 36, 1), 512),
        ("impala_resnet", (72, 96, 4), 256),
        ("mlp", (4, 84, 84), 64),
    ],
)
def test_the_name_chooses_the_network(name: TorsoName, shape: tuple[int, ...], features: int):
    assert Torso(image(*shape), name)(pixels(N, *shape)).shape == (N, features)


@pytest.mark.parametrize(
    ("name", "side", "advice"),
    [("nature_cnn", 35, "mlp or impala_resnet"), ("nips_cnn", 19, "mlp"), ("impala_resnet", 7, "mlp")],
)
def test_too_small_images_are_refused_by_size(name: TorsoName, side: int, advice: str):
    space = spaces.Dict({"eye": image(1, side, 99)})
    with pytest.raises(
        ValueError,
        match=rf"'eye' of shape \(1, {side}, 99\).*{name} needs at least {side + 1}.*use --net.torso {advice}",
    ):
        Torso(space, name)
    Torso(image(1, side + 1, 99), name)


MIXED = spaces.Dict(
    {
        "action_mask": spaces.MultiBinary(4),
        "choice": spaces.Discrete(3, start=2),
        "choices": spaces.MultiDiscrete([2, 4], start=[0, 5]),
        "eye": image(1, 40, 40),
        "bits": spaces.MultiBinary([2, 2]),
        "pair": spaces.Tuple((spaces.Box(-1, 1, (2,), np.float64), spaces.Box(-1, 1, (), np.float32))),
    }
)


def mixed() -> dict[str, object]:
    return {
        "action_mask": torch.ones(N, 4, dtype=torch.int8),
        "choice": torch.tensor([2, 3, 4]),
        "choices": torch.tensor([[0, 5], [1, 8], [0, 6]]),
        "eye": pixels(N, 1, 40, 40),
        "bits": torch.tensor([[[0, 1], [1, 1]]] * N, dtype=torch.int8),
        "pair": (torch.arange(6.0).reshape(N, 2), torch.tensor([0.1, 0.2, 0.3])),
    }


def test_leaves_become_one_hot_or_flat_vectors_side_by_side():
    torso = Torso(MIXED)
    assert torso.vectors is not None
    seen: list[Tensor] = []
    torso.vectors.network = nn.Sequential(nn.Identity())
    torso.vectors.network.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    features = torso(mixed())
    bits, pair = [0, 1, 1, 1], [[0, 1, 0.1], [2, 3, 0.2], [4, 5, 0.3]]
    choice = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    choices = [[1, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 1], [1, 0, 0, 1, 0, 0]]
    expected = torch.tensor([[*bits, *choice[n], *choices[n], *pair[n]] for n in range(N)])
    torch.testing.assert_close(seen[0], expected)
    assert features.shape == (N, 512 + 16)


def test_the_action_mask_is_no_feature():
    torso, obs = Torso(MIXED), mixed()
    expected = torso(obs)
    assert torch.equal(torso(obs | {"action_mask": torch.zeros(N, 4, dtype=torch.int8)}), expected)
    assert not torch.equal(torso(obs | {"choice": torch.tensor([4, 3, 4])}), expected)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Dict({"action_mask": spaces.MultiBinary(2)}),
        spaces.Tuple(()),
        spaces.Box(-1, 1, (0,)),
    ],
)
def test_a_space_without_features_is_refused(space: Space[object]):
    with pytest.raises(ValueError, match="holds nothing that a network could see"):
        Torso(space)


def test_an_unsupported_space_is_named():
    with pytest.raises(ValueError, match=r"Text\(.*expected Box, Discrete, MultiDiscrete or MultiBinary"):
        Torso(spaces.Dict({"speech": spaces.Text(5)}))


@pytest.mark.parametrize(
    "space", [MIXED, image(48, 64), spaces.Discrete(3, start=1), spaces.Box(-1, 1, (), np.float64)]
)
def test_dummy_observations_fit_their_space(space: Space[object]):
    features = Torso(space)(dummy_observations(space, 5))
    assert features.dtype == torch.float32
    assert len(features) == 5
