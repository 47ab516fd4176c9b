"""Where the slots of a run stand between two unrolls: what a run that was killed needs to go on from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from slipstream import tree
from slipstream.history import History

UNKNOWN = -1
"""In place of a check sum that is not known."""


class SlotState(NamedTuple):
    """What a collector knows of its slots, in their order.

    Attributes:
        row: int64 `[B]`, number of the next row.
        reward: float64 `[B]`, sum of what the running episode reports.
        shaped: float64 `[B]`, sum of its raw rewards where scores are reported instead.
        length: int64 `[B]`, its steps.
        memory: Leaves `[B, ...]` of the recurrent state before the next row.
    """

    row: Tensor
    reward: Tensor
    shaped: Tensor
    length: Tensor
    memory: tuple[Tensor, ...]

    @staticmethod
    def layout(slots: int, memory: Sequence[Tensor]) -> SlotState:
        """Tensors without memory for as many slots, with recurrent state like the leaves `memory`, `[1, ...]`."""

        def meta(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(slots, *shape, dtype=dtype, device="meta")

        whole, real = torch.int64, torch.float64
        leaves = tuple(meta(*leaf.shape[1:], dtype=leaf.dtype) for leaf in memory)
        return SlotState(meta(dtype=whole), meta(dtype=real), meta(dtype=real), meta(dtype=whole), leaves)

    def part(self, columns: slice) -> SlotState:
        """That of neighbours, the same memory."""
        row, reward, shaped, length = (cell[columns] for cell in self[:4])
        return SlotState(row, reward, shaped, length, tuple(leaf[columns] for leaf in self.memory))

    def clone(self) -> SlotState:
        """The same in memory of its own."""
        return SlotState(*tree.map(Tensor.clone, self))

    def copy_(self, other: SlotState) -> None:
        """Overwrites it with another."""
        tree.map(Tensor.copy_, self, other)

    @staticmethod
    def join(parts: Sequence[SlotState]) -> SlotState:
        """That of all slots, from collectors in the order of their slots."""
        row, reward, shaped, length = map(torch.cat, zip(*(part[:4] for part in parts), strict=True))
        return SlotState(
            row, reward, shaped, length, tuple(map(torch.cat, zip(*(part.memory for part in parts), strict=True)))
        )


class Mark(NamedTuple):
    """Where a lane stands at the end of an unroll.

    Attributes:
        lane: Its number.
        slots: What its collector knows of its slots.
        seen: int64 `[size]`, check sums of what they show there.
    """

    lane: int
    slots: SlotState
    seen: Tensor


def marks(lanes: Sequence[int], slots: SlotState, seen: Tensor) -> list[Mark]:
    """Those of a collector's lanes, of which `slots` and `seen` tell one after the other."""
    size = len(seen) // len(lanes)
    parts = [slice(number * size, (number + 1) * size) for number in range(len(lanes))]
    return [Mark(lane, slots.part(part), seen[part]) for lane, part in zip(lanes, parts, strict=True)]


@dataclass(frozen=True)
class Standing:
    """Where slots stand.

    Attributes:
        slots: What the collectors know.
        history: What brings the environments back.
        seen: int64 `[B]`, check sums of the rows before, with the observations that the next ones begin with;
            `UNKNOWN` where nobody has noted them.
    """

    slots: SlotState
    history: History
    seen: Tensor

    def part(self, columns: slice) -> Standing:
        """That of neighbours."""
        return Standing(self.slots.part(columns), self.history.part(columns), self.seen[columns])

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        slots, history = self.slots, self.history
        return {
            "row": slots.row,
            "reward": slots.reward,
            "shaped": slots.shaped,
            "length": slots.length,
            **{f"memory.{number}": leaf for number, leaf in enumerate(slots.memory)},
            "start": torch.from_numpy(history.start),
            "count": torch.from_numpy(history.count),
            "action": torch.from_numpy(history.action),
            "sum": self.seen,
        }

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Standing:
        """That of which `tensors` are all."""
        row, leaves = tensors["row"], sum(name.startswith("memory.") for name in tensors)
        slots = SlotState(
            row=row,
            reward=tensors["reward"],
            shaped=tensors["shaped"],
            length=tensors["length"],
            memory=tuple(tensors[f"memory.{number}"] for number in range(leaves)),
        )
        start, count, action = (tensors[name].numpy() for name in ("start", "count", "action"))
        seen = tensors["sum"] if "sum" in tensors else torch.full_like(row, UNKNOWN)  # older ones are of less
        return Standing(slots, History(start, count, action), seen)

    @staticmethod
    def join(parts: Sequence[Standing]) -> Standing:
        """That of all slots, from parts in the order of their slots."""
        return Standing(
            SlotState.join([part.slots for part in parts]),
            History.join([part.history for part in parts]),
            torch.cat([part.seen for part in parts]),
        )
