"""Rows on their way through a network: stacks of frames travel as single frames, and are what they were at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream import tree
from slipstream.replay.frames import continues
from slipstream.tree import Tree

Array = NDArray[Any]


@dataclass(frozen=True)
class Stacks:
    """Observations `[T, B, k, *F]`, most of which share k-1 frames with the one before; a leaf of a tree.

    Attributes:
        linked: bool `[T, B]`, whether an observation does.
        newest: `[n, *F]`, the newest frames of those that do, row by row.
        whole: `[m, k, *F]`, those that do not.
    """

    linked: NDArray[np.bool_]
    newest: Array
    whole: Array

    @staticmethod
    def pack(obs: Array) -> Stacks:
        """Observations `[T, B, k, *F]` with each frame once."""
        linked = np.zeros(obs.shape[:2], np.bool_)
        for t in range(1, len(obs)):
            linked[t] = continues(obs[t - 1], obs[t])
        return Stacks(linked, obs[:, :, -1][linked], obs[~linked])

    def unpack(self, to: Array) -> None:
        """Writes the observations that `pack` was given into `to`, `[T, B, k, *F]`."""
        to[~self.linked] = self.whole
        ends = self.linked.sum(axis=1).cumsum()
        for t in range(1, len(to)):
            columns = self.linked[t]
            to[t, columns, :-1] = to[t - 1, columns, 1:]
            to[t, columns, -1] = self.newest[ends[t - 1] : ends[t]]

    @property
    def nbytes(self) -> int:
        """Bytes of all three."""
        return self.linked.nbytes + self.newest.nbytes + self.whole.nbytes


def pack(obs: Tree, stack: int) -> Tree:
    """A tree of observations `[T, B, *O]` in which those that stack as many frames are `Stacks`."""
    return tree.map(lambda leaf: Stacks.pack(leaf) if stack > 1 and _stacked(leaf, stack) else leaf, obs)


def _stacked(leaf: Array, stack: int) -> bool:
    return leaf.ndim > 3 and leaf.shape[2] == stack
