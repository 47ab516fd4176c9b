from __future__ import annotations

import resource
import subprocess
import sys
import threading

import pytest
import torch

from slipstream import arithmetic
from slipstream.arithmetic import Arithmetic, adopt, adopted, flushes, restore
from slipstream.crew import Crew
from slipstream.optimizers import make_optimizer

LEAST = torch.finfo(torch.float32).tiny
"""The least normal number."""

pytestmark = pytest.mark.skipif(
    not torch.set_flush_denormal(False), reason="this processor cannot take subnormal numbers for zero"
)


@pytest.fixture(autouse=True)
def as_before() -> object:
    """Leaves the thread of the tests as it was."""
    former = Arithmetic(torch.get_num_threads(), flushes())
    yield
    restore(former)


def halved() -> bool:
    """Whether half of the least normal number is something."""
    return bool(torch.full((64,), LEAST).mul_(0.5).any())


def test_subnormal_numbers_count_as_zero_within_and_as_themselves_without() -> None:
    restore(Arithmetic(2, flush=False))
    assert halved()
    assert not flushes()
    with adopted():
        assert not halved()
        assert flushes()
        assert torch.get_num_threads() == 1
        assert float(torch.tensor(LEAST)) > 0.0  # the least normal number is kept
    assert halved()
    assert torch.get_num_threads() == 2


def test_what_was_adopted_before_stays_after_an_inner_context() -> None:
    former = adopt()
    with adopted():
        pass
    assert not halved()
    restore(former)
    assert halved() == (not former.flush)


def test_an_error_within_does_not_keep_the_way_of_computing() -> None:
    restore(Arithmetic(2, flush=False))
    with pytest.raises(ValueError, match="within"), adopted():
        raise ValueError("within")
    assert halved()
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_tasks_of_a_crew_and_its_caller_take_subnormal_numbers_for_zero_while_it_is_open(workers: int) -> None:
    restore(Arithmetic(2, flush=False))
    crew = Crew(workers)
    assert crew.run([halved] * 4) == [False] * 4
    assert not halved()
    crew.close()
    assert halved()


def test_crews_may_be_closed_in_any_order_and_twice() -> None:
    restore(Arithmetic(2, flush=False))
    one, other = Crew(1), Crew(2)
    one.close()
    one.close()
    assert not halved()
    with adopted():
        other.close()
        assert not halved()
    assert halved()
    assert torch.get_num_threads() == 2


def test_the_gradient_of_a_thread_takes_subnormal_numbers_for_zero() -> None:
    restore(Arithmetic(1, flush=False))
    found: list[float] = []

    def differentiate() -> None:
        adopt()
        x = torch.full((64,), LEAST, requires_grad=True)
        (gradient,) = torch.autograd.grad((x * LEAST * 0.5).sum(), x)
        found.append(float(gradient.abs().max()))

    thread = threading.Thread(target=differentiate)
    thread.start()
    thread.join()
    assert found == [0.0]
    assert halved()  # the way of a thread is its own


def test_the_moments_of_a_gradient_that_has_become_zero_do_not_stay_subnormal() -> None:
    def moment(flush: bool) -> torch.Tensor:
        restore(Arithmetic(1, flush=flush))
        parameter = torch.nn.Parameter(torch.ones(64))
        optimizer = make_optimizer("adam", [parameter], lr=1e-3, eps=1e-8)
        for update in range(1200):
            parameter.grad = torch.full((64,), 1.0 if update == 0 else 0.0)
            optimizer.step()
        restore(Arithmetic(1, flush=False))
        return optimizer.state[parameter]["exp_avg"]

    slow = moment(flush=False)
    assert (slow > 0.0).all()
    assert (slow < LEAST).all()
    assert (moment(flush=True) == 0.0).all()


def test_a_processor_that_knows_no_other_way_goes_on_as_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic.torch, "set_flush_denormal", lambda flush: False)
    restore(Arithmetic(2, flush=True))
    assert torch.get_num_threads() == 2


_FAULTS = """
import ctypes, resource
import torch
from slipstream import arithmetic

def blocks():
    return [torch.zeros(4_000_000) for _ in range(3)]

if not hasattr(ctypes.CDLL(None), "mallopt"):
    print(0)
    raise SystemExit
arithmetic.settle()
blocks(), blocks()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    blocks()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_memory_that_is_freed_stays_with_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", _FAULTS], check=True, capture_output=True, text=True)
    pages = 5 * 48_000_000 // resource.getpagesize()

    assert int(done.stdout) < pages / 3  # where the blocks come to lie differs
