"""What an auto-encoder draws, beside what it saw: pictures for `slipstream watch --reconstruct`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from slipstream import slab, tree
from slipstream.nets.actor_critic import ActorCritic
from slipstream.nets.autoencoder import Decoder
from slipstream.tree import Tree

Frame = NDArray[np.uint8]


def beside(frame: Frame, seen: Frame, drawn: Frame) -> Frame:
    """The frame with two smaller pictures of its height to its right."""
    height = frame.shape[0]
    panels = [np.asarray(Image.fromarray(each).resize((_scaled(each, height), height))) for each in (seen, drawn)]
    return np.concatenate([frame, *panels], axis=1)


def sketcher(policy: ActorCritic, decoder: Decoder) -> Callable[[Tree], tuple[Frame, Frame]]:
    """From an observation `[1, *O]`: the first image in it, and what the decoder draws of that, as RGB."""

    @torch.no_grad()
    def sketch(obs: Tree) -> tuple[Frame, Frame]:
        rows = slab.tensors(obs, next(policy.parameters()).device)
        drawn = decoder(policy.encode(rows).latent)
        path = next(iter(drawn))
        pixels = decoder.pixels(path, dict(tree.items(rows))[path])
        return _rgb(pixels[0]), _rgb(drawn[path][0])

    return sketch


def _rgb(pixels: Tensor) -> Frame:
    """`[C, H, W]` in [0, 1] as bytes `[H, W, 3]`: colours if there are three channels, else the last one in grey."""
    shown = pixels if pixels.shape[0] == 3 else pixels[-1:].expand(3, -1, -1)
    return (shown.clamp(0, 1) * 255).byte().permute(1, 2, 0).cpu().numpy()


def _scaled(picture: Frame, height: int) -> int:
    """Width of a picture at another height, in whole pixels."""
    return max(1, round(picture.shape[1] * height / picture.shape[0]))
