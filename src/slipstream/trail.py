"""How the slots of an outpost came to where they are, as the driver sees it: what takes another outpost there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from slipstream.history import Past
from slipstream.link import Link
from slipstream.outpost import Unroll
from slipstream.standing import Mark, SlotState, Standing, marks
from slipstream.types import EnvSpec, Place, Trajectory


class Trail:
    """How the slots of an outpost came to where its last unroll ended, as the driver sees it.

    Args:
        spec: Its environments.
        slabs: What it fills.
        seed: Of the environments.
        row: Number of the first row of slots that begin with a reset.
        standing: Where the slots begin, if not with a reset.

    Attributes:
        rows: Of every slot, since then.
    """

    def __init__(
        self, spec: EnvSpec, slabs: Sequence[Trajectory], seed: int, row: int, standing: Standing | None = None
    ) -> None:
        self._spec, self._seed, self._row = spec, seed, row
        self._columns = [(slab.action.numpy(), slab.valid.numpy()) for slab in slabs]
        self._past = Past(spec.num_envs, spec.action_space, spec.seeded_every)
        self._slots: SlotState | None = None
        self.rows = 0
        if standing is not None:
            self._past.load(standing.history)
            self._slots, self._seen = standing.slots, standing.seen

    def marks(self, lanes: Sequence[int]) -> list[Mark]:
        """Where its lanes, as the run numbers them, stand there; to be called after `add`."""
        assert self._slots is not None, "nothing has been collected"
        return marks(lanes, self._slots, self._seen)

    @property
    def standing(self) -> Standing | None:
        """Where it ends; None where it begins with a reset."""
        return None if self._slots is None else Standing(self._slots, self._past.history(), self._seen)

    def add(self, places: Sequence[Place], unroll: Unroll) -> None:
        """Goes on by the unroll that is in `places`; call before anybody else writes there."""
        parts = [
            (self._columns[place.slab], slice(place.column, place.column + self._spec.lane_size)) for place in places
        ]
        self.rows += len(parts[0][0][0])
        if not self._spec.seeded_every:
            return
        action = np.concatenate([action[:, part] for (action, _), part in parts], axis=1)
        valid = np.concatenate([valid[:, part] for (_, valid), part in parts], axis=1)
        self._past.add(action, ~valid)
        self._slots, self._seen = unroll.slots, torch.from_numpy(unroll.seen)

    def tell(self, link: Link) -> None:
        """Tells an outpost to go there."""
        standing = self.standing
        if standing is None:
            link.begin(self._seed, self._row)
        else:
            link.restore(self._seed, self.rows, standing)
