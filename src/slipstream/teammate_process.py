"""The life of a process that differentiates shards: it is told what to do through pipes, numbers come by gloo.

Commands are lines of JSON. Letters are a line of JSON too, followed by their content.
"""

from __future__ import annotations

from functools import partial
from typing import Any, BinaryIO

import cloudpickle

from slipstream import arithmetic, process
from slipstream.parcel import Letter
from slipstream.teammate import Broken, Meeting, Teammate
from slipstream.tie import told


def main(fds: process.Descriptors) -> None:
    """Entry point of the process."""
    arithmetic.settle()
    self = _Process()
    answer = partial(process.answer, fds.answers[0])
    if answer(partial(self.make, fds)):
        for command, more in told(fds.commands):
            if answer(partial(self.obey, command, more)) and "differentiate" in command:
                try:
                    self.teammate.deliver()
                except Broken:
                    break  # the first learner has left, or sees that this one has
    process.leave()


class _Process:
    teammate: Teammate

    def make(self, fds: process.Descriptors) -> None:
        """Makes the networks."""
        duty, rank = cloudpickle.loads(process.read_file(fds.setup))
        self.teammate = Teammate(duty, rank)

    def obey(self, command: dict[str, Any], more: BinaryIO) -> bytes | None:
        """Does what the first learner says; `more` holds what comes with it."""
        if "join" in command:
            self.teammate.join(Meeting(**command["join"]))
            return None
        letters = [Letter(size, more.read(length)) if length else None for size, length in command["differentiate"]]
        wanted, news = letters
        assert wanted is not None, "an order without content"
        found = self.teammate.differentiate(wanted, news)
        return found.size.to_bytes(8, "little") + found.content
