"""Parallel data loading: batches are gathered, and copied to the GPU, while the learner computes with those before."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from slipstream import tree
from slipstream.crew import Crew, Pending

Item = TypeVar("Item")
Result = TypeVar("Result")

_READY = 2
"""Batches that are ready or being gathered, per thread, while one is being learned from."""


class Loader:
    """A ring of batches: some ready, one in use, the next being gathered by threads of its own.

    What is gathered does not depend on when: nothing that it is gathered from changes before the last batch of a call
    is used. On a GPU each batch goes through page-locked memory and is copied on a stream of its own; the learner's
    stream waits for the copy, the learner's thread does not.

    Who waits: `load` for the next batch in order; the threads for their batches to be used.

    Args:
        threads: Threads that gather; 0 gathers in the thread that asks.
        device: Where batches are wanted.
        before: Called before every batch, in the thread that gathers it, where that is not the one that asks.
    """

    def __init__(self, threads: int, device: torch.device, *, before: Callable[[], None] | None = None) -> None:
        self._device = device
        self._ahead = threads * _READY
        self._crew = Crew(threads, inline=False, before=before) if threads else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.waited = 0.0
        """Seconds that the learner has waited for batches."""

    def load(self, gathers: Iterator[Callable[[], Sequence[Item]]]) -> Generator[Sequence[Item]]:
        """The results of `gathers`, on the device, in their order; each is a batch in parts, dataclasses of tensors.

        An iterator that is closed early leaves the rest alone, after the gathers that have begun.
        """
        if self._crew is None:
            for gather in gathers:
                start = time.perf_counter()
                batch = self._received(self._prepared(gather))
                self.waited += time.perf_counter() - start
                yield batch
            return
        crew, ring = self._crew, deque[Pending[Any]]()
        try:
            while True:
                while len(ring) < self._ahead and (gather := next(gathers, None)) is not None:
                    ring.append(crew.start([partial(self._prepared, gather)]))
                if not ring:
                    return
                start = time.perf_counter()
                (sent,) = ring[0].results()
                ring.popleft()
                self.waited += time.perf_counter() - start
                yield self._received(sent)
        finally:
            for pending in ring:
                pending.cancel()

    def begin(self, task: Callable[[], Result]) -> Callable[[], Result]:
        """Has a thread begin with a task; what it returns waits for the result, or does the task if there are none.

        It is to be called once.
        """
        pending = None if self._crew is None else self._crew.start([task])

        def result() -> Result:
            start = time.perf_counter()
            found = task() if pending is None else pending.results()[0]
            self.waited += time.perf_counter() - start
            return found

        return result

    def close(self) -> None:
        """Ends the threads."""
        if self._crew is not None:
            self._crew.close()

    def _prepared(self, gather: Callable[[], Sequence[Item]]) -> tuple[Sequence[Item], torch.Event | None]:
        """The batch on its way to the device, and what tells that it has arrived."""
        batch = gather()
        if self._stream is None:
            return batch, None
        with torch.cuda.stream(self._stream):
            moved = mapped(lambda leaf: leaf.pin_memory().to(self._device, non_blocking=True), batch)
        return moved, self._stream.record_event()

    def _received(self, sent: tuple[Sequence[Item], torch.Event | None]) -> Sequence[Item]:
        """The batch, ready for the current stream."""
        batch, arrived = sent
        if arrived is None:
            return batch
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(arrived)

        def use(leaf: Tensor) -> Tensor:
            leaf.record_stream(stream)  # its memory is not to be given to others before this stream is done with it
            return leaf

        return mapped(use, batch)


def mapped(function: Callable[[Tensor], Tensor], batch: Sequence[Item]) -> Sequence[Item]:
    """The batch with `function` applied to every tensor in its parts, which are dataclasses and trees."""

    def part(value: Any) -> Any:
        if isinstance(value, Tensor):
            return function(value)
        if is_dataclass(value) and not isinstance(value, type):
            own = {field.name: tree.map(part, getattr(value, field.name)) for field in fields(value)}
            return replace(value, **own)
        return value

    return [part(value) for value in batch]
