"""Columns of a slab in which no slot comes twice."""

from __future__ import annotations

import torch
from torch import Tensor


def rounds(slot: Tensor) -> list[Tensor]:
    """Columns such that no slot comes twice in one round, and a slot's columns are in rounds one after the other.

    Under `async` a fast lane has several columns of one slab, the earlier unroll in the earlier column.

    Args:
        slot: int64 `[B]`, the slot of each column.

    Returns:
        int64 tensors of columns; a single one where all slots differ.
    """
    seen: dict[int, int] = {}
    found: list[list[int]] = []
    for column, owner in enumerate(slot.tolist()):
        number = seen.get(owner, 0)
        seen[owner] = number + 1
        if number == len(found):
            found.append([])
        found[number].append(column)
    return [torch.tensor(columns) for columns in found]
