"""Rings, one per slot, `[B, n, ...]`: a slot's entries are numbered from its beginning on, number i lies at i % n."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Index = NDArray[np.int64]


def spans(begin: Index, end: Index) -> tuple[Index, Index]:
    """The numbers `begin[s] .. end[s]-1` of every slot s, none where `end` is not above: slots and numbers, `[N]` each.

    They are in the order of the slots.
    """
    counts = np.maximum(end - begin, 0)
    slots = np.repeat(np.arange(len(counts)), counts)
    offset = np.arange(len(slots)) - np.repeat(counts.cumsum() - counts, counts)
    return slots, begin[slots] + offset


def put(ring: Tensor, slots: Index, numbers: Index, entries: Tensor) -> None:
    """Writes entries `[N, ...]` where those of `slots` and `numbers`, int64 `[N]` each, lie.

    Raises:
        ValueError: If number, shape or dtype of the entries is another; nothing has changed.
    """
    shape = (len(slots), *ring.shape[2:])
    if entries.shape != shape or entries.dtype != ring.dtype:
        raise ValueError(
            f"the replay has room for {ring.dtype} {list(shape)} where {entries.dtype} {list(entries.shape)} was "
            f"saved; it is not the one that was saved"
        )
    ring.numpy()[slots, numbers % ring.shape[1]] = entries.numpy()
