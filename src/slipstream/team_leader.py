"""The first of several learners: it has others differentiate their shards, and adds up what they find.

    ask      parts of a minibatch and what has changed go out; returns at once
             (the caller differentiates the first shards itself)
    total    waits for every teammate, and adds: shard by shard in their order, so that the bits are those of one
             learner (`ordered`), or as the library finds it fastest (`all_reduce`)

Who waits for whom: teammates for the leader, as long as it takes; the leader for teammates while it adds, at most for
the time limit. One that died or hangs is replaced, with all others, since a group of torch.distributed can't change,
and the minibatch is differentiated again: the bits are the same.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
import torch.distributed as dist

from slipstream import parcel
from slipstream.descent import Gradient, added
from slipstream.objective import Objective
from slipstream.patience import Patience
from slipstream.process import ChildDied, ChildFailed
from slipstream.team import KINDS, Order, Reduction
from slipstream.teammate import Meeting, flat, section

_log = logging.getLogger(__name__)

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

    def tell(self, command: dict[str, Any]) -> None:
        """Tells it what to do.

        Raises:
            ChildDied: It is not there to be told.
        """
        ...

    def wait(self, seconds: float) -> bool:
        """Whether the answer comes within `seconds`.

        Raises:
            ChildDied: It ended before.
        """
        ...

    def answer(self) -> Any:
        """The answer, once it has come.

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
        hall: Has the others.
        shards: Of a minibatch.
        reduction: How gradients are added.
        restarts: How often in a row, with less than 100 minibatches between, a teammate that died or hangs is replaced.
        seconds: After which one that has not answered is given up; at their start they have twice as long.
    """

    def __init__(
        self, objective: Objective, hall: Hall, shards: int, reduction: Reduction, restarts: int, seconds: float = 300.0
    ) -> None:
        self._objective, self._hall, self._reduction, self._seconds = objective, hall, reduction, seconds
        size = len(hall.ties) + 1
        self._shares = [slice(*ends) for ends in pairwise(shards * rank // size for rank in range(size + 1))]
        self._patience = Patience[LearnerError](restarts)
        self._works: list[Any] = []
        self._asked: tuple[Order, Sequence[Any]] | None = None
        self._joined = False
        self._asks = self._replaced = 0
        self.changed()

    def start(self) -> None:
        """Starts the others; returns at once.

        Raises:
            OSError: The system can't.
        """
        for tie in self._hall.ties:
            tie.start()

    def ask(self, order: Order, parts: Sequence[Any]) -> int:
        """Sends the others their parts, and what has changed; returns at once."""
        self._asked = order, parts
        self._asks += 1
        self._despite_death(self._send, again=False)
        return self._shares[0].stop

    def total(self, own: Sequence[Gradient]) -> Gradient:
        """Waits for the others and adds what they found.

        Raises:
            LearnerError: One died or hangs, and there is no hope.
            RuntimeError: One raised; with its traceback.
        """
        return self._despite_death(lambda: self._added(own), again=True)

    def changed(self, *sections: str) -> None:
        """Notes what to send with what is asked next."""
        if not sections:
            self._news = dict.fromkeys(f"{module}.{kind}" for module in self._objective.modules for kind in KINDS)
        known = self._objective.modules
        self._news |= dict.fromkeys(name for name in sections if name.rpartition(".")[0] in known)

    def metrics(self) -> dict[str, float]:
        """How often teammates have been replaced."""
        return {"faults/learner_restarts": float(self._replaced)}

    def close(self) -> None:
        """Ends the others."""
        self._leave()
        self._hall.close()

    def _send(self) -> None:
        if not self._joined:
            self._meet()
        assert self._asked is not None
        order, parts = self._asked
        news = None
        if self._news:
            news = parcel.pack({name: section(self._objective, name) for name in self._news})
        for rank, (tie, share) in enumerate(zip(self._hall.ties, self._shares[1:], strict=True), start=1):
            wanted = parcel.pack((order, parts[share]))
            self._tell(tie, {"differentiate": {"size": len(wanted), "news": 0 if news is None else len(news)}})
            work = dist.isend(wanted, rank)
            self._works.append(work)
        if news is not None:
            self._works.append(dist.broadcast(news, 0, async_op=True))
            self._news = {}

    def _added(self, own: Sequence[Gradient]) -> Gradient:
        sizes = [self._answer(tie, self._seconds) for tie in self._hall.ties]
        others: list[Gradient] = []
        try:
            while self._works:
                self._works.pop().wait()
            for rank, size in enumerate(sizes, start=1):
                told = torch.empty(size, dtype=torch.uint8)
                dist.recv(told, rank)
                others += parcel.unpack(told)
            if self._reduction == "ordered":
                return added([*own, *others])
            return _reduced(own, others)
        except RuntimeError as error:
            raise LearnerError(f"a learner is gone: {error}", "") from error

    def _despite_death(self, task: Any, *, again: bool) -> Any:
        """What `task` returns; if a teammate dies or hangs meanwhile, all are replaced and asked again before it."""
        anew = False
        while True:
            try:
                if anew:
                    self._replace()
                    if again:
                        self._send()
                return task()
            except LearnerError as lost:
                time.sleep(self._patience.pause(lost, lost.kind, self._asks))
                anew = True

    def _replace(self) -> None:
        self._leave()
        for tie in self._hall.ties:
            try:
                tie.start()
            except OSError as error:
                raise LearnerError(f"another process for {tie.name} can't be started: {error}", "") from error
        self._replaced += 1
        self.changed()

    def _meet(self) -> None:
        """Waits until all have started, and forms the group with them."""
        for tie in self._hall.ties:
            self._answer(tie, 2 * self._seconds)
        meeting = self._hall.meeting()
        for rank, tie in enumerate(self._hall.ties, start=1):
            self._tell(tie, {"join": vars(meeting), "rank": rank})
        try:
            meeting.join(0)
        except RuntimeError as error:
            raise LearnerError(f"the learners did not meet: {error}", "") from error
        self._joined = True
        for tie in self._hall.ties:
            self._answer(tie, self._seconds)

    def _leave(self) -> None:
        """Leaves the group, which the others have left or are about to."""
        self._works.clear()
        if self._joined:
            self._joined = False
            dist.destroy_process_group()

    def _tell(self, tie: Tie, command: dict[str, Any]) -> None:
        try:
            tie.tell(command)
        except ChildDied:
            raise self._death(tie) from None

    def _answer(self, tie: Tie, seconds: float) -> Any:
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
            raise self._death(tie) from None
        except ChildFailed as error:
            raise RuntimeError(f"{error}\n\nin {tie.name}:\n{error.traceback}") from None

    def _death(self, tie: Tie) -> LearnerError:
        how, stack = tie.obituary()
        text = f"{tie.name} {how}"
        return LearnerError(f"{text}\n\n{stack}" if stack else text, how)


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
