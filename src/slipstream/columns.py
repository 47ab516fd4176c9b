"""A lane's columns of a slab, as tensors to compute with and as arrays to write with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from slipstream import tree
from slipstream.tree import Tree
from slipstream.types import BoolArray, FloatArray, Trajectory


@dataclass(frozen=True)
class Arrays:
    """NumPy views of the columns, with the names and shapes of `Trajectory`."""

    obs: Tree
    action: NDArray[np.generic]
    log_prob: FloatArray
    version: NDArray[np.int32]
    extras: Mapping[str, NDArray[Any]]
    reward: FloatArray
    terminated: BoolArray
    truncated: BoolArray
    valid: BoolArray

    @staticmethod
    def of(view: Trajectory) -> Arrays:
        """Those of the columns in `view`."""
        return Arrays(
            obs=tree.map(lambda leaf: leaf.numpy(), view.obs),
            action=view.action.numpy(),
            log_prob=view.log_prob.numpy(),
            version=view.version.numpy(),
            extras={name: value.numpy() for name, value in view.extras.items()},
            reward=view.reward.numpy(),
            terminated=view.terminated.numpy(),
            truncated=view.truncated.numpy(),
            valid=view.valid.numpy(),
        )


class Columns(NamedTuple):
    """A lane's columns of one slab."""

    tensors: Trajectory
    arrays: Arrays

    @staticmethod
    def of(view: Trajectory) -> Columns:
        """The columns in `view`."""
        return Columns(view, Arrays.of(view))


def record(rows: Tensor, arrays: NDArray[Any], t: int, value: Tensor) -> None:
    """Writes row t: from the CPU by NumPy, in a tenth of PyTorch's time if small; from a GPU when that comes to it.

    What comes from a GPU is there once its current stream has been waited for.
    """
    if value.is_cpu:
        arrays[t] = value.detach().numpy()
    else:
        rows[t].copy_(value, non_blocking=True)


def write(rows: Tree, t: int, obs: Tree) -> None:
    """Copies an observation into row t, the one copy between environment and gradient."""

    def copy(row: NDArray[np.generic], leaf: NDArray[np.generic]) -> None:
        row[t] = leaf

    tree.map(copy, rows, obs)
