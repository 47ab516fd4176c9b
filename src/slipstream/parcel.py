"""Objects with tensors in them as one tensor of bytes, for what carries tensors only; between processes of one run.

    int64 [n], sizes of n pieces | pickle of everything but numbers | numbers of the first tensor | of the second | ...

Every piece begins at a multiple of 64 bytes, as PyTorch aligns its own memory: kernels may round differently elsewhere.
Tensors keep the order of their numbers in memory (channels last, say). What is unpacked lies in the parcel's memory.

Unpacking runs what a pickle says: parcels are for processes that this run has started, never for files.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64


def pack(content: object) -> Tensor:
    """`content` as uint8 `[n]`.

    Args:
        content: Dataclasses, named tuples, trees and plain values, with tensors of any kind of dense memory in them.
    """
    numbers: list[Tensor] = []
    skeleton = io.BytesIO()
    _Pickler(skeleton, numbers).dump(content)
    head = torch.frombuffer(bytearray(skeleton.getvalue()), dtype=torch.uint8)
    pieces = [head, *(part.view(torch.uint8) for part in numbers)]
    sizes = torch.tensor([len(pieces), *(len(piece) for piece in pieces)])
    pieces.insert(0, sizes.view(torch.uint8))
    parcel = torch.empty(sum(_aligned(len(piece)) for piece in pieces), dtype=torch.uint8)
    start = 0
    for piece in pieces:
        parcel[start : start + len(piece)] = piece
        start += _aligned(len(piece))
    return parcel


def unpack(parcel: Tensor) -> Any:
    """What was packed; its tensors share the parcel's memory."""
    count = int(parcel[:8].view(torch.int64))
    sizes = [8 * (count + 1), *parcel[8 : 8 * (count + 1)].view(torch.int64).tolist()]
    starts = np.cumsum([0, *(_aligned(size) for size in sizes)])
    pieces = [parcel[start : start + size] for start, size in zip(starts, sizes, strict=False)]
    return _Unpickler(io.BytesIO(pieces[1].numpy().tobytes()), pieces[2:]).load()


def in_memory_order(tensor: Tensor) -> Tensor:
    """The numbers of a tensor whose memory has no gaps, `[n]`, in the order in which they lie there."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _dense(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, without gaps in its memory."""
    tensor = tensor.detach().cpu()
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor if channels_last else tensor.contiguous()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, numbers: list[Tensor]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._numbers = numbers

    def persistent_id(self, obj: object) -> object:
        if not isinstance(obj, Tensor):
            return None
        dense = _dense(obj)
        self._numbers.append(in_memory_order(dense))
        return len(self._numbers) - 1, dense.dtype, tuple(dense.shape), dense.stride()


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, pieces: list[Tensor]) -> None:
        super().__init__(file)
        self._pieces = pieces

    def persistent_load(self, pid: Any) -> Tensor:
        number, dtype, shape, stride = pid
        flat = self._pieces[number].view(dtype)
        return flat.as_strided(shape, stride, flat.storage_offset())
