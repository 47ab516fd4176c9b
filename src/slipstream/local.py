"""Collectors of one process and its environments: where they start, and how they are brought back to where they were.

`Remotes` are the same for collectors in other processes, each of which has one of these for its lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from slipstream.collector import Stands
from slipstream.envs.recorded import RecordedEnvs, bring_back
from slipstream.standing import Mark, SlotState, Standing, marks
from slipstream.types import Envs


class Locals:
    """Collectors of this process, made anew whenever their environments start.

    Args:
        envs: The environments.
        recorded: The same, if they can be brought back.
        shares: The lanes of each collector, without gaps.
        make: Makes a collector for its lanes, whose slots are at the given row.

    Attributes:
        collectors: In the order of `shares`; a list that is changed in place.
    """

    def __init__(
        self,
        envs: Envs,
        recorded: RecordedEnvs | None,
        shares: Sequence[range],
        make: Callable[[range, int], Stands],
    ) -> None:
        self._envs, self._recorded, self._shares, self._make = envs, recorded, shares, make
        self.collectors: list[Stands] = []

    def begin(self, seed: int, row: int) -> None:
        """Resets all environments and has their collectors start afresh.

        Args:
            seed: For the environments.
            row: Number of the first row.
        """
        self._envs.reset(seed)
        self.collectors[:] = [self._make(lanes, row) for lanes in self._shares]

    def restore(self, seed: int, standing: Standing) -> list[int]:
        """Brings all slots back in place of `begin`; returns those that show something else than then."""
        assert self._recorded is not None
        lost = bring_back(self._recorded, seed, standing.history, standing.seen.numpy())
        self.collectors[:] = [self._make(lanes, 0) for lanes in self._shares]
        size = self._envs.spec.lane_size
        for collector, lanes in zip(self.collectors, self._shares, strict=True):
            collector.load(standing.slots.part(slice(lanes.start * size, lanes.stop * size)))
        return lost

    def state(self) -> Standing:
        """Where all slots stand; to be called between two unrolls, if they can be brought back."""
        assert self._recorded is not None
        slots = SlotState.join([collector.state() for collector in self.collectors])
        return Standing(slots, self._recorded.history(), torch.from_numpy(self._recorded.seen()))

    def marks(self, number: int) -> list[Mark]:
        """Where the lanes of a collector stand; to be called in its thread, between two unrolls."""
        assert self._recorded is not None
        lanes = self._shares[number]
        return marks(lanes, self.collectors[number].state(), torch.from_numpy(self._recorded.seen(lanes)))

    @property
    def restarted(self) -> int:
        """How often environments have been brought back after a failure."""
        return 0 if self._recorded is None else self._recorded.restarted

    def metrics(self) -> dict[str, float]:
        """How often environments have been brought back, by its name in metrics."""
        return {"faults/restarts": float(self.restarted)}
