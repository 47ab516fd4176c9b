"""An outpost in an actor of Ray, on any node: what the actor does. Ray itself is not imported here.

Its methods run one after the other in the order of their calls, in a thread that is not the main one, but for `watch`,
`offer` and `stop`, which have another (the concurrency group `watch`). Errors go back as reports, so that the driver
tells them from a death, and with every answer what the actor is doing, as of `Status`.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from threading import Lock
from typing import Any

import cloudpickle
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream import arithmetic, process, slab, tree, wire
from slipstream.collector import home
from slipstream.outpost import Outpost, Status, Work, acting_policy
from slipstream.ray_cluster import node
from slipstream.standing import Standing
from slipstream.types import Place
from slipstream.weights import copy_into

Told = dict[str, Any]
"""What a method returns: `{"cells", "said": ...}`, or `{"cells", "failed": {"kind", "message", "traceback"}}`."""


class RayOutpost:
    """What lives in the actor.

    Args:
        content: `Work`, pickled.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._cells = np.array(Status.EMPTY, np.int64)
        self._status = Status(self._cells)
        self._task, self._stopped = 0, -1
        self._obeying = Lock()
        self._version = -1
        self._offered: tuple[int, Mapping[str, NDArray[Any]]] = -1, {}
        self._outpost: Outpost | None = None
        # Weights lie in the object store, where nobody can write; they are only read.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")

    def make(self) -> Told:
        """Makes environments and policy; says the number of this process, its machine, and its node."""
        return self._told(self._make)

    def begin(self, task: int, seed: int, row: int) -> Told:
        """Resets the environments and starts afresh, under a number that `stop` can name."""
        self._take(task)
        return self._told(lambda: self._living.begin(seed, row))

    def restore(self, task: int, seed: int, row: int, tensors: Mapping[str, NDArray[Any]]) -> Told:
        """Brings the slots to where they had `row` rows."""
        self._take(task)
        return self._told(lambda: self._restore(seed, row, tensors))

    def collect(self, version: int, weights: Mapping[str, NDArray[Any]]) -> Told:
        """Fills an unroll of every lane with these weights, or newer ones on offer; says nothing if it was stopped."""
        self.offer(self._task, version, weights)
        return self._told(self._collect)

    def offer(self, task: int, version: int, weights: Mapping[str, NDArray[Any]]) -> None:
        """Lets it have weights for what was begun under this number, of which it takes the newest."""
        with self._obeying:
            if task == self._task and version > self._offered[0]:
                self._offered = version, weights

    def watch(self) -> NDArray[np.int64]:
        """What it is doing, as of `Status`."""
        return self._cells.copy()

    def stop(self, task: int) -> None:
        """Ends what was begun under this number, or an earlier one, at the next row."""
        with self._obeying:
            self._stopped = max(self._stopped, task)
            self._status.stop = self._stopped >= self._task

    @property
    def _living(self) -> Outpost:
        assert self._outpost is not None, "it could not be made"
        return self._outpost

    def _make(self) -> tuple[int, str, str]:
        arithmetic.settle()
        work: Work = cloudpickle.loads(self._content)
        self._content = b""
        self._spec = work.spec
        self._policy = acting_policy(work)
        self._slab = slab.allocate(work.spec, self._policy, work.rows)
        self._places = home(range(work.spec.lanes), work.spec.lane_size, 0)
        self._outpost = Outpost(work, [self._slab], self._policy, self._refresh, self._status)
        host = platform.node()
        return os.getpid(), host, f"{host}_{node()[:6]}"

    def _rows(self, place: Place) -> dict[str, Any]:
        """Those of a lane."""
        columns = slice(place.column, place.column + self._spec.lane_size)
        rows = tree.map(Tensor.numpy, vars(slab.columns(self._slab, columns)))
        return rows | {"obs": wire.pack(rows["obs"], self._spec.frame_stack)}

    def _take(self, task: int) -> None:
        with self._obeying:
            self._task, self._offered = task, (-1, {})
            self._status.stop = self._stopped >= task

    def _restore(self, seed: int, row: int, tensors: Mapping[str, NDArray[Any]]) -> list[int]:
        standing = Standing.of({name: torch.from_numpy(value.copy()) for name, value in tensors.items()})
        return self._living.restore(seed, row, standing)

    def _told(self, task: Callable[[], Any]) -> Told:
        try:
            said = {"said": task()}
        except Exception as error:  # noqa: BLE001 - it is raised again in the driver
            said = {"failed": process.report(error)}
        return {"cells": self._cells.copy(), **said}

    def _refresh(self) -> int:
        """Takes over the newest weights that were offered, and returns their version."""
        with self._obeying:
            version, weights = self._offered
        if version != self._version:
            copy_into(self._policy, {name: torch.from_numpy(value) for name, value in weights.items()})
            self._version = version
        return version

    def _collect(self) -> dict[str, Any] | None:
        unroll = self._living.collect(self._places)
        if unroll is None:
            return None
        return {
            "rows": [self._rows(place) for place in self._places],
            "collected": asdict(unroll.collected),
            "slots": None if unroll.slots is None else tree.map(Tensor.numpy, unroll.slots),
            "seen": unroll.seen,
        }
