"""Torsos: from a tree of observations `[N, *O]` to features float32 `[N, F]`.

One encoder per leaf of the observation, features side by side:

- images go through a convolutional network (`nips_cnn`, `nature_cnn`, `impala_resnet`);
- `Discrete` and `MultiDiscrete` leaves become one-hot vectors, everything else is flattened to floats, and all of
  these pass together through one multilayer perceptron;
- the `action_mask` of a `Dict` is left out.

An image is a Box of three dimensions, or of two if uint8 (grey). Its channel axis is the smaller one of the first and
the last dimension (the first if they are equal), so `4x84x84` and `72x96x4` both work. A Box of four dimensions is a
stack of images; the stack joins the channels. uint8 stays uint8 until here and is divided by 255.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from gymnasium import Space, spaces
from torch import Tensor, nn

from slipstream import tree
from slipstream.ops.spaces import feature_space, is_image
from slipstream.tree import Tree

TorsoName = Literal["auto", "mlp", "nips_cnn", "nature_cnn", "impala_resnet"]
Activation = Literal["tanh", "relu"]

_SMALLEST = {"nips_cnn": 20, "nature_cnn": 36, "impala_resnet": 8}
"""Least height and width, in pixels, for which the last convolution still has an output worth the name."""


def mlp(inputs: int, hidden: tuple[int, ...], activation: Activation) -> nn.Sequential:
    """Multilayer perceptron: linear layers of the sizes `hidden`, each followed by the activation; `[N, inputs]` in."""
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(inputs, size), nn.Tanh() if activation == "tanh" else nn.ReLU()]
        inputs = size
    return nn.Sequential(*layers)


def nips_cnn(channels: int, height: int, width: int) -> nn.Sequential:
    """Network of Mnih et al. (2013), as in PAAC and A3C: conv 16 8x8/4, conv 32 4x4/2, linear 256; ReLU."""
    convolutions: list[nn.Module] = [nn.Conv2d(channels, 16, 8, 4), nn.ReLU(), nn.Conv2d(16, 32, 4, 2), nn.ReLU()]
    return _with_linear(convolutions, (channels, height, width), 256)


def nature_cnn(channels: int, height: int, width: int) -> nn.Sequential:
    """Network of Mnih et al. (2015): conv 32 8x8/4, conv 64 4x4/2, conv 64 3x3/1, linear 512; ReLU."""
    convolutions: list[nn.Module] = [nn.Conv2d(channels, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU()]
    convolutions += [nn.Conv2d(64, 64, 3, 1), nn.ReLU()]
    return _with_linear(convolutions, (channels, height, width), 512)


def impala_resnet(channels: int, height: int, width: int) -> nn.Sequential:
    """Deep network of Espeholt et al. (2018, figure 3 right): sections of 16, 32, 32 channels, linear 256.

    A section is conv 3x3, max-pool 3x3/2 and two residual blocks.
    """
    layers: list[nn.Module] = []
    inputs = channels
    for outputs in (16, 32, 32):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.MaxPool2d(3, 2, padding=1)]
        layers += [ResidualBlock(outputs), ResidualBlock(outputs)]
        inputs = outputs
    return _with_linear([*layers, nn.ReLU()], (channels, height, width), 256)


class ResidualBlock(nn.Module):
    """`x + conv(relu(conv(relu(x))))` with 3x3 convolutions that keep the shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, H, W]` to the same shape."""
        return x + self.second(self.first(x.relu()).relu())


class ImageLayout(NamedTuple):
    """How to bring a leaf `[N, *shape]` to `[N, C, H, W]`.

    Attributes:
        permutation: Order of the axes of `[N, *shape]` that puts the channels (and the stack) first.
        channels: C, the stack included.
        height: H, pixels.
        width: W, pixels.
    """

    permutation: tuple[int, ...]
    channels: int
    height: int
    width: int


def image_layout(shape: tuple[int, ...]) -> ImageLayout:
    """The layout of an image leaf by the rule of this module's docstring.

    Args:
        shape: Shape of one observation, two to four dimensions.
    """
    if len(shape) == 2:
        return ImageLayout((0, 1, 2), 1, *shape)
    stack = (1,) if len(shape) == 4 else ()
    first, middle, last = range(len(shape) - 2, len(shape) + 1)
    axes = (first, middle, last) if shape[first - 1] <= shape[last - 1] else (last, first, middle)
    channels, height, width = (shape[axis - 1] for axis in axes)
    return ImageLayout((0, *stack, *axes), channels * math.prod(shape[: len(stack)]), height, width)


def as_pixels(leaf: Tensor, layout: ImageLayout) -> Tensor:
    """A leaf `[N, *O]` as `[N, C, H, W]`, of its own dtype."""
    pixels = leaf.permute(layout.permutation)
    return pixels.reshape(len(leaf), layout.channels, *pixels.shape[-2:])


def as_numbers(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of pixels `[N, C, H, W]` as `dtype`, in the memory order of channels last. Bytes are exact in bfloat16."""
    if not pixels.is_contiguous(memory_format=torch.channels_last):
        # Plane by plane, before the cast: a cast that changes the order of memory takes two to three times as long.
        pixels = torch.stack(pixels.unbind(1), dim=-1).permute(0, 3, 1, 2)
    return pixels.to(dtype, copy=True)


class ImageEncoder(nn.Module):
    """Pixels of one leaf to features.

    Args:
        space: The leaf, an image in the sense of the module's docstring.
        network: Builds the convolutional network from (channels, height, width).
    """

    def __init__(self, space: spaces.Box, network: Callable[[int, int, int], nn.Sequential]) -> None:
        super().__init__()
        self._layout = image_layout(space.shape)
        self._divisor = 255.0 if space.dtype == np.uint8 else 1.0
        self.network = network(*self._layout[1:])

    def forward(self, leaf: Tensor) -> Tensor:
        """`[N, *O]` to float32 `[N, F]`."""
        device = leaf.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        return self.network(as_numbers(as_pixels(leaf, self._layout), dtype).div_(self._divisor))


class VectorEncoder(nn.Module):
    """Every leaf that is no image, one-hot or flattened, side by side through one perceptron.

    Args:
        leaves: The leaf spaces, in the order in which `forward` gets their observations.
        hidden: Sizes of the layers.
        activation: Activation after each layer.
    """

    def __init__(self, leaves: list[Space[Any]], hidden: tuple[int, ...], activation: Activation) -> None:
        super().__init__()
        self._leaves = leaves
        self.network = mlp(sum(_vector_size(leaf) for leaf in leaves), hidden, activation)

    def forward(self, observations: list[Tensor]) -> Tensor:
        """Leaves `[N, *O]` to float32 `[N, hidden[-1]]`."""
        vectors = [_vector(space, leaf) for space, leaf in zip(self._leaves, observations, strict=True)]
        return self.network(vectors[0] if len(vectors) == 1 else torch.cat(vectors, dim=1))


class Torso(nn.Module):
    """The torso of an observation space: an encoder per image, one for everything else, features side by side.

    Args:
        space: Observation space.
        name: Network for images; `mlp` flattens them instead, `auto` is `nature_cnn` for images of at least 36x36
            pixels and `mlp` otherwise.
        hidden: Layer sizes of the perceptron.
        activation: Activation of the perceptron.

    Raises:
        ValueError: The space has no features, or an image is too small for the network.
    """

    def __init__(
        self,
        space: Space[Any],
        name: TorsoName = "auto",
        hidden: tuple[int, ...] = (64, 64),
        activation: Activation = "tanh",
    ) -> None:
        super().__init__()
        leaves = tree.items(feature_space(space))
        networks = {path: network for path, leaf in leaves if (network := _network_for(path, leaf, name)) is not None}
        self._images = list(networks)
        self._vectors = [path for path, _ in leaves if path not in networks]
        spaces_ = dict(leaves)
        self.images = nn.ModuleList(ImageEncoder(spaces_[path], networks[path]) for path in self._images)
        vectors = [spaces_[path] for path in self._vectors]
        self.vectors = VectorEncoder(vectors, hidden, activation) if vectors else None
        self._plain = isinstance(space, spaces.Box) and space.dtype.kind == "f" and len(space.shape) == 1

    @property
    def perceptron(self) -> nn.Sequential | None:
        """The whole torso, if observations are one vector of floats and its layers are as `mlp` makes them."""
        if self.vectors is None or not self._plain:
            return None
        layers = list(self.vectors.network)
        linear, activations = {type(layer) for layer in layers[::2]}, {type(layer) for layer in layers[1::2]}
        as_made = linear <= {nn.Linear} and len(layers) % 2 == 0 and len(activations) <= 1
        return self.vectors.network if as_made else None

    def cut(self) -> None:
        """Takes away the last linear layer of every encoder and its activation, for heads that bring their own."""
        for encoder in self.modules():
            if isinstance(encoder, ImageEncoder | VectorEncoder):
                encoder.network = nn.Sequential(*list(encoder.network)[:-2])

    def forward(self, obs: Tree) -> Tensor:
        """Tree `[N, *O]` to float32 `[N, F]`."""
        found = dict(tree.items(obs)) if isinstance(obs, dict | tuple) else {"": obs}
        features = [encoder(found[path]) for path, encoder in zip(self._images, self.images, strict=True)]
        if self.vectors is not None:
            features.append(self.vectors([found[path] for path in self._vectors]))
        return features[0] if len(features) == 1 else torch.cat(features, dim=1)


def _network_for(path: str, space: Space[Any], name: TorsoName) -> Callable[[int, int, int], nn.Sequential] | None:
    """Builder of the convolutional network for a leaf, or None where it goes to the perceptron."""
    if name == "mlp" or not isinstance(space, spaces.Box) or not is_image(space):
        return None
    side = min(image_layout(space.shape)[2:])
    if name == "auto":
        return nature_cnn if side >= _SMALLEST["nature_cnn"] else None
    if side < _SMALLEST[name]:
        at = f" '{path}'" if path else ""
        raise ValueError(
            f"observation{at} of shape {space.shape}: {name} needs at least {_SMALLEST[name]} pixels a side; "
            f"use --net.torso mlp{'' if side < _SMALLEST['impala_resnet'] else ' or impala_resnet'}"
        )
    return {"nips_cnn": nips_cnn, "nature_cnn": nature_cnn, "impala_resnet": impala_resnet}[name]


def _with_linear(layers: list[nn.Module], shape: tuple[int, int, int], features: int) -> nn.Sequential:
    """The convolutional layers, flattened into one linear layer with ReLU."""
    convolutional = nn.Sequential(*layers)
    # Channels-last convolutions are 1.4x as fast on the CPU, and tensor cores want them as well.
    for weight in convolutional.parameters():
        if weight.dim() == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        flat = convolutional(torch.zeros(1, *shape)).numel()
    return nn.Sequential(*convolutional, nn.Flatten(), nn.Linear(flat, features), nn.ReLU())


def _vector_size(space: Space[Any]) -> int:
    """Entries of a leaf as a vector."""
    match space:
        case spaces.Discrete():
            return int(space.n)
        case spaces.MultiDiscrete():
            return int(space.nvec.sum())
        case _:
            return math.prod(space.shape or ())


def _vector(space: Space[Any], leaf: Tensor) -> Tensor:
    """A leaf `[N, *O]` as float32 `[N, size]`: choices one-hot, bytes divided by 255, the rest as it is."""
    match space:
        case spaces.Discrete():
            return _one_hot(leaf, int(space.start), int(space.n))
        case spaces.MultiDiscrete():
            choices = zip(leaf.flatten(1).unbind(1), space.start.flat, space.nvec.flat, strict=True)
            return torch.cat([_one_hot(choice, int(start), int(size)) for choice, start, size in choices], dim=1)
        case spaces.Box() if space.dtype == np.uint8:
            return _flat(leaf) / 255.0
        case _:
            return _flat(leaf)


def _flat(leaf: Tensor) -> Tensor:
    """A leaf `[N, *O]` as float32 `[N, size]`."""
    return leaf.float() if leaf.dim() == 2 else leaf.unsqueeze(-1).flatten(1).float()


def _one_hot(choice: Tensor, start: int, size: int) -> Tensor:
    """Integers `[N]` in `start .. start+size-1` as float32 `[N, size]`; without a check that would wait for a GPU."""
    return (choice.unsqueeze(1) == torch.arange(start, start + size, device=choice.device)).float()
