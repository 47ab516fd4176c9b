"""How slots came to where they are, and what plays them there again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class History:
    """What brings slots back to where they are: their last keyed start, and their actions since.

    Attributes:
        start: int64 `[B]`, keyed starts of the slot before that one; 0 is the start of the run.
        count: int64 `[B]`, actions since then, those on dead rows included.
        action: `[sum(count), *A]`, as the policy chose them, slot after slot.
    """

    start: NDArray[np.int64]
    count: NDArray[np.int64]
    action: NDArray[Any]

    def of(self, column: int) -> NDArray[Any]:
        """The actions of one slot, `[count, *A]`."""
        stop = int(self.count[: column + 1].sum())
        return self.action[stop - int(self.count[column]) : stop]

    def part(self, columns: slice) -> History:
        """The histories of neighbours."""
        first, count = int(self.count[: columns.start].sum()), self.count[columns]
        return History(self.start[columns], count, self.action[first : first + int(count.sum())])

    @staticmethod
    def join(parts: Sequence[History]) -> History:
        """The histories of all slots, from parts in the order of their slots."""
        start, count = (np.concatenate([getattr(part, name) for part in parts]) for name in ("start", "count"))
        return History(start, count, np.concatenate([part.action for part in parts]))

    def dump(self) -> bytes:
        """All of it, for another process on this machine."""
        lists = {"start": self.start.tolist(), "count": self.count.tolist()}
        head = {**lists, "dtype": self.action.dtype.str, "shape": self.action.shape}
        return json.dumps(head).encode() + b"\n" + self.action.tobytes()

    @staticmethod
    def parse(content: bytes) -> History:
        """What `dump` wrote."""
        head, _, actions = content.partition(b"\n")
        told = json.loads(head)
        start, count = (np.array(told[name], np.int64) for name in ("start", "count"))
        return History(start, count, np.frombuffer(actions, told["dtype"]).reshape(told["shape"]))
