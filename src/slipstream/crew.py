"""Worker threads with one math thread each, the only place where Slipstream starts threads for arithmetic.

PyTorch releases the GIL inside its operators, so two threads run two lanes (or two gradient shards) on two cores. An
OpenMP team across the cores does not survive any other load on the machine; it is switched off here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack
from queue import SimpleQueue
from threading import Thread
from typing import Any, Generic, TypeVar

from slipstream.arithmetic import adopt, adopted

Result = TypeVar("Result")

_SLICE_SECONDS = 0.5
_GRACE_SECONDS = 3.0  # for tasks that are under way when the caller cancels them or closes the crew


class Crew:
    """`workers` threads that take tasks in order; results do not depend on how many there are.

    While a crew is open, its caller computes as its threads do (`arithmetic`); `close` restores the former way. The
    threads are daemons: an environment that hangs in one of them can't keep the program alive.

    Args:
        workers: Number of threads.
        inline: Whether a crew of one runs its tasks in the caller's thread, at once, so that a debugger can step
            through.
        before: Called before every task, in its thread.
    """

    def __init__(self, workers: int, *, inline: bool = True, before: Callable[[], None] | None = None) -> None:
        if workers < 1:
            raise ValueError(f"a crew needs at least 1 worker, got {workers}")
        self.workers = workers
        self._before = before
        self._computing = ExitStack()
        self._computing.enter_context(adopted())
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        names = [f"slipstream-{number}" for number in range(workers)] if workers > 1 or not inline else []
        self._threads = [Thread(target=self._work, name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    @property
    def inline(self) -> bool:
        """Whether tasks are run in the caller's thread."""
        return not self._threads

    def run(self, tasks: Sequence[Callable[[], Result]]) -> list[Result]:
        """Runs all tasks and returns their results in the order of the tasks; errors as in `Pending.results`.

        An interrupt of the caller cancels the tasks that have not begun and waits a few seconds at most for the others.
        """
        if self._before is None and (not self._threads or len(tasks) == 1):
            return [task() for task in tasks]
        pending = self.start(tasks)
        try:
            return pending.results()
        except BaseException:
            pending.cancel()
            raise

    def start(self, tasks: Sequence[Callable[[], Result]]) -> Pending[Result]:
        """Has the threads begin with the tasks; an inline crew runs them here and now, and lets interrupts out."""
        futures: list[Future[Result]] = [Future() for _ in tasks]
        for future, task in zip(futures, tasks, strict=True):
            if self._threads:
                self._tasks.put((future, task))
                continue
            self._do(future, task)
            error = future.exception()
            if error is not None and not isinstance(error, Exception):
                raise error
        return Pending(futures)

    def close(self) -> None:
        """Ends the threads, waiting a few seconds at most, and restores how the caller computed."""
        for _ in self._threads:
            self._tasks.put(None)
        deadline = time.monotonic() + _GRACE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._threads = []
        self._computing.close()

    def _work(self) -> None:
        adopt()
        while (order := self._tasks.get()) is not None:
            self._do(*order)

    def _do(self, future: Future[Any], task: Callable[[], Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            if self._before is not None:
                self._before()
            future.set_result(task())
        except BaseException as error:  # noqa: BLE001 - it is raised again in whoever asks for the results
            future.set_exception(error)


class Pending(Generic[Result]):
    """Tasks that a crew was given."""

    def __init__(self, futures: Sequence[Future[Result]]) -> None:
        self._futures = futures

    def results(self) -> list[Result]:
        """Waits, and returns the results in the order of the tasks.

        Waits for every task, also when one fails; the error of the first failed task (in task order) is raised then, so
        that nothing still writes to a slab when the caller sees it.
        """
        self.wait()
        return [future.result() for future in self._futures]

    def errors(self) -> list[BaseException]:
        """Waits, and returns the errors of the tasks that failed, in their order."""
        self.wait()
        return [error for future in self._futures if (error := future.exception()) is not None]

    def wait(self) -> None:
        """Waits until all have ended, well or not. After an interrupt of the caller, who is to `cancel`, some go on."""
        # In slices: Python can miss a signal that arrives just before a wait without end.
        while wait(self._futures, timeout=_SLICE_SECONDS).not_done:
            pass

    def cancel(self) -> None:
        """Cancels the tasks that have not begun, and waits a few seconds at most for the others."""
        wait([future for future in self._futures if not future.cancel()], timeout=_GRACE_SECONDS)
