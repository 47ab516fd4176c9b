"""Shared memory: rows and actions of all slots, mapped by the driver and its workers."""

from __future__ import annotations

import math
import mmap
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import Space
from numpy.typing import NDArray

from slipstream import tree
from slipstream.envs.rows import Rows

_ALIGNMENT = 64


@dataclass(frozen=True)
class Shared:
    """Arrays over one mapping.

    Attributes:
        rows: One row of all slots.
        action: `[num_envs, *A]` in the environment's terms.
        busy: int64 `[workers, 2]`, the column that a worker is stepping now, for messages, and how many actions it has
            played to bring slots back.
    """

    rows: Rows
    action: NDArray[Any]
    busy: NDArray[np.int64]


def map_shared(fd: int, obs_space: Space[Any], action: NDArray[Any], num_envs: int, workers: int) -> Shared:
    """Maps the file `fd`, which is made large enough first; every process that passes the same arguments sees the same.

    Args:
        fd: From `process.anonymous_file`.
        obs_space: Space of one observation.
        action: Any array with the shape `[*A]` and dtype of one action.
        num_envs: Slots.
        workers: Worker processes.
    """
    template = Rows.empty(obs_space, num_envs)
    flags = (template.reward, template.terminated, template.truncated, template.ended)
    cells = (*flags, template.score, template.skipped, template.spike, template.step, template.episode)
    others = [*cells, np.empty((num_envs, *action.shape), action.dtype), np.empty((workers, 2), np.int64)]
    leaves = [*tree.leaves(template.obs), *others]
    offsets = np.cumsum([0, *(math.ceil(leaf.nbytes / _ALIGNMENT) * _ALIGNMENT for leaf in leaves)]).tolist()
    os.ftruncate(fd, max(offsets[-1], 1))
    memory = mmap.mmap(fd, offsets[-1])
    views = [np.ndarray(leaf.shape, leaf.dtype, memory, offset) for leaf, offset in zip(leaves, offsets, strict=False)]
    left = iter(views)

    def take(_: NDArray[Any]) -> NDArray[Any]:
        return next(left)

    obs = tree.map(take, template.obs)
    rows = Rows(obs, *(next(left) for _ in cells))
    return Shared(rows, next(left), next(left))
