"""Outposts in actors of a Ray cluster: rows come and weights go through its object store.

    driver                                           actor p, on any node
    publish: puts the weights into the store, once   reads them there; a node fetches each version once
    collect                                       -> fills a slab of its own, puts it into the store
    read: copies the rows into their places       <- tells where they are

An actor that dies is replaced by another, wherever the cluster has room.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
from slipstream.ray_cluster import Cluster
from slipstream.ray_outpost import RayOutpost
from slipstream.standing import SlotState, Standing
from slipstream.types import Place, Trajectory, Weights

_log = logging.getLogger(__name__)

_WATCH = "watch"
_PATIENCE_SECONDS = 10.0  # for an actor to find room, before a word is said


class Actors:
    """Outposts in actors of a Ray cluster; satisfies `Medium`.

    Args:
        work: Of all.
        parts: Of each, in the order of their lanes.
        address: Of the cluster, as for `Cluster`.
        cpus: Cores of this machine, for a private cluster.

    Raises:
        ImportError: Ray is not installed.
        NotPortable: Environment or policy can't be sent to another process.
        RayError: There is no such cluster.
    """

    def __init__(self, work: Work, parts: Sequence[Work], address: str, cpus: int) -> None:
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
        needed = sum(map(_cpus, parts))
        self._cluster = Cluster(address, max(cpus, needed), 3 * rows + 4 * weights)
        self._published: tuple[int, Any] | None = None
        self.links: Sequence[RayLink] = [
            RayLink(self._cluster.ray, content, part, self.slabs, self._newest)
            for content, part in zip(contents, parts, strict=True)
        ]

    def publish(self, weights: Weights) -> None:
        """Makes `weights` the newest."""
        values = {name: value.detach().cpu().numpy() for name, value in weights.tensors.items()}
        self._published = weights.version, self._cluster.ray.put(values)

    def metrics(self) -> dict[str, float]:
        """Nodes that have actors, the rows that came from each, and what came from all."""
        steps = sum((link.steps for link in self.links), Counter[str]())
        return {
            "cluster/nodes": float(len({link.host for link in self.links})),
            "cluster/megabytes": sum(link.received for link in self.links) / 1e6,
            **{f"cluster/steps_{host}": float(count) for host, count in steps.items()},
        }

    def close(self) -> None:
        """Ends the actors and leaves the cluster; the second call does nothing."""
        for link in self.links:
            link.close()
        self._cluster.close()

    def _newest(self) -> tuple[int, Any]:
        if self._published is None:
            raise LookupError("no weights have been published")
        return self._published


class RayLink:
    """The tie to one actor; satisfies `Link`.

    Args:
        ray: The library, connected.
        content: What the actor is told, pickled.
        work: The same.
        slabs: Where its rows go.
        newest: The version of the newest weights, and where they are.

    Attributes:
        host: Name of its node.
        steps: Valid rows that have come from nodes, by name.
        received: Bytes of rows that have come.
    """

    def __init__(
        self,
        ray: Any,
        content: bytes,
        work: Work,
        slabs: Sequence[Trajectory],
        newest: Callable[[], tuple[int, Any]],
    ) -> None:
        self._ray, self._content, self._slabs, self._newest = ray, content, slabs, newest
        self._size = work.spec.lane_size
        self._cpus = _cpus(work)
        self._class = ray.remote(
            num_cpus=self._cpus, max_restarts=0, concurrency_groups={_WATCH: 1}, scheduling_strategy="SPREAD"
        )(RayOutpost)
        self._actor: Any = None
        self._closed = False
        self._task = 0  # what `stop` ends
        self._end = ""
        self._restarted = 0
        self.host = ""
        self.steps = Counter[str]()
        self.received = 0
        self.pid = -1
        self.status = Status(np.array(Status.EMPTY, np.int64))

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return f"collector actor (process {self.pid} on {self.host or 'no node yet'})"

    def start(self) -> None:
        """Starts an actor, in place of what is left of the one before."""
        if self._closed:
            raise ChildDied
        self.kill()
        self._restarted = self.status.restarted
        self._actor = self._class.remote(self._content)
        self._watched: Any = None
        self._since: float | None = time.monotonic()
        self._expect(self._actor.make.remote(), self._made)

    def begin(self, seed: int, row: int) -> None:
        """Tells it to reset its environments and start afresh."""
        self._task += 1
        self._expect(self._actor.begin.remote(self._task, seed, row), _nothing)

    def restore(self, seed: int, row: int, standing: Standing) -> None:
        """Tells it to bring its slots to where they had `row` rows."""
        self._task += 1
        tensors = {name: value.numpy() for name, value in standing.tensors().items()}
        self._expect(self._actor.restore.remote(self._task, seed, row, tensors), _lost)

    def collect(self, places: Sequence[Place]) -> None:
        """Tells it to fill an unroll of every lane."""
        self._expect(self._actor.collect.remote(*self._newest()), partial(self._unroll, places))

    def stop(self, wanted: bool) -> None:
        """Has it stop at its next row."""
        self.status.stop = wanted
        if wanted and self._actor is not None:
            self._actor.stop.options(concurrency_group=_WATCH).remote(self._task)

    def wait(self, seconds: float) -> bool:
        """Whether the answer comes within `seconds`."""
        if self._ray.wait([self._answer], timeout=seconds)[0]:
            return True
        if self._watched is None:
            self._watched = self._actor.watch.options(concurrency_group=_WATCH).remote()
        elif self._ray.wait([self._watched], timeout=0)[0]:
            self.status.take(self._get(self._watched), self._restarted)
            self._watched = self._since = None
        if self._since is not None and time.monotonic() - self._since > _PATIENCE_SECONDS:
            self._since = None
            _log.warning("an actor waits for %g free cores of the Ray cluster, %s", self._cpus, self._room())
        return False

    def read(self) -> Answer:
        """The answer, once it has come."""
        told, self._since = self._get(self._answer), None
        if "failed" in told:
            raise ChildFailed(**told["failed"])
        return self._understand(told["said"])

    def obituary(self) -> tuple[str, str]:
        """How it ended."""
        return f"has died ({self._end})", ""

    def stack(self) -> str:
        """Why it may not answer."""
        return f"The Ray cluster has {self._room()}."

    def kill(self) -> None:
        """Ends it at once, with all that it started."""
        if self._actor is not None:
            self._ray.kill(self._actor)

    def close(self) -> None:
        """Ends it for good; before the connection to the cluster is."""
        self._closed = True
        self.kill()

    def _expect(self, answer: Any, understand: Callable[[Any], Answer]) -> None:
        self._answer, self._understand = answer, understand

    def _get(self, reference: Any) -> Any:
        """What the actor has said.

        Raises:
            ChildDied: It died, or its node did, or what it said was lost on the way.
            ChildFailed: It could not even begin.
        """
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:
            raise ChildFailed(type(error.cause).__name__, str(error.cause), str(error)) from None
        except errors.RayError as error:
            said = str(error).partition("The actor is dead because ")[2] or str(error)  # before that it names itself
            reason = " ".join(said.partition("Some common causes")[0].split())
            self._end = f"{type(error).__name__}: {reason}"
            raise ChildDied from None

    def _made(self, said: tuple[int, str]) -> Answer:
        self.pid, self.host = said
        return Answer()

    def _unroll(self, places: Sequence[Place], said: Mapping[str, Any] | None) -> Answer:
        """Copies the rows from the object store into their places."""
        if said is None:
            return Answer()
        for place, rows in zip(places, said["rows"], strict=True):
            self.received += sum(leaf.nbytes for leaf in tree.leaves(rows))
            to = vars(slab.columns(self._slabs[place.slab], slice(place.column, place.column + self._size)))
            if isinstance(rows["obs"], wire.Stacks):
                wire.unpack(rows["obs"], to["obs"].numpy())
                to, rows = ({name: part[name] for name in part if name != "obs"} for part in (to, rows))
            tree.map(_copy, to, rows)
        self.steps[self.host] += said["collected"]["steps"]
        slots = None if said["slots"] is None else SlotState(*tree.map(_tensor, said["slots"]))
        return Answer(unroll=Unroll(Collected.of(said["collected"]), slots, said["seen"].copy()))

    def _room(self) -> str:
        free = self._ray.available_resources().get("CPU", 0.0)
        return f"{free:g} of {self._ray.cluster_resources().get('CPU', 0.0):g} cores free"


def _cpus(work: Work) -> int:
    """Cores of the cluster that an actor takes."""
    return max(work.workers, 1)


def _nothing(said: Any) -> Answer:
    return Answer()


def _lost(said: Sequence[int]) -> Answer:
    return Answer(lost=said)


def _copy(to: Tensor, source: NDArray[Any]) -> None:
    np.copyto(to.numpy(), source)


def _tensor(array: NDArray[Any]) -> Tensor:
    """In memory of its own, since that of the object store can't be written to."""
    return torch.from_numpy(array.copy())
