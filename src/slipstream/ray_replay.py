"""Shards of a replay in actors of a Ray cluster, on any node: rows go there, and windows come, by its object store.

What is said is a parcel: its numbers lie in the object store, and are read where they lie.
"""

from __future__ import annotations

import logging
import os
import platform
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import Any

import cloudpickle
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream import arithmetic, parcel, process, tree, wire
from slipstream.parcel import Letter
from slipstream.process import ChildDied, ChildFailed
from slipstream.ray_cluster import Cluster
from slipstream.ray_tie import RayTie
from slipstream.replay import rows
from slipstream.replay.sharded import ShardLostError, Shelf
from slipstream.tree import Tree
from slipstream.types import Trajectory

_log = logging.getLogger(__name__)

Parcel = tuple[Letter, NDArray[np.uint8]]

_PATIENCE_SECONDS = 10.0  # for an actor to start, before a word is said
_ERRORS = {kind.__name__: kind for kind in (KeyError, ValueError)}
_SECONDS = 300.0
"""After which a shard that has not answered is given up."""


class RayShelf:
    """What lives in the actor.

    Args:
        content: Arguments of `Shelf`, pickled.
    """

    def __init__(self, content: bytes) -> None:
        arithmetic.settle()
        # Numbers lie in the object store, where nobody can write; they are only read.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        self._shelf = Shelf(*cloudpickle.loads(content))

    def where(self) -> tuple[int, str]:
        """Number of this process, and its machine."""
        return os.getpid(), platform.node()

    def obey(self, method: str, letter: Letter, numbers: NDArray[np.uint8]) -> dict[str, Any]:
        """Calls a method of the shelf: `{"said": parcel}`, or `{"failed": report}`."""
        try:
            words = map(_arrived, parcel.unpack(letter, torch.from_numpy(numbers)))
            return {"said": _packed(getattr(self._shelf, method)(*words))}
        except Exception as error:  # noqa: BLE001 - it is raised again in the driver
            return {"failed": process.report(error)}


class RayShard(RayTie):
    """The tie to one shard; satisfies `Shard`.

    Args:
        cluster: Where it will be.
        number: Of the shard.
        frame_stack: Frames that an observation stacks; each travels once.
    """

    def __init__(self, cluster: Cluster, number: int, frame_stack: int) -> None:
        super().__init__(cluster, 1)
        self._number, self._stack = number, frame_stack
        self._where: str | None = None
        self._started: Any = None
        self._bytes = 0
        self._arriving = Lock()

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return f"shard {self._number} of the replay (actor{self._where or ''})"

    def start(self, layout: Tree, unroll: int, obs: Tree, head: NDArray[np.int64]) -> None:
        """Starts an actor on a node with so much memory, in place of what is left of the one before."""
        self.kill()
        self._where, self._bytes = None, rows.size(layout)
        told = layout, unroll, obs, head.copy()
        content = process.pickled(told, "a replay in shards needs spaces", "--placement.replay-shards 0")
        with self._lost():
            with self._changing:
                # What there is of a private cluster's memory has been looked at before.
                self._begin(RayShelf, content, memory=0 if self._cluster.private else self._bytes)
            self._started = self._ask("where")

    def begin(self, method: str, *words: object) -> Callable[[], Any]:
        """Calls a method of the shelf; returns what waits for what that returns."""
        travelling = [_travelling(word, self._stack) for word in words]
        with self._lost():
            self._arrive()
            reference = self._ask("obey", method, *_packed(travelling))
        return partial(self._outcome, reference, time.monotonic() + _SECONDS)

    def _arrive(self) -> None:
        """Waits until the actor has started, for as long as the cluster has no room for it."""
        with self._arriving:
            if self._where is not None:
                return
            while not self._answered(self._started, _PATIENCE_SECONDS):
                needs = f"a core and {self._bytes / 1e9:.2f} GB on one node"
                _log.warning("%s has not started: it needs %s, %s", self.name, needs, self.stack())
            pid, host = self._get(self._started)
            self._where = f", process {pid} on {host}"

    def _answered(self, reference: Any, seconds: float) -> bool:
        with self._errors():
            return bool(self._ray.wait([reference], timeout=max(seconds, 0.0))[0])

    def _outcome(self, reference: Any, deadline: float) -> Any:
        with self._lost():
            if not self._answered(reference, min(_PATIENCE_SECONDS, deadline - time.monotonic())):
                _log.warning("%s has not answered for %g seconds", self.name, _PATIENCE_SECONDS)
            if not self._answered(reference, deadline - time.monotonic()):
                self._end = f"has not answered for {_SECONDS:g} seconds"
                self.kill()
                raise ChildDied
            told = self._get(reference)
        if "failed" in told:
            error = ChildFailed(**told["failed"])
            raise _ERRORS.get(error.kind, RuntimeError)(f"{error}\n\nin {self.name}:\n{error.traceback}")
        letter, numbers = told["said"]
        return parcel.unpack(letter, torch.from_numpy(numbers.copy()))  # the store's own memory can't be written to

    @contextmanager
    def _lost(self) -> Generator[None]:
        """Says what has become of it."""
        try:
            yield
        except ChildDied:
            how, stack = self.obituary()
            text = f"{self.name} {how}"
            raise ShardLostError(f"{text}\n\n{stack}" if stack else text) from None


def _travelling(word: object, frame_stack: int) -> object:
    """A word as it travels: of columns of a slab, each frame once."""
    if not isinstance(word, Trajectory):
        return word
    return replace(word, obs=wire.pack(tree.map(Tensor.numpy, word.obs), frame_stack))


def _arrived(word: object) -> object:
    """What has travelled, as it was."""
    if not isinstance(word, Trajectory):
        return word

    def whole(leaf: Any) -> Tensor:
        if not isinstance(leaf, wire.Stacks):
            return torch.from_numpy(leaf)
        count, columns = leaf.linked.shape
        found = np.empty((count, columns, *leaf.whole.shape[1:]), leaf.whole.dtype)
        leaf.unpack(found)
        return torch.from_numpy(found)

    return replace(word, obs=tree.map(whole, word.obs))


def shards(cluster: Cluster, count: int, frame_stack: int) -> list[RayShard]:
    """Ties to so many shards, to be started."""
    return [RayShard(cluster, number, frame_stack) for number in range(count)]


def _packed(content: object) -> Parcel:
    letter, numbers = parcel.pack(content)
    return letter, numbers.numpy()
