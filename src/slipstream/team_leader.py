"""The first of several learners: it has others differentiate, and applies what they find.

    together (`ordered`, `all_reduce`)     every learner has some shards of every minibatch; their gradients are added:
                                           shard by shard in their order, so that the bits are those of one learner, or
                                           as the library finds it fastest
    apart (`asynchronous`)                 every learner has minibatches of its own; gradients are applied as they come,
                                           each of parameters that lack those that came meanwhile

Who waits for whom: teammates for the leader, as long as it takes; the leader for teammates once it has done its own
share, at most for the time limit. One that died or hangs is replaced, with all others, since a group of
torch.distributed can't change, and what it was asked is asked again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, pairwise
from statistics import fmean
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from slipstream import parcel
from slipstream.descent import Gradient, added
from slipstream.objective import Objective
from slipstream.parcel import Letter
from slipstream.patience import Patience
from slipstream.process import ChildDied, ChildFailed
from slipstream.team import KINDS, Ask, Own, Reduction
from slipstream.teammate import Meeting, flat, section

Result = TypeVar("Result")

_SLICE_SECONDS = 0.5


class LearnerError(RuntimeError):
    """A learner died, hangs, or can't be started.

    Attributes:
        kind: How it ended, in words that are the same when it happens again.
    """

    def __init__(self, text: str, kind: str) -> None:
        super().__init__(text)
        self.kind = kind


class Tie(Protocol):
    """The leader's end of what ties it to a teammate, which answers everything that it is told, also its start."""

    @property
    def name(self) -> str:
        """What to call it in messages."""
        ...

    def start(self) -> None:
        """Starts it, in place of what is left of the one before.

        Raises:
            ChildDied: All have been closed.
            OSError: The system can't start another.
        """
        ...

    def join(self, meeting: Meeting) -> None:
        """Tells it where the others are.

        Raises:
            ChildDied: It is not there to be told; so in `differentiate`.
        """
        ...

    def differentiate(self, wanted: Letter, news: Letter | None) -> None:
        """Tells it what to differentiate; arguments as of `Teammate.differentiate`."""
        ...

    def wait(self, seconds: float) -> bool:
        """Whether the answer comes within `seconds`.

        Raises:
            ChildDied: It ended before.
        """
        ...

    def answer(self) -> Letter:
        """The answer, once it has come: to `differentiate`, of what is to be received.

        Raises:
            ChildDied: It breaks off.
            ChildFailed: It is the report of an error.
        """
        ...

    def obituary(self) -> tuple[str, str]:
        """How it ended, not having been told to (`was killed by SIGKILL`), and the stack that it left, if any."""
        ...

    def stack(self) -> str:
        """Its Python stack while it lives."""
        ...

    def kill(self) -> None:
        """Ends it at once."""
        ...


class Hall(Protocol):
    """Where teammates are, and meet."""

    ties: Sequence[Tie]

    def meeting(self) -> Meeting:
        """A place to meet where nobody has met before."""
        ...

    def close(self) -> None:
        """Ends all within a few seconds; the second call does nothing."""
        ...


class Leader:
    """The first learner's end of a team; satisfies `Team`.

    Args:
        objective: What is differentiated.
        size: Learners, this one among them.
        shards: Of a minibatch.
        reduction: What becomes of the gradients.
        restarts: How often in a row, with less than 100 gradients between, a teammate that died or hangs is replaced.
        seconds: After which one that has not answered is given up; at their start they have twice as long.
    """

    def __init__(
        self, objective: Objective, size: int, shards: int, reduction: Reduction, restarts: int, seconds: float = 300.0
    ) -> None:
        self._objective, self._reduction, self._seconds = objective, reduction, seconds
        self._hall: Hall | None = None
        self._shares = [slice(*ends) for ends in pairwise(shards * rank // size for rank in range(size + 1))]
        self._patience = Patience[LearnerError](restarts)
        # By rank: ties, what has not been answered, what is on its way, what has changed since, how old that is.
        self._ties: dict[int, Tie] = {}
        self._asked: dict[int, Ask] = {}
        self._works: dict[int, Any] = {}
        self._news: dict[int, dict[str, None]] = {rank: {} for rank in range(1, size)}
        self._since: dict[int, int] = {}
        self._lags: list[int] = []
        self._joined = False
        self._applied = self._replaced = 0
        self.changed()

    def start(self, hall: Hall) -> None:
        """Starts the others; returns at once.

        Args:
            hall: Has them; it is closed with this.

        Raises:
            OSError: The system can't.
        """
        self._hall = hall
        self._ties = dict(enumerate(hall.ties, start=1))
        for tie in self._ties.values():
            tie.start()

    def gradients(self, asks: Iterable[Ask], own: Own, *, all_now: bool) -> Generator[tuple[Ask, Gradient]]:
        """Has the others do their share while `own` does this learner's.

        Raises:
            LearnerError: One died or hangs, and there is no hope.
            RuntimeError: One raised; with its traceback.
        """
        self._lags.clear()
        if self._reduction == "asynchronous":
            return self._apart(asks, own, all_now)
        return self._together(asks, own)

    def changed(self, *sections: str) -> None:
        """Notes what to send with what is asked next."""
        known = self._objective.modules
        names = sections or [f"{module}.{kind}" for module in known for kind in KINDS]
        for news in self._news.values():
            news.update(dict.fromkeys(name for name in names if name.rpartition(".")[0] in known))

    def metrics(self) -> dict[str, float]:
        """How often teammates have been replaced; and how many gradients were applied while one was taken."""
        found = {"faults/learner_restarts": float(self._replaced)}
        if self._lags:
            found |= {"lag/gradients_mean": fmean(self._lags), "lag/gradients_max": float(max(self._lags))}
        return found

    def close(self) -> None:
        """Ends the others."""
        self._leave()
        if self._hall is not None:
            self._hall.close()

    def _together(self, asks: Iterable[Ask], own: Own) -> Generator[tuple[Ask, Gradient]]:
        for ask in asks:
            mine, *theirs = (Ask(ask.order, ask.parts[share]) for share in self._shares)
            self._asked = dict(enumerate(theirs, start=1))
            self._despite_death(self._send, self._send)
            found = own(*mine)
            total = self._awaited(partial(self._added, found))
            self._asked.clear()
            yield ask, self._counted(total, self._applied)

    def _apart(self, asks: Iterable[Ask], own: Own, all_now: bool) -> Generator[tuple[Ask, Gradient]]:
        try:
            for rank in list(self._asked):  # of the call before
                if self._awaited(partial(self._ready, rank)):
                    yield self._take(rank)
            for ask in asks:
                idle = next((rank for rank in self._news if rank not in self._asked), None)
                if idle is not None:
                    self._asked[idle] = ask
                    self._despite_death(partial(self._hand, idle), self._send)
                    continue
                before = self._applied
                yield ask, self._counted(added(own(*ask)), before)
                for rank in list(self._asked):
                    if self._awaited(partial(self._ready, rank)):
                        yield self._take(rank)
            while all_now and self._asked:
                yield self._take(next(iter(self._asked)))
        except GeneratorExit:  # the rest is not wanted
            while self._asked:
                self._take(next(iter(self._asked)))
            raise

    def _counted(self, gradient: Gradient, before: int) -> Gradient:
        """The gradient, which is about to be applied; so many had been applied to the parameters that it is of."""
        self._lags.append(self._applied - before)
        self._applied += 1
        return gradient

    def _send(self) -> None:
        """Sends all what they are asked: what has changed to those who work together at once."""
        if not self._joined:
            self._meet()
        if self._reduction == "asynchronous":
            for rank in self._asked:
                self._hand(rank)
            return
        news, numbers = parcel.pack(self._sections(self._news[1]))  # that of all
        for rank, ask in self._asked.items():
            self._post(rank, (ask, {}), news if news.size else None)
        if news.size:
            self._works[0] = dist.broadcast(numbers, 0, async_op=True)
            for each in self._news.values():
                each.clear()

    def _hand(self, rank: int) -> None:
        """Sends one of those who work apart what it is asked, and what has changed since it was last."""
        if not self._joined:
            self._meet()
        self._since[rank] = self._applied
        sent = self._post(rank, (self._asked[rank], self._sections(self._news[rank])), None)
        self._asked[rank], _ = parcel.unpack(*sent)  # the caller may overwrite what it was made of
        self._news[rank].clear()

    def _post(self, rank: int, content: object, news: Letter | None) -> tuple[Letter, Tensor]:
        wanted, numbers = parcel.pack(content)
        self._tell(rank, lambda tie: tie.differentiate(wanted, news))
        self._works[rank] = dist.isend(numbers, rank)
        return wanted, numbers

    def _sections(self, names: Iterable[str]) -> dict[str, list[Tensor]]:
        return {name: section(self._objective, name) for name in names}

    def _added(self, own: Sequence[Gradient]) -> Gradient:
        """The sum of what this learner found and what the others do."""
        letters = {rank: self._answer(rank, self._seconds) for rank in self._asked}
        others = [part for rank, letter in letters.items() for part in self._received(rank, letter)]
        if self._reduction == "ordered":
            return added([*own, *others])
        with _losing():
            return _reduced(own, others)

    def _ready(self, rank: int) -> bool:
        """Whether an answer is there."""
        try:
            return self._ties[rank].wait(0.0)
        except ChildDied:
            raise self._death(rank) from None

    def _take(self, rank: int) -> tuple[Ask, Gradient]:
        """What one of those who work apart was asked, and what it found; waits for it."""

        def taken() -> Gradient:
            (gradient,) = self._received(rank, self._answer(rank, self._seconds))
            return gradient

        gradient = self._awaited(taken)
        return self._asked.pop(rank), self._counted(gradient, self._since[rank])

    def _received(self, rank: int, letter: Letter) -> Sequence[Gradient]:
        """What a teammate sends once it has answered."""
        numbers = torch.empty(letter.size, dtype=torch.uint8)
        with _losing():
            for key in (0, rank):
                if (work := self._works.pop(key, None)) is not None:
                    work.wait()
            dist.recv(numbers, rank)
        return parcel.unpack(letter, numbers)

    def _awaited(self, task: Callable[[], Result]) -> Result:
        """What `task` returns, which needs answers of those who were asked; they are asked again if one dies."""

        def again() -> Result:
            self._send()
            return task()

        return self._despite_death(task, again)

    def _despite_death(self, task: Callable[[], Result], again: Callable[[], Result]) -> Result:
        """What `task` returns; if a teammate dies or hangs meanwhile, all are replaced, and `again` is done instead."""
        attempt = task
        while True:
            try:
                return attempt()
            except LearnerError as lost:
                time.sleep(self._patience.pause(lost, lost.kind, self._applied))
                attempt = partial(self._anew, again)

    def _anew(self, task: Callable[[], Result]) -> Result:
        self._replace()
        return task()

    def _replace(self) -> None:
        self._leave()
        for tie in self._ties.values():
            try:
                tie.start()
            except OSError as error:
                raise LearnerError(f"another process for {tie.name} can't be started: {error}", "") from error
        self._replaced += 1
        self.changed()

    def _meet(self) -> None:
        """Waits until all have started, and forms the group with them."""
        assert self._hall is not None, "it has not been started"
        for rank in self._ties:
            self._answer(rank, 2 * self._seconds)
        meeting = self._hall.meeting()
        for rank in self._ties:
            self._tell(rank, lambda tie: tie.join(meeting))
        with _losing():
            meeting.join(0)
        self._joined = True
        for rank in self._ties:
            self._answer(rank, self._seconds)

    def _leave(self) -> None:
        """Leaves the group, which the others have left or are about to."""
        self._works.clear()
        if self._joined:
            self._joined = False
            dist.destroy_process_group()

    def _tell(self, rank: int, what: Callable[[Tie], None]) -> None:
        try:
            what(self._ties[rank])
        except ChildDied:
            raise self._death(rank) from None

    def _answer(self, rank: int, seconds: float) -> Letter:
        tie = self._ties[rank]
        deadline = time.monotonic() + seconds
        try:
            while not tie.wait(_SLICE_SECONDS):
                if time.monotonic() > deadline:
                    how = f"has not answered for {seconds:g} seconds"
                    text = f"{tie.name} {how}\n\n{tie.stack()}"
                    tie.kill()
                    raise LearnerError(text, how)
            return tie.answer()
        except ChildDied:
            raise self._death(rank) from None
        except ChildFailed as error:
            raise RuntimeError(f"{error}\n\nin {tie.name}:\n{error.traceback}") from None

    def _death(self, rank: int) -> LearnerError:
        tie = self._ties[rank]
        how, stack = tie.obituary()
        text = f"{tie.name} {how}"
        return LearnerError(f"{text}\n\n{stack}" if stack else text, how)


@contextmanager
def _losing() -> Generator[None]:
    """What torch.distributed raises within is that somebody is gone."""
    try:
        yield
    except RuntimeError as error:
        raise LearnerError(f"a learner is gone: {error}", "") from error


def _reduced(own: Sequence[Gradient], others: Sequence[Gradient]) -> Gradient:
    """The sum of gradients, given what the others say of theirs; they take part in adding up the tensors right now."""
    numbers = sum((flat(part) for part in own[1:]), flat(own[0])).cpu()
    dist.reduce(numbers, 0)
    tensors = own[0].tensors  # theirs are only now overwritten: what failed can be done again
    ends = accumulate((tensor.numel() for tensor in tensors), initial=0)
    for tensor, (start, end) in zip(tensors, pairwise(ends), strict=False):
        parcel.in_memory_order(tensor).copy_(numbers[start:end])
    said = added([part._replace(tensors=()) for part in (*own, *others)])
    return said._replace(tensors=tensors)
