"""Memory that processes share, seen as a tree of tensors."""

from __future__ import annotations

import mmap
import os
import sys

import torch
from torch import Tensor

from slipstream import tree
from slipstream.tree import Tree

_ALIGNMENT = 64  # bytes, as PyTorch aligns its own: kernels may round differently elsewhere


def share(fd: int, layout: Tree, *, reserve: bool = False) -> Tree:
    """Maps a file as tensors; every process that passes the same layout sees the same numbers, zeros at first.

    The mapping lives as long as any of the tensors.

    Args:
        fd: A file, made large enough here; from `process.anonymous_file`, so that it leaves nothing behind.
        layout: Tree of tensors whose shapes and dtypes count; they need no memory (device `meta`).
        reserve: Whether to take all of the space now, where the system can (Linux), so that a disk that fills up later
            ends no process with SIGBUS.

    Raises:
        OSError: If there is not enough space.
    """
    offsets = [0]
    for leaf in tree.leaves(layout):
        size = leaf.numel() * leaf.element_size()
        offsets.append(offsets[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    total = max(offsets[-1], 1)
    os.ftruncate(fd, total)
    if reserve and sys.platform == "linux":
        os.posix_fallocate(fd, 0, total)
    flat = torch.frombuffer(mmap.mmap(fd, total), dtype=torch.uint8)
    starts = iter(offsets)

    def view(leaf: Tensor) -> Tensor:
        start = next(starts)
        part = flat[start : start + leaf.numel() * leaf.element_size()]
        return part.view(leaf.dtype).view(leaf.shape)

    return tree.map(view, layout)
