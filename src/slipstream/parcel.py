"""Objects in two parts, between processes of one run: their numbers, as one tensor of bytes, and all else.

    letter     a pickle, for ways that only this run's processes can write to: it is obeyed when it is read
    numbers    what is in the tensors, one after the other, for what carries tensors fast; nothing in them is obeyed

Every tensor begins at a multiple of 64 bytes, as PyTorch aligns its own memory: kernels may round differently
elsewhere. Tensors keep the order of their numbers in memory (channels last, say). What is unpacked lies in the memory
of `numbers`.
"""

from __future__ import annotations

import io
import pickle
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ALIGNMENT = 64


class Letter(NamedTuple):
    """What is said of numbers.

    Attributes:
        size: Bytes of numbers.
        content: The pickle.
    """

    size: int
    content: bytes


def pack(content: object) -> tuple[Letter, Tensor]:
    """The two parts of `content`; the numbers are uint8 `[size]`.

    Args:
        content: Dataclasses, named tuples, trees and plain values, with tensors in them.
    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(content)
    numbers = torch.empty(pickler.size, dtype=torch.uint8)
    for start, piece in pickler.pieces:
        numbers[start : start + len(piece)] = piece
    return Letter(pickler.size, file.getvalue()), numbers


def unpack(letter: Letter, numbers: Tensor) -> Any:
    """What was packed; its tensors share the memory of `numbers`."""
    return _Unpickler(io.BytesIO(letter.content), numbers).load()


def in_memory_order(tensor: Tensor) -> Tensor:
    """The numbers of a tensor whose memory has no gaps, `[n]`, in the order in which they lie there."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _dense(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, without gaps in its memory."""
    tensor = tensor.detach().cpu()
    expected = 1
    for stride, size in sorted(pair for pair in zip(tensor.stride(), tensor.shape, strict=True) if pair[1] != 1):
        if stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor


class _Pickler(pickle.Pickler):
    """Puts numbers aside.

    Attributes:
        size: Of all, in bytes.
        pieces: Where each tensor's begin, and they, uint8.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.size = 0
        self.pieces: list[tuple[int, Tensor]] = []

    def persistent_id(self, obj: object) -> object:
        if not isinstance(obj, Tensor):
            return None
        dense, start = _dense(obj), self.size
        piece = in_memory_order(dense).view(torch.uint8)
        self.pieces.append((start, piece))
        self.size += _aligned(len(piece))
        return start, len(piece), dense.dtype, tuple(dense.shape), dense.stride()


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, numbers: Tensor) -> None:
        super().__init__(file)
        self._numbers = numbers

    def persistent_load(self, pid: Any) -> Tensor:
        start, size, dtype, shape, stride = pid
        flat = self._numbers[start : start + size].view(dtype)
        return flat.as_strided(shape, stride, flat.storage_offset())
