"""Worker threads with one math thread each, the only place where Slipstream starts threads for arithmetic.

PyTorch releases the GIL inside its operators, so two threads run two lanes (or two gradient shards) on two cores. An
OpenMP team across the cores does not survive any other load on the machine; it is switched off here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

Result = TypeVar("Result")


class Crew:
    """`workers` threads that take tasks in order; results do not depend on how many there are.

    While a crew is open, PyTorch uses one math thread per calling thread; `close` restores the former number.

    Args:
        workers: Number of threads. With 1 the tasks run in the caller's thread, so that a debugger can step through.
    """

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise ValueError(f"a crew needs at least 1 worker, got {workers}")
        self.workers = workers
        self._former_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(workers, "slipstream", self._start) if workers > 1 else None

    def run(self, tasks: Sequence[Callable[[], Result]]) -> list[Result]:
        """Runs all tasks and returns their results in the order of the tasks.

        Waits for every task, also when one fails; the error of the first failed task (in task order) is raised then, so
        that nothing still writes to a slab when the caller sees it.
        """
        if self._pool is None or len(tasks) == 1:
            return [task() for task in tasks]
        futures = [self._pool.submit(task) for task in tasks]
        wait(futures)
        return [future.result() for future in futures]

    def close(self) -> None:
        """Ends the threads and restores PyTorch's number of math threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(self._former_threads)

    @staticmethod
    def _start() -> None:
        torch.set_num_threads(1)
