"""Threads that wait for native answers, so that a caller can wait for whichever lane answers first."""

from __future__ import annotations

import time
from collections.abc import Sequence
from queue import SimpleQueue
from threading import Condition, Thread
from typing import Protocol

_SLICE_SECONDS = 0.5
_GRACE_SECONDS = 3.0  # for answers that are under way when the environments are closed


class Settles(Protocol):
    """A lane of native environments."""

    due: bool
    """Whether an answer is due that nobody has taken."""

    def settle(self) -> None:
        """Takes the answer if one is due, waiting for it without the GIL; `due` is False afterwards."""
        ...


class Receivers:
    """Lanes whose answers are taken by the caller, or by a thread per lane while the caller waits for any of several.

    Native pools only offer to wait for the whole of one lane. A lane's thread starts when that lane is first waited
    for among others, and only ever takes answers that are due; a caller that never calls `wait` starts no thread.

    Who waits: `settle` for the lane's thread, if it has been told to take the answer; `wait` for the first of several
    such threads. An error in a thread is raised in the `settle` of its lane.

    Args:
        lanes: The lanes; each is only ever used by one caller at a time.
    """

    def __init__(self, lanes: Sequence[Settles]) -> None:
        self._lanes = lanes
        self._changed = Condition()
        self._busy: set[int] = set()  # lanes whose thread is taking an answer
        self._errors: dict[int, BaseException] = {}
        self._orders: dict[int, SimpleQueue[bool]] = {}
        self._threads: list[Thread] = []

    def wait(self, lanes: Sequence[int]) -> list[int]:
        """Waits until at least one of `lanes` has nothing due (or has failed), and returns all those."""
        for lane in lanes:
            if self._lanes[lane].due and lane not in self._busy and lane not in self._errors:
                self._begin(lane)
        with self._changed:
            while True:
                ready = [lane for lane in lanes if lane not in self._busy]
                if ready:
                    return ready
                self._changed.wait(_SLICE_SECONDS)

    def settle(self, lane: int) -> None:
        """Takes the answer that is due to `lane`, if one is.

        Raises:
            BaseException: What taking it raised.
        """
        with self._changed:
            while lane in self._busy:
                self._changed.wait(_SLICE_SECONDS)
            error = self._errors.pop(lane, None)
        if error is not None:
            raise error
        self._lanes[lane].settle()

    def close(self) -> None:
        """Ends the threads, waiting a few seconds at most; may be called twice."""
        for orders in self._orders.values():
            orders.put(False)
        deadline = time.monotonic() + _GRACE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._orders, self._threads = {}, []
        self._errors.clear()

    def _begin(self, lane: int) -> None:
        """Tells the lane's thread to take the answer."""
        with self._changed:
            self._busy.add(lane)
        if lane not in self._orders:
            self._orders[lane] = SimpleQueue()
            thread = Thread(target=self._serve, args=(lane, self._orders[lane]), name=f"lane-{lane}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._orders[lane].put(True)

    def _serve(self, lane: int, orders: SimpleQueue[bool]) -> None:
        while orders.get():
            error = None
            try:
                self._lanes[lane].settle()
            except BaseException as raised:  # noqa: BLE001 - it is raised again in `settle`
                error = raised
            with self._changed:
                if error is not None:
                    self._errors[lane] = error
                self._busy.discard(lane)
                self._changed.notify_all()
