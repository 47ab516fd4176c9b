"""Teammates in processes of this machine: told what to do through pipes; the kernel ends them if the driver dies."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import asdict

from slipstream import process
from slipstream.parcel import Letter
from slipstream.team_group import TeamTie
from slipstream.teammate import Duty, Meeting, MeetingPlace
from slipstream.tie import ChildTie


class ProcessHall:
    """Processes of this machine, and files by which they find each other; satisfies `Hall`.

    Args:
        duty: What they are to do.
        others: How many.

    Raises:
        NotPortable: The networks can't be sent to another process.
    """

    def __init__(self, duty: Duty, others: int) -> None:
        ranks = range(1, others + 1)
        need, instead = "several learners need networks", "--placement.learners 1"
        setups = [process.pickled((duty, rank), need, instead) for rank in ranks]
        children = process.Children("slipstream.teammate_process", process.anonymous_file())
        self._ended = weakref.finalize(self, children.close)
        self._place = MeetingPlace()
        self.ties: Sequence[TeamTie] = [ProcessTie(children, *both) for both in zip(setups, ranks, strict=True)]

    def meeting(self) -> Meeting:
        """By a file that is not there yet."""
        return self._place.meeting(len(self.ties) + 1)

    def met(self) -> None:
        """Removes the file."""
        self._place.close()

    def close(self) -> None:
        """Ends the processes within a few seconds; the second call does nothing."""
        self._ended()
        self._place.close()


class ProcessTie(ChildTie):
    """The tie to one process; satisfies `TeamTie`.

    Args:
        children: To start it among.
        setup: What it is told once.
        rank: Its number among the learners.
    """

    def __init__(self, children: process.Children, setup: bytes, rank: int) -> None:
        super().__init__(children, setup)
        self._rank = rank
        self.placed = True

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return f"learner {self._rank} (process {self.pid})"

    def join(self, meeting: Meeting) -> None:
        """Tells it where the others are."""
        self.tell({"join": asdict(meeting)})

    def differentiate(self, wanted: Letter, news: Letter | None) -> None:
        """Tells it what to differentiate."""
        letters = [wanted, news or Letter(0, b"")]
        lengths = [(letter.size, len(letter.content)) for letter in letters]
        self.tell({"differentiate": lengths}, b"".join(letter.content for letter in letters))

    def answer(self) -> Letter:
        """The answer, once it has come."""
        content = self.content()
        return Letter(int.from_bytes(content[:8], "little"), content[8:])
