"""How slots came to where they are, and what plays them there again."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import Space
from numpy.typing import NDArray

_ROWS = 256  # room at first
_LARGE = 16_000_000  # bytes of a lane, above which there is a warning

_log = logging.getLogger(__name__)


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


class Past:
    """The actions of slots that go on row by row together, as far back as it takes to bring them back.

    Args:
        slots: How many, B.
        space: Of one slot's actions.
        every: Rows of a slot after which its next reset is a keyed start.
    """

    def __init__(self, slots: int, space: Space[Any], every: int) -> None:
        self._every = every
        self._action: NDArray[Any] = np.zeros((_ROWS, slots, *(space.shape or ())), space.dtype)
        self._sent = 0  # rows kept
        self._first = np.zeros(slots, np.int64)  # of each slot
        self._start = np.zeros(slots, np.int64)
        self._told = False

    @property
    def last(self) -> NDArray[Any]:
        """The actions sent last, `[B, *A]`; call after the first."""
        return self._action[self._sent - 1]

    def sent(self, action: NDArray[Any]) -> None:
        """Takes in a row of actions, `[B, *A]`."""
        self._make_room(1)
        self._action[self._sent] = action
        self._sent += 1

    def reset(self, dead: NDArray[np.bool_]) -> None:
        """Says which slots were reset by the row sent last, `[B]`."""
        if dead.any():
            begun = dead & (self._sent - self._first >= self._every)
            self._start += begun
            self._first[begun] = self._sent

    def add(self, action: NDArray[Any], dead: NDArray[np.bool_]) -> None:
        """Takes in many rows at once: their actions, `[T, B, *A]`, and the slots that each reset, `[T, B]`."""
        rows = len(action)
        self._make_room(rows)
        self._action[self._sent : self._sent + rows] = action
        for row, slot in np.argwhere(dead):
            after = self._sent + int(row) + 1
            if after - self._first[slot] >= self._every:
                self._start[slot] += 1
                self._first[slot] = after
        self._sent += rows

    def history(self, but: int = 0) -> History:
        """That of all rows but the last few."""
        stop = self._sent - but
        kept = [self._action[first:stop, slot] for slot, first in enumerate(self._first)]
        return History(self._start.copy(), stop - self._first, np.concatenate(kept))

    def load(self, history: History) -> None:
        """Goes on from there."""
        self._start, self._sent = history.start.copy(), int(history.count.max())
        self._first = self._sent - history.count
        self._action = np.zeros((max(_ROWS, 2 * self._sent), *self._action.shape[1:]), self._action.dtype)
        for slot, first in enumerate(self._first):
            self._action[first : self._sent, slot] = history.of(slot)

    def _make_room(self, rows: int) -> None:
        """Drops what no slot needs any more once there is no room for `rows` more, and leaves as much free again."""
        if self._sent + rows <= len(self._action):
            return
        gone = int(self._first.min())
        kept = self._action[gone : self._sent]
        if kept.nbytes > _LARGE and not self._told:
            self._told = True
            _log.warning(
                "after %s steps without a new episode, %.0f MB of actions are kept, and saved in every checkpoint, to "
                "play them again after a stop: --env-options.max-episode-steps makes episodes end",
                f"{len(kept):,}",
                kept.nbytes / 1e6,
            )
        self._action = np.zeros((max(_ROWS, 2 * (len(kept) + rows)), *kept.shape[1:]), kept.dtype)
        self._action[: len(kept)] = kept
        self._sent -= gone
        self._first -= gone
