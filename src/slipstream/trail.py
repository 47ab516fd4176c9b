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
        spec = setup.spec
        self._setup, self._shared, self._seed, self._row = setup, shared, seed, row
        self._past = Past(spec.num_envs, spec.action_space, spec.seeded_every)
        self._slots: SlotState | None = None
        self.rows = 0
        if standing is not None:
            self._past.load(standing.history)
            self._slots, self._seen = standing.slots, standing.seen

    @property
    def actions(self) -> int:
        """How many have to be played again."""
        return self._past.actions

    @property
    def standing(self) -> Standing | None:
        """Where it ends; None where it begins with a reset."""
        return None if self._slots is None else Standing(self._slots, self._past.history(), self._seen)

    def add(self, places: Sequence[Place]) -> None:
        """Goes on by the unroll that the process has just answered for; call before anybody else writes to `places`."""
        slabs, size, columns = self._shared.slabs, self._setup.spec.lane_size, self._setup.columns
        self.rows += slabs[0].rows
        if not self._setup.spec.seeded_every:
            return
        parts = [(slabs[place.slab], slice(place.column, place.column + size)) for place in places]
        action = np.concatenate([slab.action.numpy()[:, part] for slab, part in parts], axis=1)
        dead = np.concatenate([~slab.valid.numpy()[:, part] for slab, part in parts], axis=1)
        self._past.add(action, dead)
        self._slots = self._shared.slots.part(columns).clone()
        self._seen = self._shared.seen[columns].clone()

    def command(self) -> tuple[dict[str, object], bytes]:
        """What takes a process there, and what goes with it."""
        standing = self.standing
        if standing is None:
            return {"begin": {"seed": self._seed, "row": self._row}}, b""
        content = safetensors.torch.save(standing.tensors())
        return {"restore": {"seed": self._seed, "step": self.rows, "bytes": len(content)}}, content
