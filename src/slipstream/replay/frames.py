"""Stacked frames, each stored once: observations `[k, *F]` that share k-1 frames with the observation before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream.replay.ring import put, spans

Array = NDArray[Any]
Index = NDArray[np.int64]

_SPARE = 0.02
"""Room for the frames that begin a new stack (k - 1 more than a row), as a share of the rows."""


class Frames:
    """A ring of frames per slot, and for every row the number of its newest frame.

    An observation is stored as one frame if its first k-1 frames are the last k-1 of the row before, byte by byte, and
    as k frames otherwise: at the start of an episode, whatever an environment pads its first stacks with. What is read
    is therefore exactly what was written.

    Rows and frames of a slot are numbered from its beginning on; row r lies at place r modulo the number of rows kept,
    frame f likewise. Where new stacks begin more often than there is room for (once in 150 rows, for stacks of 4), the
    oldest rows lose their frames before their place is needed: `oldest` knows.

    Args:
        memory: Tensors as `layout` has them.
    """

    def __init__(self, memory: dict[str, Tensor]) -> None:
        self._frames, self._newest = memory["frames"], memory["newest"].numpy()
        slots, self._kept = self._frames.shape[:2]
        self._stack = int(memory["stack"].numel())
        self._written = np.zeros(slots, np.int64)  # frames so far
        self._flat = self._frames.flatten(0, 1)

    @staticmethod
    def layout(leaf: Tensor, slots: int, rows: int) -> dict[str, Tensor]:
        """What the store consists of, as tensors without memory.

        Args:
            leaf: An observation `[k, *F]`; shape and dtype count.
            slots: Slots.
            rows: Rows per slot.
        """
        stack = leaf.shape[0]
        kept = rows + max(int(rows * _SPARE), 8 * stack) + stack
        return {
            "frames": torch.empty((slots, kept, *leaf.shape[1:]), dtype=leaf.dtype, device="meta"),
            "newest": torch.empty((slots, rows), dtype=torch.int64, device="meta"),
            "stack": torch.empty(stack, dtype=torch.bool, device="meta"),
        }

    def write(self, obs: Array, slots: Index, rows: Index, follows: bool) -> None:
        """Stores rows of some slots, one after the other.

        Args:
            obs: `[T, B, k, *F]`.
            slots: int64 `[B]`, all different.
            rows: int64 `[B]`, numbers of the first rows.
            follows: Whether the first row follows the newest that the slot holds.
        """
        count, columns, stack = obs.shape[:3]
        linked = np.zeros((count, columns), np.bool_)
        if follows:
            linked[0] = continues(self.read(slots, rows - 1).numpy(), obs[0])
        for t in range(1, count):
            linked[t] = continues(obs[t - 1], obs[t])
        numbers = self._written[slots] + np.where(linked, 1, stack).cumsum(axis=0) - 1  # of the newest frame of a row
        kept, flat = self._kept, self._frames.numpy()
        for back in range(stack):
            # The others would make room at once, were they written in their order.
            stays = numbers - back > numbers[-1] - kept
            row, column = (stays if back == 0 else stays & ~linked).nonzero()
            places = (numbers[row, column] - back) % kept
            flat[slots[column], places] = obs[row, column, stack - 1 - back]
        places = (rows + np.arange(count)[:, None]) % self._newest.shape[1]
        self._newest[slots, places] = numbers
        self._written[slots] = numbers[-1] + 1

    def read(self, slots: Index, rows: Index) -> Tensor:
        """Observations `[N, k, *F]` of rows that are still whole."""
        newest = self._newest[slots, rows % self._newest.shape[1]]
        places = (newest[:, None] + np.arange(1 - self._stack, 1)) % self._kept
        flat = (places + slots[:, None] * self._kept).ravel()
        picked = self._flat.index_select(0, torch.from_numpy(flat))
        return picked.unflatten(0, (len(slots), self._stack))

    def saved(self, begin: Index, end: Index) -> dict[str, Tensor]:
        """Copies of whole rows `begin[s] .. end[s]-1` of every slot s, for `load`; each frame is there once.

        Args:
            begin: int64 `[B]`.
            end: int64 `[B]`; a slot has no rows where it is not above `begin`.

        Returns:
            `newest` int64 `[N]`, numbers of the rows' newest frames, and `frames` `[M, *F]`, both slot by slot.
        """
        slots, rows = spans(begin, end)
        owners, numbers = spans(*self._span(begin, end))
        flat = torch.from_numpy(owners * self._kept + numbers % self._kept)
        newest = self._newest[slots, rows % self._newest.shape[1]]
        return {"newest": torch.from_numpy(newest), "frames": self._flat.index_select(0, flat)}

    def load(self, tensors: Mapping[str, Tensor], begin: Index, end: Index) -> None:
        """Takes in what `saved` returned for the same rows; rows of a slot come in order, the newest at last.

        Raises:
            KeyError: A tensor is missing.
            ValueError: Number, shape or dtype is another.
        """
        put(torch.from_numpy(self._newest), *spans(begin, end), tensors["newest"])
        first, last = self._span(begin, end)
        put(self._frames, *spans(first, last), tensors["frames"])
        self._written = np.where(end > begin, last, self._written)

    def oldest(self, oldest: Index, head: Index) -> Index:
        """The oldest row of every slot, from `oldest` up to `head`, whose frames have not been overwritten.

        Args:
            oldest: int64 `[B]`, rows below are gone already.
            head: int64 `[B]`, the newest row.
        """
        oldest, every = oldest.copy(), np.arange(len(oldest))
        while True:
            first = self._newest[every, oldest % self._newest.shape[1]] + 1 - self._stack
            torn = (oldest < head) & (first < self._written - self._kept)
            if not torn.any():
                return oldest
            oldest += torn

    @staticmethod
    def counts(newest: Index, rows: Index, stack: int) -> Index:
        """Of what `saved` returned, the frames of every slot, int64 `[B]`.

        Args:
            newest: int64 `[N]`, as returned.
            rows: int64 `[B]`, rows of every slot among them.
            stack: k.
        """
        some, last = rows > 0, rows.cumsum() - 1
        found = np.zeros_like(rows)
        found[some] = newest[last[some]] - newest[(last - rows + 1)[some]] + stack
        return found

    def _span(self, begin: Index, end: Index) -> tuple[Index, Index]:
        """Of the frames of rows `begin .. end-1`, the first, and after the last; none where there are no rows."""
        every, rows = np.arange(len(begin)), self._newest.shape[1]
        first = self._newest[every, begin % rows] + 1 - self._stack
        last = self._newest[every, (end - 1) % rows] + 1
        return np.where(end > begin, first, 0), np.where(end > begin, last, 0)


def continues(before: Array, after: Array) -> NDArray[np.bool_]:
    """Whether stacks `[B, k, *F]` hold the frames of those before but for the oldest, and a new one; bool `[B]`."""
    return (_bits(before)[:, 1:] == _bits(after)[:, :-1]).reshape(len(after), -1).all(axis=1)


def _bits(array: Array) -> Array:
    """Floats as integers, since 0.0 equals -0.0."""
    return array.view(f"u{array.itemsize}") if array.dtype.kind == "f" else array
