"""Minibatches of a slab: which rows there are, and gathering the items that a shard picked."""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream import tree
from slipstream.algos.algorithm import Batch
from slipstream.types import Trajectory


class SlabRows:
    """The rows of a slab, addressed by shard and item; with `bootstraps`, observations have row T as well.

    `valid` says which rows count in the loss; where episodes start is the trajectory's own affair.
    """

    def __init__(
        self, trajectory: Trajectory, valid: Tensor, columns: dict[str, Tensor], recurrent: bool, bootstraps: bool
    ) -> None:
        rows, width = trajectory.rows + bootstraps, trajectory.columns
        self.trajectory, self.valid, self.recurrent = trajectory, valid, recurrent
        self.columns = {"action": trajectory.action, "log_prob": trajectory.log_prob, **columns}
        self.obs = tree.map(lambda leaf: leaf[:rows], trajectory.obs)
        # The row after a dead one starts an episode; row 0 needs no mark, since state0 is already zero there.
        self.first = torch.zeros(rows, width, dtype=torch.bool)
        self.first[1:] = ~trajectory.valid[: rows - 1]


class Pick:
    """Items of one shard."""

    def __init__(self, rows: SlabRows, part: slice, pick: Tensor | None) -> None:
        self._rows, self._part, self._pick = rows, part, pick

    @property
    def count(self) -> int:
        """Valid rows among them."""
        return int(self._take(self._rows.valid).sum())

    def gather(self, total: int) -> Batch:
        """The batch, with weights for a minibatch of `total` valid rows over all shards."""
        rows = self._rows

        def state(leaf: Tensor) -> Tensor:
            columns = leaf[self._part]
            return columns if self._pick is None else columns[self._pick]

        columns = {name: self._take(value) for name, value in rows.columns.items()}
        return Batch(
            obs=tree.map(self._take, rows.obs),
            action=columns.pop("action"),
            log_prob=columns.pop("log_prob"),
            first=self._take(rows.first),
            state0=tree.map(state, rows.trajectory.state0) if rows.recurrent else (),
            weight=self._take(rows.valid).to(torch.float32) / total,
            columns=columns,
        )

    def _take(self, leaf: Tensor) -> Tensor:
        """`[T, b, ...]` for whole columns, `[N, ...]` for picked rows."""
        if self._pick is None:
            return leaf[:, self._part]
        if self._rows.recurrent:
            return leaf[:, self._part.start + self._pick]
        rows, width = leaf.shape[:2]
        size = self._part.stop - self._part.start
        index = (self._pick // size) * width + self._part.start + self._pick % size
        return leaf.reshape(rows * width, *leaf.shape[2:]).index_select(0, index)
