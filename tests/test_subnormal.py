from __future__ import annotations

import platform
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from slipstream import subnormal
from slipstream.arithmetic import Arithmetic, flushes, restore

LEAST = np.finfo(np.float32).tiny


@pytest.fixture(autouse=True)
def keeping() -> Iterator[None]:
    """Has the thread of the tests keep subnormal numbers, and leaves it as it was."""
    former = Arithmetic(torch.get_num_threads(), flushes())
    restore(Arithmetic(former.threads, flush=False))
    yield
    restore(former)


@pytest.mark.skipif(platform.machine() not in subnormal._PLACES, reason="not known here")
def test_a_thread_that_flushes_and_those_that_it_starts_take_subnormal_numbers_for_zero() -> None:
    found: dict[str, bool] = {}

    def note(name: str) -> None:
        found[name] = bool((np.full(64, LEAST) * np.float32(0.5)).any()) or 1e-308 * 0.1 != 0.0

    def flushing() -> None:
        note("before")
        subnormal.flush()
        note("after")
        inner = threading.Thread(target=note, args=("started by it",))
        inner.start()
        inner.join()

    thread = threading.Thread(target=flushing)
    thread.start()
    thread.join()
    note("another")
    assert found == {"before": True, "after": False, "started by it": False, "another": True}


def test_a_machine_that_is_not_known_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    subnormal.flush()
    assert bool((np.full(64, LEAST) * np.float32(0.5)).any())
