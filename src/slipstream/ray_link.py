"""Outposts in actors of a Ray cluster: rows come and weights go through its object store.

    driver                                           actor p, on any node
    publish: puts the weights into the store, once   reads them there; a node fetches each version once
    collect, and if it may, the one after it      -> fills a slab of its own, puts it into the store
    read: copies the rows into their places       <- tells where they are, and begins the next

An unroll that was told of ahead begins with the newest weights nevertheless, as do rows if they are to: weights are
offered to all as they are published.

An actor that dies is replaced by another, wherever the cluster has room.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream import process, slab, tree, wire
from slipstream.collector import Collected
from slipstream.link import Answer
from slipstream.outpost import Status, Unroll, Work
from slipstream.process import ChildDied, ChildFailed
from slipstream.ray_cluster import Cluster, ClusterError
from slipstream.ray_outpost import RayOutpost
from slipstream.ray_tie import RayTie
from slipstream.standing import SlotState, Standing
from slipstream.types import Place, Trajectory, Weights

_log = logging.getLogger(__name__)

_WATCH = "watch"
_PATIENCE_SECONDS = 10.0  # for an actor to start, before a word is said


class Actors:
    """Outposts in actors of a Ray cluster; satisfies `Medium`.

    Args:
        work: Of all.
        parts: Of each, in the order of their lanes.
        address: Of the cluster, as for `Cluster`.
        cpus: Cores of this machine, for a private cluster.
        others: Cores that actors of others than these take there.
        carried: Bytes that these have in its object store at the same time.
        elastic: Whether a run goes on with those that have room.

    Attributes:
        cluster: The cluster.

    Raises:
        ClusterError: There is no such cluster.
        ImportError: Ray is not installed.
        NotPortable: Environment or policy can't be sent to another process.
    """

    def __init__(
        self,
        work: Work,
        parts: Sequence[Work],
        address: str,
        cpus: int,
        others: int = 0,
        carried: int = 0,
        *,
        elastic: bool = False,
    ) -> None:
        contents = [
            process.pickled(
                part,
                f"{work.spec.id}: Ray actors need an environment and a policy",
                "--placement.collectors thread",
            )
            for part in parts
        ]
        self.slabs: Sequence[Trajectory] = [slab.allocate(work.spec, work.policy, work.rows) for _ in range(work.slabs)]
        rows = sum(leaf.nbytes for leaf in tree.leaves(vars(self.slabs[0])))
        weights = sum(value.nbytes for value in work.policy.state_dict().values())
        # At the same time: the unrolls of every actor, and its weights, each of another version under `async`.
        store = (2 + work.ahead) * rows + (len(parts) + 2) * weights + carried
        needed = others + sum(map(_cpus, parts))
        self.cluster = Cluster(address, max(cpus, needed), store)
        if (cores := self.cluster.cores) < needed:
            _log.warning(
                "this run takes %d cores, and the Ray cluster has %d in all: %s",
                needed,
                cores,
                "collectors join it as nodes do" if elastic else "it waits until more nodes have joined",
            )
        self._published: tuple[int, Any] | None = None
        self._offers = work.ahead > 0 or work.every_row
        self.links: Sequence[RayLink] = [
            RayLink(self.cluster, content, part, self.slabs, self._newest)
            for content, part in zip(contents, parts, strict=True)
        ]

    def publish(self, weights: Weights) -> None:
        """Makes `weights` the newest.

        Raises:
            ClusterError: The object store does not take them.
        """
        values = {name: value.detach().cpu().numpy() for name, value in weights.tensors.items()}
        ray = self.cluster.ray
        if not ray.is_initialized():
            raise ClusterError("the connection to the Ray cluster is gone")
        try:
            self._published = weights.version, ray.put(values)
        except ray.exceptions.RayError as error:
            raise ClusterError(f"weights can't be put into Ray's object store: {error}") from error
        for link in self.links if self._offers else ():
            link.offer(*self._published)

    def metrics(self) -> dict[str, float]:
        """Actors that are there and their nodes, the steps that came from each, megabytes of rows, use of the store."""
        steps: dict[str, int] = {}
        for link in self.links:
            for node, count in link.steps.items():
                steps[node] = steps.get(node, 0) + count
        store = self.cluster.object_store()
        megabytes = {} if store is None else {name: count / 1e6 for name, count in store._asdict().items()}
        return {
            "cluster/actors": float(sum(bool(link.host) for link in self.links)),
            "cluster/nodes": float(len({link.node for link in self.links if link.node})),
            "cluster/megabytes": sum(link.received for link in self.links) / 1e6,
            **{f"cluster/store_{name}_megabytes": count for name, count in megabytes.items()},
            **{f"cluster/steps_{node}": float(count) for node, count in steps.items()},
        }

    def close(self) -> None:
        """Ends the actors and leaves the cluster; the second call does nothing."""
        for link in self.links:
            link.close()
        self._published = None
        self.cluster.close()

    def _newest(self) -> tuple[int, Any]:
        if self._published is None:
            raise LookupError("no weights have been published")
        return self._published


class RayLink(RayTie):
    """The tie to one actor; satisfies `Link`.

    Args:
        cluster: Where the actor will be.
        content: What the actor is told, pickled.
        work: The same.
        slabs: Where its rows go.
        newest: The version of the newest weights, and where they are.

    Attributes:
        node: Name of its node, for metrics; "" before it has one.
        steps: Valid rows that have come, by node; replaced, never changed, since another thread reads it.
        received: Bytes of rows that have come.
        placed: Whether it has said something, so that it runs; in a private cluster there is room from the start.
    """

    def __init__(
        self,
        cluster: Cluster,
        content: bytes,
        work: Work,
        slabs: Sequence[Trajectory],
        newest: Callable[[], tuple[int, Any]],
    ) -> None:
        super().__init__(cluster, _cpus(work))
        self._content, self._slabs, self._newest = content, slabs, newest
        self._size = work.spec.lane_size
        self._task = 0  # what `stop` ends
        self._calls: deque[_Call] = deque()  # whose answers have not been read
        self._restarted = 0
        self.placed = cluster.private
        self.host = self.node = ""
        self.steps: Mapping[str, int] = {}
        self.received = 0
        self.pid = -1
        self.status = Status(np.array(Status.EMPTY, np.int64))

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return f"collector actor (process {self.pid} on {self.host})" if self.host else "collector actor"

    def start(self) -> None:
        """Starts an actor, in place of what is left of the one before."""
        self.kill()
        with self._changing:
            self._restarted = self.status.restarted
            self.placed, self.host, self.node, self.pid = self._cluster.private, "", "", -1
            self._calls.clear()
            self._begin(RayOutpost, self._content, groups={_WATCH: 1})
        self._expect("make", self._made)

    def begin(self, seed: int, row: int) -> None:
        """Tells it to reset its environments and start afresh."""
        self._expect("begin", _nothing, self._new_task(), seed, row)

    def restore(self, seed: int, row: int, standing: Standing) -> None:
        """Tells it to bring its slots to where they had `row` rows."""
        tensors = {name: value.numpy() for name, value in standing.tensors().items()}
        self._expect("restore", _lost, self._new_task(), seed, row, tensors)

    def collect(self, places: Sequence[Place]) -> None:
        """Tells it to fill an unroll of every lane, after those under way."""
        if not self._calls:
            self.status.renew()
        self._expect("collect", partial(self._unroll, places), *self._newest())

    def offer(self, version: int, weights: Any) -> None:
        """Lets it have newer weights, which it takes before its next unroll or row; does nothing if it is not there.

        One that still waits for room would keep all of them in the store until it came.
        """
        with self._changing:
            if self.host and self._actor is not None and self._ray.is_initialized():
                self._actor.offer.options(concurrency_group=_WATCH).remote(self._task, version, weights)

    def stop(self, wanted: bool) -> None:
        """Has it stop at its next row."""
        with self._changing:
            self.status.stop = wanted
            if wanted and self._actor is not None and self._ray.is_initialized():
                self._actor.stop.options(concurrency_group=_WATCH).remote(self._task)

    def wait(self, seconds: float) -> bool:
        """Whether the first answer that is due comes within `seconds`."""
        call = self._first
        with self._errors():
            if self._ray.wait([call.answer], timeout=seconds)[0]:
                return True
            seen = call.watched is not None and bool(self._ray.wait([call.watched], timeout=0)[0])
        if seen:
            self.status.take(self._get(call.watched), self._restarted)
            self.placed = call.told = True
        if seen or call.watched is None:
            call.watched = self._ask("watch", group=_WATCH)
        elif not self.host and not call.told and time.monotonic() - call.begun > _PATIENCE_SECONDS:
            call.told = True
            _log.warning("an actor has not started yet: it needs %g cores of one node, %s", self._cpus, self.stack())
        return False

    def read(self) -> Answer:
        """The first answer that is due, once it has come."""
        call = self._first
        self._calls.popleft()  # rows stay in the store for as long as somebody refers to them
        told = self._get(call.answer)
        self.placed = True
        self.status.take(told["cells"], self._restarted)
        if "failed" in told:
            raise ChildFailed(**told["failed"])
        return call.understand(told["said"])

    def close(self) -> None:
        """Ends it for good; before the connection to the cluster is."""
        super().close()
        self._calls.clear()

    @property
    def _first(self) -> _Call:
        try:
            return self._calls[0]
        except IndexError:
            self._end = self._end or "was ended"
            raise ChildDied from None

    def _new_task(self) -> int:
        with self._changing:
            self._task += 1
            return self._task

    def _expect(self, method: str, understand: Callable[[Any], Answer], *words: Any) -> None:
        self._calls.append(_Call(self._ask(method, *words), understand, time.monotonic()))

    def _made(self, said: tuple[int, str, str]) -> Answer:
        self.pid, self.host, self.node = said
        return Answer()

    def _unroll(self, places: Sequence[Place], said: Mapping[str, Any] | None) -> Answer:
        """Copies the rows from the object store into their places."""
        if said is None:
            return Answer()
        for place, rows in zip(places, said["rows"], strict=True):
            self.received += sum(leaf.nbytes for leaf in tree.leaves(rows))
            part = slab.columns(self._slabs[place.slab], slice(place.column, place.column + self._size))
            tree.map(_copy, vars(part), rows)
        self.steps = {**self.steps, self.node: self.steps.get(self.node, 0) + said["collected"]["steps"]}
        slots = None if said["slots"] is None else SlotState(*tree.map(_tensor, said["slots"]))
        return Answer(unroll=Unroll(Collected.of(said["collected"]), slots, said["seen"].copy()))


@dataclass
class _Call:
    """What an actor has been told.

    Attributes:
        answer: Where the answer will be.
        understand: What it means.
        begun: When it was told.
        watched: Where the answer to the newest question will be what it is doing; None before one was asked.
        told: Whether it is known to have started, or somebody has been told that it has not.
    """

    answer: Any
    understand: Callable[[Any], Answer]
    begun: float
    watched: Any = None
    told: bool = False


def _cpus(work: Work) -> int:
    """Cores of the cluster that an actor takes."""
    return max(work.workers, 1)


def _nothing(said: Any) -> Answer:
    return Answer()


def _lost(said: Sequence[int]) -> Answer:
    return Answer(lost=said)


def _copy(to: Tensor, rows: NDArray[Any] | wire.Stacks) -> None:
    if isinstance(rows, wire.Stacks):
        rows.unpack(to.numpy())
    else:
        np.copyto(to.numpy(), rows)


def _tensor(array: NDArray[Any]) -> Tensor:
    """In memory of its own, since that of the object store can't be written to."""
    return torch.from_numpy(array.copy())
