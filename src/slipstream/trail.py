"""How the slots of a collector process came to where they are, as the driver sees it: what takes another one there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import safetensors.torch

from slipstream.history import Past
from slipstream.remote_process import Setup, Shared
from slipstream.standing import SlotState, Standing
from slipstream.types import Place


class Trail:
    """How the slots of a collector process came to where its last unroll ended, as the driver sees it.

    Args:
        setup: What the process was told.
        shared: Where it notes where its slots stand.
        seed: Of the environments.
        row: Number of the first row of slots that begin with a reset.
        standing: Where the slots begin, if not with a reset.

    Attributes:
        rows: Of every slot, since then.
    """

    def __init__(self, setup: Setup, shared: Shared, seed: int, row: int, standing: Standing | None = None) -> None:
        spec = setup.work.spec
        self._spec, self._seed, self._row = spec, seed, row
        self._columns = [(slab.action.numpy(), slab.valid.numpy()) for slab in shared.slabs]
        self._noted = shared.slots.part(setup.columns), shared.seen[setup.columns]
        self._past = Past(spec.num_envs, spec.action_space, spec.seeded_every)
        self._slots: SlotState | None = None
        self.rows = 0
        if standing is not None:
            self._past.load(standing.history)
            self._slots, self._seen = standing.slots, standing.seen

    @property
    def standing(self) -> Standing | None:
        """Where it ends; None where it begins with a reset."""
        return None if self._slots is None else Standing(self._slots, self._past.history(), self._seen)

    def add(self, places: Sequence[Place]) -> None:
        """Goes on by the unroll that the process has just answered for; call before anybody else writes to `places`."""
        parts = [
            (self._columns[place.slab], slice(place.column, place.column + self._spec.lane_size)) for place in places
        ]
        self.rows += len(parts[0][0][0])
        if not self._spec.seeded_every:
            return
        action = np.concatenate([action[:, part] for (action, _), part in parts], axis=1)
        valid = np.concatenate([valid[:, part] for (_, valid), part in parts], axis=1)
        self._past.add(action, ~valid)
        slots, seen = self._noted
        self._slots, self._seen = slots.clone(), seen.clone()

    def command(self) -> tuple[dict[str, object], bytes]:
        """What takes a process there, and what goes with it."""
        standing = self.standing
        if standing is None:
            return {"begin": {"seed": self._seed, "row": self._row}}, b""
        content = safetensors.torch.save(standing.tensors())
        return {"restore": {"seed": self._seed, "row": self.rows, "bytes": len(content)}}, content
