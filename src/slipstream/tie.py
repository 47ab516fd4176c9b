"""What ties the driver to a process elsewhere that may be replaced, whatever it is told; and such a tie to a child."""

from __future__ import annotations

import json
import select
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, Protocol

from slipstream.process import Child, ChildDied, Children


class Tie(Protocol):
    """The driver's end of a tie to one process, which answers everything that it is told, also its start."""

    @property
    def name(self) -> str:
        """What to call it in messages."""
        ...

    @property
    def placed(self) -> bool:
        """Whether its process is there, as far as is known; until then it may wait for room, however long."""
        ...

    def start(self) -> None:
        """Starts it, in place of what is left of the one before.

        Raises:
            ChildDied: All have been closed.
            OSError: The system can't start another; or, later, `wait` raises `ChildDied`.
        """
        ...

    def wait(self, seconds: float) -> bool:
        """Whether the answer comes within `seconds`.

        Raises:
            ChildDied: It ended before.
        """
        ...

    def obituary(self) -> tuple[str, str]:
        """How it ended, not having been told to (`was killed by SIGKILL`), and the stack that it left, if any."""
        ...

    def stack(self) -> str:
        """Its Python stack while it lives, or what else is known of why it does not answer."""
        ...

    def kill(self) -> None:
        """Ends it at once, with all that it started."""
        ...


class ChildTie:
    """The driver's end of a child that may be replaced, which answers everything that it is told, also its start.

    Args:
        children: To start it among.
        setup: What it is told once.
    """

    def __init__(self, children: Children, setup: bytes) -> None:
        self._children, self._setup = children, setup
        self._child: Child | None = None

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._living.pid

    def start(self) -> None:
        """Starts the process, in place of what is left of the one before; raises as `Children.start`."""
        self._child = self._children.start(self._setup, instead=self._child)

    def tell(self, command: Mapping[str, object], more: bytes = b"") -> None:
        """Tells it what to do, as a line of JSON, and what comes with that.

        Raises:
            ChildDied: Nobody is there to read it.
        """
        self._living.tell(json.dumps(command).encode() + b"\n" + more)

    def wait(self, seconds: float) -> bool:
        """Whether the answer comes within `seconds`.

        Raises:
            ChildDied: It ended before.
        """
        child = self._living
        (fd,) = child.answers
        poll = select.poll()
        for source in (fd, child.pidfd):
            if source is not None:
                poll.register(source, select.POLLIN)
        ready = [source for source, _ in poll.poll(seconds * 1000.0)]
        if ready and fd not in ready:
            raise ChildDied
        return bool(ready)

    def content(self) -> bytes:
        """The answer, once it has come; raises as `Child.read`."""
        child = self._living
        return child.read(child.answers[0])

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


def told(fd: int) -> Iterator[tuple[dict[str, Any], BinaryIO]]:
    """In the child: what `ChildTie.tell` tells, and where to read what comes with it, until the driver closes the pipe.

    Args:
        fd: Of the commands.
    """
    with open(fd, "rb") as commands:
        for line in commands:
            yield json.loads(line), commands
