from __future__ import annotations

import threading

import pytest
import torch

from slipstream import crew as crew_module
from slipstream.crew import Crew


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_results_come_in_the_order_of_the_tasks(workers: int) -> None:
    crew = Crew(workers)
    try:
        assert crew.run([lambda number=number: number for number in range(7)]) == list(range(7))
    finally:
        crew.close()


def test_results_come_in_order_when_a_later_task_ends_first() -> None:
    crew = Crew(2)
    ended = threading.Event()

    def first() -> str:
        assert ended.wait(10)
        return "first"

    def second() -> str:
        ended.set()
        return "second"

    try:
        assert crew.run([first, second]) == ["first", "second"]
    finally:
        crew.close()


def test_the_first_error_is_raised_after_all_tasks_have_ended() -> None:
    crew = Crew(2)
    failed, finished = threading.Event(), threading.Event()

    def fail() -> None:
        failed.set()
        raise ValueError("slot 3 broke")

    def outlast() -> None:
        assert failed.wait(10)
        finished.set()

    try:
        with pytest.raises(ValueError, match="slot 3 broke"):
            crew.run([fail, outlast])
        assert finished.is_set()
    finally:
        crew.close()


def test_an_interrupt_of_a_task_in_the_callers_thread_is_raised_there_and_then() -> None:
    crew, later = Crew(1), list[int]()

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        crew.start([interrupted, lambda: later.append(1)])
    assert later == []
    crew.close()


def test_one_math_thread_while_open_and_the_former_number_afterwards() -> None:
    former = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        crew = Crew(3)
        assert torch.get_num_threads() == 1
        assert crew.run([torch.get_num_threads] * 3) == [1, 1, 1]
        crew.close()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(former)


def test_a_crew_needs_a_worker() -> None:
    with pytest.raises(ValueError, match="at least 1 worker, got 0"):
        Crew(0)


def test_an_interrupted_caller_leaves_hanging_tasks_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while an environment hangs: the caller goes on, and tasks that had not begun never do."""
    monkeypatch.setattr(crew_module, "_GRACE_SECONDS", 0.05)
    crew = Crew(2)
    begun, release = threading.Barrier(3), threading.Event()
    late: list[int] = []

    def hang() -> None:
        begun.wait(10)
        release.wait(10)

    def interrupted(futures: object, timeout: float) -> None:
        if timeout != crew_module._GRACE_SECONDS:
            begun.wait(10)
            raise KeyboardInterrupt

    monkeypatch.setattr(crew_module, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        crew.run([hang, hang, lambda: late.append(1)])
    crew.close()
    release.set()
    assert late == []
