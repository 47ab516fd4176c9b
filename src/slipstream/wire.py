"""Rows on their way through a network: stacks of frames travel as single frames, and are what they were at the end."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from slipstream.replay.frames import continues

Array = NDArray[Any]


class Stacks(NamedTuple):
    """Observations `[T, B, k, *F]`, most of which share k-1 frames with the one before.

    Attributes:
        linked: bool `[T, B]`, whether an observation does.
        newest: `[n, *F]`, the newest frames of those that do, row by row.
        whole: `[m, k, *F]`, those that do not.
    """

    linked: NDArray[np.bool_]
    newest: Array
    whole: Array


def pack(obs: Array) -> Stacks:
    """Observations `[T, B, k, *F]` with each frame once."""
    linked = np.zeros(obs.shape[:2], np.bool_)
    for t in range(1, len(obs)):
        linked[t] = continues(obs[t - 1], obs[t])
    return Stacks(linked, obs[:, :, -1][linked], obs[~linked])


def unpack(stacks: Stacks, to: Array) -> None:
    """Writes the observations that `pack` was given into `to`, `[T, B, k, *F]`."""
    linked, newest, whole = stacks
    to[~linked] = whole
    ends = linked.sum(axis=1).cumsum()
    for t in range(1, len(to)):
        columns = linked[t]
        to[t, columns, :-1] = to[t - 1, columns, 1:]
        to[t, columns, -1] = newest[ends[t - 1] : ends[t]]
