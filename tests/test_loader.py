from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from slipstream.loader import Loader, mapped
from slipstream.tree import Tree

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Part:
    obs: Tree
    number: int


def gathers(count: int, gather: Callable[[int], Sequence[Part]]) -> Iterator[Callable[[], Sequence[Part]]]:
    return (partial(gather, number) for number in range(count))


def numbered(number: int) -> Sequence[Part]:
    return [Part({"a": torch.tensor([number]), "b": (torch.tensor([shard]),)}, number) for shard in range(2)]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_batches_come_in_their_order(threads: int) -> None:
    loader = Loader(threads, CPU)
    for _ in range(2):
        got = list(loader.load(gathers(20, numbered)))
        assert [[(int(part.obs["a"]), int(part.obs["b"][0])) for part in batch] for batch in got] == [
            [(number, 0), (number, 1)] for number in range(20)
        ]
    loader.close()


def test_threads_gather_ahead_but_not_without_end() -> None:
    begun: list[int] = []
    enough = threading.Semaphore(0)

    def gather(number: int) -> Sequence[Part]:
        begun.append(number)
        enough.release()
        return numbered(number)

    loader = Loader(1, CPU)
    with closing(loader.load(gathers(50, gather))) as batches:
        next(batches)
        for _ in range(2):
            assert enough.acquire(timeout=10)
        assert 2 <= len(begun) <= 3, "one is being used, two are ready or under way"
    loader.close()
    assert len(begun) <= 3, "what was not asked for is left alone"


@pytest.mark.parametrize("threads", [0, 2])
def test_errors_reach_the_learner(threads: int) -> None:
    def gather(number: int) -> Sequence[Part]:
        if number == 3:
            raise ArithmeticError("no such batch")
        return numbered(number)

    loader = Loader(threads, CPU)
    batches = loader.load(gathers(9, gather))
    assert [next(batches)[0].number for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ArithmeticError, match="no such batch"):
        next(batches)
    loader.close()


@pytest.mark.parametrize("threads", [0, 2])
def test_threads_ask_for_a_delay_before_every_batch(threads: int) -> None:
    asked: list[threading.Thread] = []
    loader = Loader(threads, CPU, before=lambda: asked.append(threading.current_thread()))
    assert len(list(loader.load(gathers(5, numbered)))) == 5
    loader.close()
    assert len(asked) == (5 if threads else 0)
    assert threading.current_thread() not in asked


def test_waiting_is_counted() -> None:
    loader, gate = Loader(1, CPU), threading.Event()

    def gather(number: int) -> Sequence[Part]:
        assert gate.wait(10)
        return numbered(number)

    threading.Timer(0.05, gate.set).start()
    list(loader.load(gathers(1, gather)))
    assert loader.waited >= 0.04
    loader.close()


def test_mapped_reaches_every_tensor_and_nothing_else() -> None:
    def double(leaf: Tensor) -> Tensor:
        return leaf * 2

    (part,) = mapped(double, [Part({"a": torch.ones(2), "b": (torch.ones(1), Part(torch.ones(1), 7))}, 5)])
    assert part.number == 5
    inner = part.obs["b"][1]
    assert [part.obs["a"].tolist(), part.obs["b"][0].tolist(), inner.obs.tolist(), inner.number] == [
        [2, 2],
        [2],
        [2],
        7,
    ]
