"""Work of a GPU that is recorded once and replayed: one launch in place of one for every kernel (CUDA graphs).

A network of this field keeps a GPU busy for less time than Python takes to ask for its kernels, while other threads
want the interpreter too. What is replayed are the same kernels on the same memory, so no bit changes; what Python did
beside them, such as reading a number that is another one next time, is not done again.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from threading import Lock
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

Outputs = TypeVar("Outputs")

_WARM = 3  # calls before the recording: libraries choose their kernels and take their memory in the first ones
_ALONE = Lock()  # a recording begins by waiting for the whole device, which must not be while another is under way
_LEAST_TORCH = (2, 13)  # older ones wait for the host in deterministic kernels of `gather`'s gradient


class Record(Protocol):
    """Records what a function does."""

    def __call__(self, function: Callable[[], Outputs]) -> tuple[Callable[[], object], Outputs]:
        """What does the same again, on the current stream, and the tensors where its results then are.

        Args:
            function: Reads and writes tensors that stay where they are; it is called a few times, and has no other
                effect than its results.
        """
        ...


def cuda_graph(function: Callable[[], Outputs]) -> tuple[Callable[[], object], Outputs]:
    """`Record` for the current GPU; other threads may go on using it meanwhile."""
    with _ALONE, _uncollected():
        stream = _stream_of_recordings()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            outputs = function()
    return graph.replay, outputs


@cache
def _stream_of_recordings() -> torch.cuda.Stream:
    """One that nobody else has: PyTorch hands out 32 of each priority in turn, and all others ask for the usual one.

    What another thread did on it meanwhile would be recorded too.
    """
    return torch.cuda.Stream(priority=-1)


@contextmanager
def _uncollected() -> Generator[None]:
    """Without garbage collection, which could end an earlier recording while this one is under way."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def recorder(device: torch.device, wanted: bool) -> Record | None:
    """What records on `device`; None where it has no such thing, or is not wanted.

    Raises:
        ValueError: If this PyTorch is too old.
    """
    if not wanted or device.type != "cuda":
        return None
    if tuple(map(int, torch.__version__.split(".")[:2])) < _LEAST_TORCH:
        least = ".".join(map(str, _LEAST_TORCH))
        raise ValueError(f"placement.cuda_graphs wants PyTorch {least} or newer, this is {torch.__version__}")
    return cuda_graph


class Recording(Generic[Outputs]):
    """A function of tensors, recorded: to be called with others of the same shapes.

    Args:
        function: Is given tensors like `inputs`, on `device`.
        inputs: The first ones, wherever they are.
        device: Where it computes.
        record: Records it.
    """

    def __init__(
        self,
        function: Callable[[Sequence[Tensor]], Outputs],
        inputs: Sequence[Tensor],
        device: torch.device,
        record: Record,
    ) -> None:
        self._inputs = [torch.empty_like(each, device=device).copy_(each) for each in inputs]
        self._function = partial(function, self._inputs)  # it owns what the recording reads
        self._replay, self._outputs = record(self._function)

    def __call__(self, inputs: Sequence[Tensor]) -> Outputs:
        """What the function says of `inputs`; it holds until the next call.

        Inputs in page-locked memory must stay as they are until the GPU is done with the call.
        """
        for to, given in zip(self._inputs, inputs, strict=True):
            to.copy_(given, non_blocking=True)
        self._replay()
        return self._outputs
