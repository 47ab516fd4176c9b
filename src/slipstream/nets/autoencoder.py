"""An auto-encoder in the policy: a decoder that draws the observation from what the torso made of it.

    z = latent(torso(o))        L = weight mean over pixels of (decoder(z) - o)^2

The policy and value heads see z as well, so that reconstruction shapes what they see (Luo et al., 2019: an auto-encoder
in the policy of IMPALA). Variational (Kingma and Welling, 2014), the decoder sees a draw from N(z, sigma^2(o)), and the
divergence from N(0, 1) is added; the heads see the mean z.

The decoder belongs to the learner: no collector has it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from slipstream import ranges, tree
from slipstream.nets.initialize import keyed_initialisation
from slipstream.nets.torso import as_pixels, image_layout
from slipstream.nets.trunk import Encoded, in_bfloat16
from slipstream.ops.spaces import feature_space, is_image
from slipstream.tree import Tree
from slipstream.types import EnvSpec

_CHANNELS = 32
_UPSAMPLED = 8  # two times four


@dataclass(frozen=True)
class AutoEncoder:
    """Reconstruction of image observations beside the algorithm's own loss.

    Attributes:
        weight: Weight of the reconstruction loss, the mean squared error over pixels in [0, 1]; 0 for no decoder.
        frames: What is drawn of stacked frames: the newest, or the whole stack.
        shapes_encoder: Whether its gradient reaches the torso; otherwise only the decoder learns.
        variational: Whether the decoder sees a draw around the latent.
        beta: Weight of the divergence of that draw from a standard normal one, per nat and pixel.
    """

    weight: float = 0.0
    frames: Literal["newest", "stack"] = "newest"
    shapes_encoder: bool = True
    variational: bool = False
    beta: float = 1.0

    def __post_init__(self) -> None:
        """Refuses numbers that mean nothing."""
        ranges.at_least(self, "autoencoder.", 0, "weight", "beta")


class Decoder(nn.Module):
    """Draws the image leaves of observations from latents; see `make_decoder`.

    Attributes:
        dice_width: Uniform numbers that `loss` wants per row; 0 unless variational.

    Args:
        spec: What the environments show.
        options: What is drawn.
        features: F.
        latent: L.
        bfloat16: Whether it is computed as a torso in bfloat16 is; what it draws, and the loss, are float32.

    Raises:
        ValueError: No observation is an image.
    """

    def __init__(self, spec: EnvSpec, options: AutoEncoder, features: int, latent: int, bfloat16: bool = False) -> None:
        super().__init__()
        self._options, self._bfloat16 = options, bfloat16
        leaves = [(path, leaf) for path, leaf in tree.items(feature_space(spec.observation_space)) if is_image(leaf)]
        if not leaves:
            raise ValueError(
                f"autoencoder.weight={options.weight}: no observation of {spec.id} is an image; set it to 0"
            )
        self._paths = [path for path, _ in leaves]
        self._drawings = nn.ModuleList(_Drawing(leaf, latent, self._frames(spec, leaf)) for _, leaf in leaves)
        self.log_variance = nn.Linear(features, latent) if options.variational else None
        self.dice_width = latent if options.variational else 0

    def forward(self, latent: Tensor) -> Tree:
        """Pixels in about [0, 1] of every image leaf by path, float32 `[N, C, H, W]`."""
        with in_bfloat16(latent.device, self._bfloat16):
            return {path: drawing(latent).float() for path, drawing in zip(self._paths, self._drawings, strict=True)}

    def pixels(self, path: str, leaf: Tensor) -> Tensor:
        """What is to be drawn of the leaf `[N, *O]` at `path`: float32 `[N, C, H, W]` in [0, 1]."""
        return dict(self._pairs())[path].pixels(leaf)

    def loss(self, encoded: Encoded, obs: Tree, dice: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted squared error, the mean over pixels (and the divergence, if variational), float32 `[N]`.

        Args:
            encoded: Rows as the trunk sees them.
            obs: Tree `[N, *O]`.
            dice: float32 `[N, L]`, uniform in `[0, 1)`, if variational.

        Returns:
            The loss, and what it consists of without weights, for metrics: the squared error, and the divergence.
        """
        features, latent = encoded if self._options.shapes_encoder else (part.detach() for part in encoded)
        divergence = None
        if self.log_variance is not None:
            assert dice is not None, "a variational auto-encoder draws"
            log_variance = self.log_variance(features)
            divergence = 0.5 * (latent.square() + log_variance.exp() - 1.0 - log_variance).sum(-1)
            latent = latent + (0.5 * log_variance).exp() * torch.special.ndtri(dice + 2.0**-24)
        found, drawn = dict(tree.items(obs)), self(latent)
        errors = [drawing.squared_error(drawn[path], found[path]) for path, drawing in self._pairs()]
        error = torch.cat(errors, 1)
        loss, pixels = error.mean(1), error.shape[1]
        parts = {"reconstruction_loss": loss.detach()}
        if divergence is not None:
            loss = loss + self._options.beta / pixels * divergence
            parts["latent_kl"] = divergence.detach()
        return self._options.weight * loss, parts

    def _pairs(self) -> list[tuple[str, _Drawing]]:
        drawings = [drawing for drawing in self._drawings if isinstance(drawing, _Drawing)]
        return list(zip(self._paths, drawings, strict=True))

    def _frames(self, spec: EnvSpec, leaf: spaces.Box) -> int:
        """Frames in a stack of which only the newest is drawn."""
        stacked = self._options.frames == "newest" and leaf.shape[0] == spec.frame_stack
        return spec.frame_stack if stacked else 1


class _Drawing(nn.Module):
    """One image leaf: linear, a transposed convolution of stride 2, a sub-pixel convolution of 4, cut to the size.

    The sub-pixel one (Shi et al., 2016) works at a quarter of the size, where transposed ones up to the whole size cost
    three times as much as the torso that they mirror.
    """

    def __init__(self, leaf: spaces.Box, latent: int, stack: int) -> None:
        super().__init__()
        self._layout = image_layout(leaf.shape)
        self._divisor = 255.0 if leaf.dtype == np.uint8 else 1.0
        self._channels = self._layout.channels // stack
        height, width = (math.ceil(size / _UPSAMPLED) for size in self._layout[2:])
        self.network = nn.Sequential(
            nn.Linear(latent, _CHANNELS * height * width),
            nn.ReLU(),
            nn.Unflatten(1, (_CHANNELS, height, width)),
            nn.ConvTranspose2d(_CHANNELS, _CHANNELS // 2, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(_CHANNELS // 2, 16 * self._channels, 3, padding=1),
            nn.PixelShuffle(4),
        )

    def forward(self, latent: Tensor) -> Tensor:
        """`[N, L]` to `[N, C, H, W]`."""
        _, _, height, width = self._layout
        return self.network(latent)[:, :, :height, :width]

    def squared_error(self, drawn: Tensor, leaf: Tensor) -> Tensor:
        """`(drawn - pixels)^2` of the newest frame or the stack, float32 `[N, C * H * W]`."""
        return (drawn - self.pixels(leaf)).square().flatten(1)

    def pixels(self, leaf: Tensor) -> Tensor:
        """The newest frame of the leaf, or its stack, float32 `[N, C, H, W]`."""
        return as_pixels(leaf, self._layout)[:, -self._channels :].float() / self._divisor


def make_decoder(
    spec: EnvSpec, options: AutoEncoder, features: int, latent: int, seed: int, bfloat16: bool = False
) -> Decoder:
    """A decoder on the CPU whose weights are a function of `seed` and shapes only; PyTorch's own initialisation."""
    with keyed_initialisation(seed, "decoder"):
        return Decoder(spec, options, features, latent, bfloat16)
