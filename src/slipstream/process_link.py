"""Outposts in processes of this machine: a line on a pipe per unroll and one back, all else in shared memory."""

from __future__ import annotations

import json
import select
import weakref
from collections.abc import Sequence
from functools import partial

import safetensors.torch

from slipstream import process
from slipstream.collector import Collected
from slipstream.link import Answer, Link
from slipstream.outpost import Status, Unroll, Work
from slipstream.process import Child, Children
from slipstream.remote_process import Setup, Shared
from slipstream.standing import Standing
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


class ProcessLink:
    """The tie to one process; satisfies `Link`.

    Args:
        children: To start it among.
        setup: What it is told.
        shared: What it shares with the driver.
    """

    def __init__(self, children: Children, setup: Setup, shared: Shared) -> None:
        self._children, self._shared, self._columns = children, shared, setup.columns
        self._content = process.pickled(
            setup,
            f"{setup.work.spec.id}: collector processes need an environment and a policy",
            "--placement.collectors thread",
        )
        self._child: Child | None = None
        self._read = _none
        self.status = Status(shared.status[setup.index])
        self.placed = True

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return f"collector process {self.pid}"

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._living.pid

    def start(self) -> None:
        """Starts the process, in place of what is left of the one before."""
        self._read = _none
        self._child = self._children.start(self._content, instead=self._child)

    def begin(self, seed: int, row: int) -> None:
        """Tells it to reset its environments and start afresh."""
        self._tell({"begin": {"seed": seed, "row": row}})
        self._read = _none

    def restore(self, seed: int, row: int, standing: Standing) -> None:
        """Tells it to bring its slots to where they had `row` rows."""
        content = safetensors.torch.save(standing.tensors())
        self._tell({"restore": {"seed": seed, "row": row, "bytes": len(content)}}, content)
        self._read = _lost

    def collect(self, places: Sequence[Place]) -> None:
        """Tells it to fill an unroll of every lane."""
        self._tell({"collect": [list(place) for place in places]})
        self._read = partial(_unroll, self._shared, self._columns)

    def stop(self, wanted: bool) -> None:
        """Has it stop at its next row."""
        self.status.stop = wanted

    def wait(self, seconds: float) -> bool:
        """Whether the answer comes within `seconds`."""
        child = self._living
        (fd,) = child.answers
        poll = select.poll()
        for source in (fd, child.pidfd):
            if source is not None:
                poll.register(source, select.POLLIN)
        ready = [source for source, _ in poll.poll(seconds * 1000.0)]
        if ready and fd not in ready:
            raise process.ChildDied
        return bool(ready)

    def read(self) -> Answer:
        """The answer, once it has come."""
        child = self._living
        return self._read(child.read(child.answers[0]))

    def obituary(self) -> tuple[str, str]:
        """How it ended, and the stack that it left, if any."""
        return self._living.obituary()

    def stack(self) -> str:
        """Its Python stack, or nothing if it does not even answer to a signal."""
        return self._living.stack_now()

    def kill(self) -> None:
        """Ends it at once, with all that it started."""
        self._living.kill_group()

    @property
    def _living(self) -> Child:
        assert self._child is not None, "it has not been started"
        return self._child

    def _tell(self, command: dict[str, object], more: bytes = b"") -> None:
        self._living.tell(json.dumps(command).encode() + b"\n" + more)


def _none(content: bytes) -> Answer:
    return Answer()


def _lost(content: bytes) -> Answer:
    return Answer(lost=json.loads(content))


def _unroll(shared: Shared, columns: slice, content: bytes) -> Answer:
    if not content:
        return Answer()
    slots, seen = shared.slots.part(columns).clone(), shared.seen[columns].numpy().copy()
    return Answer(unroll=Unroll(Collected.of(json.loads(content)), slots, seen))
