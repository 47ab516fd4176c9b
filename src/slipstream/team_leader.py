"""The first of several learners: it has others differentiate, and applies what they find.

    together (`ordered`, `all_reduce`)     every learner has some shards of every minibatch; their gradients are added:
                                           shard by shard in their order, so that the bits are those of one learner, or
                                           as the library finds it fastest
    apart (`asynchronous`)                 every learner has minibatches of its own; gradients are applied as they come,
                                           each of parameters that lack those that came meanwhile

Who waits for whom: teammates for the leader, as long as it takes; the leader for teammates once it has done its own
share, at most for the time limit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from statistics import fmean
from typing import TypeVar, final

from torch import Tensor

from slipstream import parcel
from slipstream.descent import Gradient, added, laid_out
from slipstream.objective import Objective
from slipstream.parcel import Letter
from slipstream.team import KINDS, Ask, Order, Own
from slipstream.team_group import Group, Hall
from slipstream.teammate import flat, section

Result = TypeVar("Result")


class Leader(ABC):
    """The first learner's end of a team; satisfies `Team`.

    Args:
        objective: What is differentiated.
        group: The others.
    """

    def __init__(self, objective: Objective, group: Group) -> None:
        self._objective, self._group = objective, group
        self._asked: dict[int, Ask] = {}  # by rank, what has not been answered
        self._news: dict[int, dict[str, None]] = {rank: {} for rank in group.ranks}  # what has changed since
        self._lags: list[int] = []
        self._applied = 0
        self.changed()

    def start(self, hall: Hall) -> None:
        """Starts the others, which the hall has; returns at once.

        Raises:
            OSError: The system can't.
        """
        self._group.start(hall)

    def gradients(self, asks: Iterable[Ask], own: Own, *, all_now: bool) -> Generator[tuple[Ask, Gradient]]:
        """Has the others do their share while `own` does this learner's.

        Raises:
            LearnerError: One died or hangs, and there is no hope.
            RuntimeError: One raised; with its traceback.
        """
        self._lags.clear()
        return self._found(asks, own, all_now)

    def changed(self, *sections: str) -> None:
        """Notes what to send with what is asked next."""
        known = self._objective.modules
        names = sections or [f"{module}.{kind}" for module in known for kind in KINDS]
        for news in self._news.values():
            news.update(dict.fromkeys(name for name in names if name.rpartition(".")[0] in known))

    def metrics(self) -> dict[str, float]:
        """How often teammates have been replaced; and how many gradients were applied while one was taken."""
        found = {"faults/learner_restarts": float(self._group.replaced)}
        if self._lags:
            found |= {"lag/gradients_mean": fmean(self._lags), "lag/gradients_max": float(max(self._lags))}
        return found

    def close(self) -> None:
        """Ends the others."""
        self._group.close()

    @abstractmethod
    def _found(self, asks: Iterable[Ask], own: Own, all_now: bool) -> Generator[tuple[Ask, Gradient]]:
        """As `gradients`."""

    @abstractmethod
    def _send(self) -> None:
        """Sends all what they are asked."""

    def _sent_anew(self) -> None:
        """The same to those who have just taken the others' places, and know nothing."""
        self.changed()
        self._send()

    def _awaited(self, task: Callable[[], Result]) -> Result:
        """What `task` returns, which needs answers of those who were asked; they are asked again if one dies."""

        def again() -> Result:
            self._sent_anew()
            return task()

        return self._group.despite_death(task, again, self._applied)

    def _sections(self, names: Iterable[str]) -> dict[str, list[Tensor]]:
        return {name: section(self._objective, name) for name in names}

    def _received(self, rank: int, order: Order, letter: Letter) -> list[Gradient]:
        """What one sends once it has answered, on the device of the parameters."""
        device = self._objective.parameters(order)[0].device

        def here(part: Gradient) -> Gradient:
            metrics = {name: value.to(device) for name, value in part.metrics.items()}
            errors = None if part.errors is None else part.errors.to(device)
            return Gradient([tensor.to(device) for tensor in part.tensors], metrics, errors)

        return [here(part) for part in self._group.receive(rank, letter)]

    def _counted(self, gradient: Gradient, before: int) -> Gradient:
        """The gradient, which is about to be applied; so many had been applied to the parameters that it is of."""
        self._lags.append(self._applied - before)
        self._applied += 1
        return gradient


@final
class Together(Leader):
    """Every minibatch is everyone's.

    Args:
        objective: What is differentiated.
        group: The others.
        shards: Of a minibatch.
        ordered: Whether gradients are added shard by shard, in their order.
    """

    def __init__(self, objective: Objective, group: Group, shards: int, ordered: bool) -> None:
        super().__init__(objective, group)
        size = len(group.ranks) + 1
        self._shares = [slice(*ends) for ends in pairwise(shards * rank // size for rank in range(size + 1))]
        self._ordered = ordered

    def _found(self, asks: Iterable[Ask], own: Own, all_now: bool) -> Generator[tuple[Ask, Gradient]]:
        for ask in asks:
            mine, *theirs = (Ask(ask.order, ask.parts[share]) for share in self._shares)
            self._asked = dict(enumerate(theirs, start=1))
            try:
                self._group.despite_death(self._send, self._sent_anew, self._applied)
                total = self._awaited(partial(self._total, ask.order, own(*mine)))
            except BaseException:  # an interrupt of `own`, say: nobody will ask for what they find
                self._group.abandon()
                self.changed()
                raise
            yield ask, self._counted(total, self._applied)

    def _send(self) -> None:
        changed = self._news[1]  # as for all
        news, numbers = parcel.pack(self._sections(changed))
        for rank, ask in self._asked.items():
            self._group.post(rank, (ask, {}), news if changed else None)
        if changed:
            self._group.broadcast(numbers)
            for each in self._news.values():
                each.clear()

    def _total(self, order: Order, own: Sequence[Gradient]) -> Gradient:
        """The sum of what this learner found and what the others do."""
        letters = {rank: self._group.answer(rank) for rank in self._asked}
        others = [part for rank, letter in letters.items() for part in self._received(rank, order, letter)]
        if self._ordered:
            return added([*own, *others])
        numbers = sum((flat(part) for part in own[1:]), flat(own[0])).cpu()
        self._group.reduce(numbers)
        tensors = own[0].tensors  # theirs are only now overwritten: what failed can be done again
        ends = accumulate((tensor.numel() for tensor in tensors), initial=0)
        for tensor, (start, end) in zip(tensors, pairwise(ends), strict=False):
            parcel.in_memory_order(tensor).copy_(numbers[start:end])
        said = added([part._replace(tensors=()) for part in (*own, *others)])
        return said._replace(tensors=tensors)


@final
class Apart(Leader):
    """Every learner has minibatches of its own.

    Those that have not come when an update ends come with the next one, unless the caller wants all, or wanted no more.
    """

    def __init__(self, objective: Objective, group: Group) -> None:
        super().__init__(objective, group)
        self._since: dict[int, int] = {}  # by rank, gradients that had been applied when it was asked
        self._unwanted: set[int] = set()  # of those who were asked

    def _found(self, asks: Iterable[Ask], own: Own, all_now: bool) -> Generator[tuple[Ask, Gradient]]:
        now: set[int] = set()  # who was asked in this call
        try:
            yield from self._come()
            for ask in asks:
                idle = next((rank for rank in self._group.ranks if rank not in self._asked), None)
                if idle is not None:
                    self._asked[idle] = ask
                    now.add(idle)
                    self._group.despite_death(partial(self._hand, idle), self._sent_anew, self._applied)
                    continue
                before = self._applied
                yield ask, self._counted(added(own(*ask)), before)
                yield from self._come()
            while all_now and self._asked:
                yield from self._taken(next(iter(self._asked)))
        except GeneratorExit:
            self._unwanted |= now & set(self._asked)
            raise

    def _come(self) -> Generator[tuple[Ask, Gradient]]:
        """What is there."""
        for rank in list(self._asked):
            if self._awaited(partial(self._group.ready, rank)):
                yield from self._taken(rank)

    def _taken(self, rank: int) -> Generator[tuple[Ask, Gradient]]:
        """What one was asked, and what it found, if that is still wanted; waits for it."""

        def taken() -> Gradient:
            (gradient,) = self._received(rank, order, self._group.answer(rank))
            return gradient._replace(tensors=laid_out(self._objective.parameters(order), gradient.tensors))

        order = self._asked[rank].order
        gradient = self._awaited(taken)
        ask = self._asked.pop(rank)
        if rank in self._unwanted:
            self._unwanted.discard(rank)
            return
        yield ask, self._counted(gradient, self._since[rank])

    def _send(self) -> None:
        for rank in self._asked:
            self._hand(rank)

    def _hand(self, rank: int) -> None:
        """Sends one what it is asked, and what has changed since it was last."""
        self._since[rank] = self._applied
        sent = self._group.post(rank, (self._asked[rank], self._sections(self._news[rank])))
        self._asked[rank], _ = parcel.unpack(*sent)  # the caller may overwrite what it was made of
        self._news[rank].clear()
