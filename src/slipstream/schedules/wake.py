"""Where the slots stood after what has been learned from, while they go on collecting: what `async` resumes from.

    collector 1 | unroll 4 | unroll 5 | unroll 6 ...     tells after each where its lanes stand (a mark)
    learner     |     unroll 3 -> v1 | unroll 4 -> v2    follows with what it has done with
                                                   ^ a checkpoint here: after unroll 4

What is ahead of that is lost with a run that is stopped, and collected again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from slipstream.history import History, Past
from slipstream.standing import Mark, SlotState, Standing
from slipstream.types import EnvSpec, Trajectory


class Wake:
    """Follows the learner, lane by lane.

    Args:
        spec: The environments.
        slabs: What the collectors fill.
        marks: Where the lanes of a collector stand, by its number; asked in its thread, between two unrolls.
        standing: Where the run goes on from; None if that is its start.
    """

    def __init__(
        self,
        spec: EnvSpec,
        slabs: Sequence[Trajectory],
        marks: Callable[[int], Sequence[Mark]],
        standing: Standing | None = None,
    ) -> None:
        self.marks = marks
        self._size = spec.lane_size
        self._slabs = [(slab.action.numpy(), slab.valid.numpy()) for slab in slabs]
        self._pasts = [Past(spec.lane_size, spec.action_space, spec.seeded_every) for _ in range(spec.lanes)]
        self._marks: list[Mark | None] = [None] * spec.lanes
        parts = [] if standing is None else [standing.part(spec.columns(lane)) for lane in range(spec.lanes)]
        for lane, part in enumerate(parts):
            self._pasts[lane].load(part.history)
            self._marks[lane] = Mark(lane, part.slots, part.seen)

    def follow(self, slab: int, marks: Mapping[int, Mark]) -> None:
        """Goes on by a slab that is done with.

        Args:
            slab: Its number.
            marks: By the first column of each unroll in it, where that ended.
        """
        action, valid = self._slabs[slab]
        for column, mark in sorted(marks.items()):
            part = slice(column, column + self._size)
            self._pasts[mark.lane].add(action[:, part], ~valid[:, part])
            self._marks[mark.lane] = mark

    @property
    def whole(self) -> bool:
        """Whether something of every lane is done with."""
        return None not in self._marks

    def standing(self) -> Standing:
        """Where the slots stood; call if it is `whole`."""
        marks = [mark for mark in self._marks if mark is not None]
        return Standing(
            SlotState.join([mark.slots for mark in marks]),
            History.join([past.history() for past in self._pasts]),
            torch.cat([mark.seen for mark in marks]),
        )
