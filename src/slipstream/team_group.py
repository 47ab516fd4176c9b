"""The group of learners, as the first one sees it: who is in it, what is sent and received, and who is replaced.

A group of torch.distributed can't change. If one of the others dies or hangs, all are replaced, and what they were
asked is asked again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

from torch import Tensor

from slipstream import parcel
from slipstream.parcel import Letter
from slipstream.patience import Patience
from slipstream.process import ChildDied, ChildFailed
from slipstream.teammate import Broken, Channel, Meeting, Pending
from slipstream.tie import Tie

Result = TypeVar("Result")

_log = logging.getLogger(__name__)

_SLICE_SECONDS = 0.5
_DEATH_SECONDS = 0.1  # a connection ends before the process that had it
_PATIENCE_SECONDS = 10.0  # for one to have room, before a word is said


class LearnerError(RuntimeError):
    """A learner died, hangs, or can't be started."""


class TeamTie(Tie, Protocol):
    """The first learner's end of a tie to another."""

    def join(self, meeting: Meeting) -> None:
        """Tells it where the others are.

        Raises:
            ChildDied: It is not there to be told; so in `differentiate`.
        """
        ...

    def differentiate(self, wanted: Letter, news: Letter | None) -> None:
        """Tells it what to differentiate; arguments as of `Teammate.differentiate`."""
        ...

    def answer(self) -> Letter:
        """The answer, once it has come: to `differentiate`, of what is to be received.

        Raises:
            ChildDied: It breaks off.
            ChildFailed: It is the report of an error.
        """
        ...


class Hall(Protocol):
    """Where the others are, and meet."""

    ties: Sequence[TeamTie]

    def meeting(self) -> Meeting:
        """A place to meet where nobody has met before."""
        ...

    def met(self) -> None:
        """All have met there."""
        ...

    def close(self) -> None:
        """Ends all within a few seconds; the second call does nothing."""
        ...


class Group:
    """The others, by rank from 1 on, and the ways to them.

    Args:
        size: Learners, the first one among them.
        restarts: How often in a row, with less than 100 gradients between, they are replaced.
        seconds: After which one that has not answered is given up; at their start they have twice as long.

    Attributes:
        ranks: Of the others.
        replaced: How often they have been.
    """

    def __init__(self, size: int, restarts: int, seconds: float) -> None:
        self.ranks = range(1, size)
        self.replaced = 0
        self._seconds = seconds
        self._patience = Patience[LearnerError](restarts)
        self._hall: Hall | None = None
        self._channel: Channel | None = None
        self._under_way: dict[int, Pending] = {}  # by rank, what is being sent; 0 for all
        self._abandoned = False
        self._told: dict[int, float] = {}  # by rank, when it was told what it has not answered yet

    def start(self, hall: Hall) -> None:
        """Starts all; returns at once.

        Args:
            hall: Has them; it is closed with this.

        Raises:
            OSError: The system can't.
        """
        self._hall = hall
        for rank in self.ranks:
            self._start(rank)

    def post(self, rank: int, content: object, news: Letter | None = None) -> tuple[Letter, Tensor]:
        """Sends one what it is to differentiate, and returns that, packed.

        Args:
            rank: Whom.
            content: The ask, and what has changed.
            news: Of what is sent to all with the next `broadcast`.

        Raises:
            LearnerError: It is not there; so everywhere here.
        """
        channel = self._met()
        wanted, numbers = parcel.pack(content)
        self._tell(rank, lambda tie: tie.differentiate(wanted, news))
        with self._losing():
            self._under_way[rank] = channel.send(numbers, rank)
        return wanted, numbers

    def broadcast(self, numbers: Tensor) -> None:
        """Sends all the numbers of the news that they were told of."""
        with self._losing():
            self._under_way[0] = self._met().broadcast(numbers)

    def ready(self, rank: int) -> bool:
        """Whether an answer is there."""
        try:
            if self._tie(rank).wait(0.0):
                return True
        except ChildDied:
            raise self._death(rank) from None
        self._require_time(rank, self._seconds)
        return False

    def answer(self, rank: int) -> Letter:
        """Waits for an answer.

        Raises:
            RuntimeError: It raised; with its traceback.
        """
        return self._answer(rank, self._seconds)

    def receive(self, rank: int, letter: Letter) -> Any:
        """What one sends after it has answered."""
        channel = self._met()
        with self._losing():
            for key in (0, rank):
                if (work := self._under_way.pop(key, None)) is not None:
                    work.wait()
            return parcel.unpack(letter, channel.receive(letter.size, rank))

    def reduce(self, numbers: Tensor) -> None:
        """Adds the numbers of all to those that are here."""
        channel = self._met()
        with self._losing():
            channel.reduce(numbers).wait()

    def despite_death(self, task: Callable[[], Result], again: Callable[[], Result], done: int) -> Result:
        """What `task` returns; if one dies or hangs meanwhile, all are replaced, and `again` is done instead.

        Args:
            task: Wants something of the others.
            again: Asks them anew first.
            done: Gradients so far.

        Raises:
            LearnerError: There is no hope.
        """
        attempt = task
        while True:
            try:
                return attempt()
            except LearnerError as lost:
                known = LearnerError(str(lost))  # without what its traceback holds on to
            time.sleep(self._patience.pause(known, "", done))
            attempt = partial(self._anew, again)

    def abandon(self) -> None:
        """Has all be replaced before they are asked again: what they were asked is not wanted any more."""
        self._abandoned = self._channel is not None

    def close(self) -> None:
        """Ends the others, and then leaves the group; the second call does nothing."""
        try:
            if self._hall is not None:
                self._hall.close()
        finally:
            self._leave()

    def _anew(self, task: Callable[[], Result]) -> Result:
        self._replace()
        self.replaced += 1
        return task()

    def _replace(self) -> None:
        for rank in self.ranks:
            self._tie(rank).kill()  # first: a group with somebody in it who hangs can't be left at once
        self._leave()
        for rank in self.ranks:
            try:
                self._start(rank)
            except OSError as error:
                raise LearnerError(f"another {self._tie(rank).name} can't be started: {error}") from error

    def _start(self, rank: int) -> None:
        tie = self._tie(rank)
        try:
            tie.start()
        except ChildDied:
            raise LearnerError(f"{tie.name} can't be started any more") from None
        self._told[rank] = time.monotonic()

    def _met(self) -> Channel:
        """The way to the others; waits until all have started and met, if they have not."""
        if self._abandoned:
            self._replace()
        if self._channel is not None:
            return self._channel
        assert self._hall is not None, "it has not been started"
        for rank in self.ranks:
            self._answer(rank, 2 * self._seconds)
        meeting = self._hall.meeting()
        for rank in self.ranks:
            self._tell(rank, lambda tie: tie.join(meeting))
        with self._losing():
            self._channel = meeting.join(0)
        for rank in self.ranks:
            self._answer(rank, self._seconds)
        self._hall.met()
        return self._channel

    def _leave(self) -> None:
        """Leaves the group, which the others have left or are about to."""
        self._under_way.clear()
        self._abandoned = False
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _tie(self, rank: int) -> TeamTie:
        assert self._hall is not None, "it has not been started"
        return self._hall.ties[rank - 1]

    def _tell(self, rank: int, what: Callable[[TeamTie], None]) -> None:
        self._told[rank] = time.monotonic()
        try:
            what(self._tie(rank))
        except ChildDied:
            raise self._death(rank) from None

    def _answer(self, rank: int, seconds: float) -> Letter:
        tie, said = self._tie(rank), False
        self._told[rank] = time.monotonic()  # it may have waited for this one
        try:
            while not tie.wait(_SLICE_SECONDS):
                self._require_time(rank, seconds)
                if not tie.placed and not said and time.monotonic() - self._told[rank] > _PATIENCE_SECONDS:
                    said = True
                    _log.warning("%s has not started yet: %s", tie.name, tie.stack())
            return tie.answer()
        except ChildDied:
            raise self._death(rank) from None
        except ChildFailed as error:
            if error.kind == Broken.__name__:
                raise self._break() from None
            raise RuntimeError(f"{error}\n\nin {tie.name}:\n{error.traceback}") from None

    def _require_time(self, rank: int, seconds: float) -> None:
        """Gives up one that has not answered for so long."""
        tie = self._tie(rank)
        if tie.placed and time.monotonic() - self._told[rank] > seconds:
            how = f"has not answered for {seconds:g} seconds"
            text = f"{tie.name} {how}\n\n{tie.stack()}"
            tie.kill()
            raise LearnerError(text)

    def _death(self, rank: int) -> LearnerError:
        tie = self._tie(rank)
        how, stack = tie.obituary()
        text = f"{tie.name} {how}"
        return LearnerError(f"{text}\n\n{stack}" if stack else text)

    @contextmanager
    def _losing(self) -> Generator[None]:
        """That the way to another breaks off within means that somebody is gone."""
        try:
            yield
        except Broken as error:
            raise self._break() from error

    def _break(self) -> LearnerError:
        """The error for a way that broke off: the death that it comes of, if there is one to be seen."""
        for rank in self.ranks:
            try:
                self._tie(rank).wait(_DEATH_SECONDS)
            except ChildDied:
                return self._death(rank)
        return LearnerError("the way between two learners broke off, though none has died")
