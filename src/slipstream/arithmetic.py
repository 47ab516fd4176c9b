"""How Slipstream computes: one thread alone, without numbers too small to be normal; in memory that stays."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

_SUBNORMAL = 1e-39
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_TOLD = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
_KEPT_BYTES = 1 << 30
_LARGEST_BLOCK = 32 << 20  # that glibc takes from memory which it keeps


class Arithmetic(NamedTuple):
    """How a thread computes on the CPU.

    Attributes:
        threads: Threads that share one operator of PyTorch.
        flush: Whether numbers below the least normal one (1.2e-38 in float32) count as zero.
    """

    threads: int
    flush: bool


def adopt() -> Arithmetic:
    """Has this thread, and threads it starts, compute as all of ours do; returns how it did before, for `restore`.

    One thread per operator: results do not depend on the number of cores. Subnormal numbers count as zero: moments of
    Adam whose gradients have become zero fall below 1e-38 and stay there for good, and a processor takes some hundred
    cycles for each of them (ADR 0019).
    """
    former = Arithmetic(torch.get_num_threads(), flushes())
    restore(Arithmetic(1, flush=True))
    return former


def settle() -> None:
    """Has a process of ours, which has nothing else to do, compute and keep memory as all of them do."""
    keep_freed_memory()
    adopt()


def restore(former: Arithmetic) -> None:
    """Has this thread compute in the given way."""
    torch.set_num_threads(former.threads)
    torch.set_flush_denormal(former.flush)  # False where a processor can't: it has the slow way only


@dataclass
class _Thread:
    """Contexts of `adopted` that are open in a thread, and how it computed before the first of them."""

    open: int = 0
    former: Arithmetic = field(default_factory=lambda: Arithmetic(1, flush=False))


class _Here(threading.local):
    def __init__(self) -> None:
        self.thread = _Thread()


_here = _Here()


@contextmanager
def adopted() -> Generator[None]:
    """Context in which this thread computes as all of ours do, so that what is drawn does not depend on the cores.

    Those of a thread may end in any order, as runs do that are open at the same time: how it computed before the first
    of them is restored after the last.
    """
    former, thread = adopt(), _here.thread
    if thread.open == 0:
        thread.former = former
    thread.open += 1
    try:
        yield
    finally:
        thread.open -= 1
        if thread.open == 0 and thread is _here.thread:  # not where another one collects the garbage
            restore(thread.former)


def flushes() -> bool:
    """Whether subnormal numbers count as zero in this thread."""
    return bool(torch.tensor(_SUBNORMAL, dtype=torch.float32, device="cpu") == 0.0)


def keep_freed_memory() -> None:
    """Has this process keep memory that it frees for what it allocates next; for good, and only glibc is told to.

    Blocks of up to 32 MB then come from the heap, of which up to a gigabyte of free memory stays at its end. Otherwise
    it goes back to the system after a gradient and comes anew page by page: 120 page faults and some 4 % of the time of
    a step of PPO on Pong. Whoever has told glibc something else by the environment is not overruled.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _TOLD):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
