"""Teammates in actors of a Ray cluster: told what to do by calls, numbers come by gloo between the machines."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import cloudpickle

from slipstream import arithmetic, process
from slipstream.parcel import Letter
from slipstream.ray_cluster import Cluster, address
from slipstream.ray_tie import RayTie
from slipstream.team_group import TeamTie
from slipstream.teammate import MEETING_SECONDS, Broken, Duty, Meeting, MeetingPlace, Teammate

_NOTHING = Letter(0, b"")


class RayTeammate:
    """What lives in the actor.

    Args:
        content: `Duty`, pickled.
        rank: Its number among the learners.
    """

    def __init__(self, content: bytes, rank: int) -> None:
        arithmetic.settle()
        self._teammate = Teammate(cloudpickle.loads(content), rank)
        self._due = False

    def where(self) -> tuple[int, str]:
        """Number of this process, and its machine."""
        return os.getpid(), platform.node()

    def join(self, meeting: Meeting) -> None:
        """Meets the others."""
        self._teammate.join(meeting)

    def differentiate(self, wanted: Letter, news: Letter | None) -> Letter:
        """As `Teammate.differentiate`."""
        found = self._teammate.differentiate(wanted, news)
        self._due = True
        return found

    def deliver(self) -> None:
        """Sends what was found, if anything was."""
        if self._due:
            self._due = False
            with suppress(Broken):  # the first learner has left, or sees that this one has
                self._teammate.deliver()


class RayHall:
    """Actors of a cluster; satisfies `Hall`.

    Args:
        cluster: Has room for them.
        duty: What they are to do.
        others: How many.

    Raises:
        NotPortable: The networks can't be sent to another process.
    """

    def __init__(self, cluster: Cluster, duty: Duty, others: int) -> None:
        self._cluster = cluster
        self._place = MeetingPlace()
        content = process.pickled(duty, "several learners need networks", "--placement.learners 1")
        made = [RayTeammateTie(cluster, content, duty.threads, rank) for rank in range(1, others + 1)]
        self.ties: Sequence[TeamTie] = made
        self._made = made

    def meeting(self) -> Meeting:
        """A file of this machine for a private cluster, a free port of this one for another."""
        size = len(self.ties) + 1
        if self._cluster.private:
            return self._place.meeting(size)
        with socket.socket() as free:
            free.bind(("", 0))
            return Meeting(f"tcp://{address()}:{free.getsockname()[1]}", size, MEETING_SECONDS)

    def met(self) -> None:
        """Removes the file."""
        self._place.close()

    def close(self) -> None:
        """Ends the actors; the second call does nothing."""
        for tie in self._made:
            tie.close()
        self._place.close()


class RayTeammateTie(RayTie):
    """The tie to one actor; satisfies `TeamTie`.

    Args:
        cluster: Where it will be.
        content: What it is told once.
        cpus: Cores that it takes.
        rank: Its number among the learners.
    """

    def __init__(self, cluster: Cluster, content: bytes, cpus: int, rank: int) -> None:
        super().__init__(cluster, cpus)
        self._content, self._rank = content, rank
        self._answer: Any = None
        self._starting = False
        self._where = ""
        self.placed = cluster.private

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return f"learner {self._rank} (actor{self._where})"

    def start(self) -> None:
        """Starts an actor, in place of what is left of the one before."""
        self.kill()
        self._where, self.placed, self._starting = "", self._cluster.private, True
        with self._changing:
            self._begin(RayTeammate, self._content, self._rank)
        self._answer = self._ask("where")

    def join(self, meeting: Meeting) -> None:
        """Tells it where the others are."""
        self._answer = self._ask("join", meeting)

    def differentiate(self, wanted: Letter, news: Letter | None) -> None:
        """Tells it what to differentiate, and to send what it finds once it has answered."""
        self._answer = self._ask("differentiate", wanted, news)
        self._ask("deliver")

    def wait(self, seconds: float) -> bool:
        """Whether the answer comes within `seconds`."""
        with self._errors():
            return bool(self._ray.wait([self._answer], timeout=seconds)[0])

    def answer(self) -> Letter:
        """The answer, once it has come."""
        said = self._get(self._answer)
        if self._starting:
            self._starting, self.placed = False, True
            self._where = f", process {said[0]} on {said[1]}"
            return _NOTHING
        return said or _NOTHING
