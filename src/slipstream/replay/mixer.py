"""Fresh unrolls with replayed ones beside them, p:1 in every update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial

import torch
from torch import Tensor

from slipstream import dice, tree
from slipstream.replay.items import axis, unrolls
from slipstream.replay.stored import Stored
from slipstream.replay.windows import Windows
from slipstream.tree import Tree
from slipstream.types import Trajectory

REPLAYED = "replayed"
"""Name of the extra that tells replayed columns, float32 `[T+1, B]`: 1 there, 0 in fresh ones."""


Old = Trajectory | None
Begin = Callable[[Callable[[], Old]], Callable[[], Old]]
"""As `Loader.begin`."""


class Mixer:
    """Widens a slab of B fresh columns by p B replayed ones, then stores the fresh ones.

    The replayed columns are drawn uniformly, with replacement, from what earlier slabs brought: while the update before
    is learned, if `look_ahead` says when; should the rows change before they are wanted, they are drawn anew. So they
    are a function of (seed, version) and of the windows there are when the fresh slab comes: a mixer goes on where its
    windows do. Until p B unrolls are there, slabs stay as they are. A recurrent state is that with which the unroll was
    collected.

    Who waits: `mix`, `store` and `restart` for what is being gathered.

    Args:
        windows: Where unrolls are stored; empty.
        columns: B.
        proportion: P; p B is whole.
        extras: Names of all extras of the slabs.
        begin: Has somebody gather, and returns what waits for it, to be called once.
        seed: The run's seed.

    Raises:
        ValueError: If p B is not whole, or never there; the message names what is.
    """

    def __init__(
        self, windows: Windows, columns: int, proportion: float, extras: tuple[str, ...], begin: Begin, seed: int
    ) -> None:
        self._windows, self._columns, self._extras = windows, columns, extras
        self._begin, self._seed = begin, seed
        self._ahead: tuple[int, Callable[[], Old]] | None = None  # of which update, and what waits for it
        self._whole: Trajectory | None = None  # as large as a hundred megabytes: memory is asked for once
        self.replayed = round(proportion * columns)
        if abs(self.replayed - proportion * columns) > 1e-6 or not self.replayed:
            near = max(self.replayed, 1)
            raise ValueError(
                f"algo.replay.proportion={proportion} of {columns} unrolls is no whole number; use {near / columns} "
                f"({near} replayed unrolls) or {(near + 1) / columns}"
            )
        if windows.most < self.replayed:
            rows = windows.rows
            needed = (-(-self.replayed // rows.slots) + 1) * rows.unroll * rows.slots
            raise ValueError(
                f"a replay of {rows.kept * rows.slots:,} rows keeps no more than {windows.most} unrolls, and "
                f"{self.replayed} are replayed in every update; use --algo.replay.capacity {needed}"
            )

    @property
    def windows(self) -> Windows:
        """Where the unrolls are stored; to save and load them is to save and load all that a mixer has."""
        return self._windows

    @property
    def rows(self) -> Stored:
        """Where the unrolls lie."""
        return self._windows.rows

    def mix(self, fresh: Trajectory, version: int) -> Trajectory:
        """The slab with replayed columns behind its own, and the extra `REPLAYED`; it holds until the next call.

        Args:
            fresh: The slab.
            version: Of the parameters that learn from it; the draw is keyed by it.
        """
        ahead, old = self._settle()
        if ahead != version:  # nothing was gathered for it, or the rows have changed since
            old = self._draw(version)
        mark = torch.zeros(fresh.rows + 1, fresh.columns)
        mixed = replace(fresh, extras={**fresh.extras, REPLAYED: mark})
        if old is not None:
            mixed = self._whole = _beside(mixed, old, self._whole)
        self._windows.append(fresh)
        return mixed

    def look_ahead(self, version: int) -> None:
        """Has somebody draw what an update at `version` will replay, unless that is under way."""
        if self._ahead is None:
            self._ahead = version, self._begin(partial(self._draw, version))

    def ages(self, mixed: Trajectory, version: int) -> dict[str, Tensor | float]:
        """Ages of the replayed rows of a mixed slab at `version`, in updates: mean, greatest and shares.

        The shares are by powers of two (from 1, from 2, from 4, ...), the last with all that are older. There are as
        many in every update, so that their means over updates sum to 1 as well: up to the unrolls that are kept of a
        slot. Empty if there are no such rows.
        """
        replayed = slice(self._columns, None)
        age = version - mixed.version[:, replayed][mixed.valid[:, replayed]]
        if not len(age):
            return {}
        bins = (self.rows.kept // self.rows.unroll).bit_length()
        counts = torch.bincount(age.clamp(1, 2 ** (bins - 1)).log2().long(), minlength=bins)
        shares = {f"lag/replayed_from_{2**power}": float(count) / len(age) for power, count in enumerate(counts)}
        return {"lag/replayed_mean": age.float().mean(), "lag/replayed_max": float(age.max()), **shares}

    def store(self, fresh: Trajectory) -> None:
        """Stores a slab that is not learned from."""
        self._settle()
        self._windows.append(fresh)

    def restart(self) -> None:
        """Says that the environments start afresh."""
        self._settle()
        self._windows.restart()

    def _draw(self, version: int) -> Old:
        """The replayed columns of an update; None while there are not enough unrolls."""
        if self._windows.count < self.replayed:
            return None
        drawn = self._windows.draw(dice.generator(self._seed, "replay", version), 1, self.replayed, 0.0)
        gather = partial(unrolls, extras=self._extras)
        old = self._windows.rows.gathered(gather, drawn.slot[0], drawn.row[0])
        mark = torch.ones(self._windows.rows.unroll + 1, self.replayed)
        return replace(old, extras={**old.extras, REPLAYED: mark})

    def _settle(self) -> tuple[int | None, Old]:
        """Waits until nobody reads the rows; returns of which update they were read, and what was gathered."""
        if self._ahead is None:
            return None, None
        version, gathered = self._ahead
        self._ahead = None
        return version, gathered()


def _beside(one: Trajectory, other: Trajectory, into: Trajectory | None) -> Trajectory:
    """The columns of two slabs, in the memory of `into` if there is one."""

    def joined(name: str) -> Tree:
        def join(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
            return torch.cat([left, right], along, out=out)

        along, there = axis(Trajectory, name), () if into is None else (getattr(into, name),)
        return tree.map(join, getattr(one, name), getattr(other, name), *there)

    return Trajectory(**{field.name: joined(field.name) for field in fields(Trajectory)})
