"""Outposts in processes of this machine: a line on a pipe per unroll and one back, all else in shared memory."""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from functools import partial

import safetensors.torch

from slipstream import process
from slipstream.collector import Collected
from slipstream.link import Answer, Link
from slipstream.outpost import Status, Unroll, Work
from slipstream.process import Children
from slipstream.remote_process import Setup, Shared
from slipstream.standing import Standing
from slipstream.tie import ChildTie
from slipstream.types import Place, Trajectory, Weights


class Processes:
    """Outposts in processes of this machine; satisfies `Medium`.

    Slabs, weights and status share one mapping without a name, which goes with the last process. If the driver dies,
    the kernel ends the others.

    Args:
        work: Of all.
        parts: Of each, in the order of their lanes.

    Raises:
        NotPortable: Environment or policy can't be sent to another process.
    """

    def __init__(self, work: Work, parts: Sequence[Work]) -> None:
        layout = Shared.layout(work.spec, work.policy, work.rows, work.slabs, len(parts))
        memory = process.anonymous_file()
        children = process.Children("slipstream.remote_process", memory)
        self._finalizer = weakref.finalize(self, children.close)
        try:
            shared = Shared.over(memory, layout)
            shared.status[:] = Status.EMPTY
            self._ring = shared.ring
            self.slabs: Sequence[Trajectory] = shared.slabs
            setups = [Setup(index, part, layout) for index, part in enumerate(parts)]
            self.links: Sequence[Link] = [ProcessLink(children, setup, shared) for setup in setups]
        except BaseException:
            self.close()
            raise

    def publish(self, weights: Weights) -> None:
        """Makes `weights` the newest."""
        self._ring.publish(weights)

    def metrics(self) -> dict[str, float]:
        """None: a process has nothing to tell that its collector does not."""
        return {}

    def close(self) -> None:
        """Ends the processes within a few seconds; the second call does nothing."""
        self._finalizer()


class ProcessLink(ChildTie):
    """The tie to one process; satisfies `Link`.

    Args:
        children: To start it among.
        setup: What it is told.
        shared: What it shares with the driver.
    """

    def __init__(self, children: Children, setup: Setup, shared: Shared) -> None:
        content = process.pickled(
            setup,
            f"{setup.work.spec.id}: collector processes need an environment and a policy",
            "--placement.collectors thread",
        )
        super().__init__(children, content)
        self._shared, self._columns = shared, setup.columns
        self._read = _none
        self.status = Status(shared.status[setup.index])
        self.placed = True

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return f"collector process {self.pid}"

    def start(self) -> None:
        """Starts the process, in place of what is left of the one before."""
        self._read = _none
        super().start()

    def begin(self, seed: int, row: int) -> None:
        """Tells it to reset its environments and start afresh."""
        self.tell({"begin": {"seed": seed, "row": row}})
        self._read = _none

    def restore(self, seed: int, row: int, standing: Standing) -> None:
        """Tells it to bring its slots to where they had `row` rows."""
        content = safetensors.torch.save(standing.tensors())
        self.tell({"restore": {"seed": seed, "row": row, "bytes": len(content)}}, content)
        self._read = _lost

    def collect(self, places: Sequence[Place]) -> None:
        """Tells it to fill an unroll of every lane."""
        self.tell({"collect": [list(place) for place in places]})
        self._read = partial(_unroll, self._shared, self._columns)

    def stop(self, wanted: bool) -> None:
        """Has it stop at its next row."""
        self.status.stop = wanted

    def read(self) -> Answer:
        """The answer, once it has come."""
        return self._read(self.content())


def _none(content: bytes) -> Answer:
    return Answer()


def _lost(content: bytes) -> Answer:
    return Answer(lost=json.loads(content))


def _unroll(shared: Shared, columns: slice, content: bytes) -> Answer:
    if not content:
        return Answer()
    slots, seen = shared.slots.part(columns).clone(), shared.seen[columns].numpy().copy()
    return Answer(unroll=Unroll(Collected.of(json.loads(content)), slots, seen))
