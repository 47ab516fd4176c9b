"""The running episodes of some slots: what is reported when they end, and which rows are dead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream.standing import SlotState
from slipstream.types import BoolArray, Episode, FloatArray

Slots = NDArray[np.int64]


class Episodes:
    """Keeps the account of slots whose rows come in, for whoever collects.

    Args:
        slots: The run's numbers of the slots, `[S]`.

    Attributes:
        dead: bool `[S]`, whether the slot's next row is the dead one after an episode.
        steps: Valid rows since `open`.
        mended: Rows since `open` whose numbers were not finite, and were mended.
        ended: Episodes that ended since `open`.
    """

    def __init__(self, slots: Sequence[int] | Slots) -> None:
        self._slots = np.array(slots, np.int64)
        size = len(self._slots)
        self._numbers = np.arange(size)
        self.dead: BoolArray = np.zeros(size, np.bool_)
        self._reward, self._shaped = np.zeros(size, np.float64), np.zeros(size, np.float64)
        self._length = np.zeros(size, np.int64)
        self.steps = self.mended = 0
        self.ended: list[Episode] = []

    def open(self) -> None:
        """Starts an unroll."""
        self.steps, self.mended, self.ended = 0, 0, []

    def add(
        self,
        index: Any,
        row: int | Slots,
        reward: FloatArray,
        score: FloatArray | None,
        truncated: BoolArray,
        over: BoolArray,
    ) -> BoolArray:
        """Takes in a row of some slots; returns which of them are valid.

        Args:
            index: Of the slots among these.
            row: Rows that they have had with it, one number or one for each.
            reward: float32, raw.
            score: float32, what is reported in place of the reward; None if it is the reward.
            truncated: Whether a limit ended the episode.
            over: Whether the episode is over.
        """
        valid = ~self.dead[index]
        self.steps += int(np.count_nonzero(valid))
        self._reward[index] += np.where(valid, reward if score is None else score, 0.0)
        if score is not None:
            self._shaped[index] += np.where(valid, reward, 0.0)
        self._length[index] += valid
        self.dead[index] = over
        if np.count_nonzero(over):  # a tenth of what `any` takes
            self._finish(index, row, score is not None, truncated, over)
        return valid

    def state(self, row: int, memory: tuple[Tensor, ...]) -> SlotState:
        """Where the slots stand, before row `row`, with the recurrent state `memory`."""
        reward, shaped, length = (torch.from_numpy(cell.copy()) for cell in (self._reward, self._shaped, self._length))
        return SlotState(torch.full((len(self._slots),), row), reward, shaped, length, memory)

    def load(self, state: SlotState) -> None:
        """Goes on from where the slots stood; which rows are dead is for the environments to say."""
        for to, cell in zip((self._reward, self._shaped, self._length), state[1:4], strict=True):
            to[...] = cell.numpy()

    def _finish(self, index: Any, row: int | Slots, scored: bool, truncated: BoolArray, over: BoolArray) -> None:
        places = np.flatnonzero(over)
        numbers = self._numbers[index][places]
        rows = [row] * len(places) if isinstance(row, int) else row[places].tolist()
        columns = (self._slots, self._length, self._reward, self._shaped)
        slots, lengths, rewards, shaped = (column[numbers].tolist() for column in columns)
        self.ended += [
            Episode(
                slot=slots[i],
                row=rows[i],
                length=lengths[i],
                reward=rewards[i],
                shaped=shaped[i] if scored else None,
                truncated=bool(truncated[place]),
            )
            for i, place in enumerate(places)
        ]
        self._reward[numbers] = self._shaped[numbers] = 0.0
        self._length[numbers] = 0
