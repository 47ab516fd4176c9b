"""A collector whose forwards run beside the learner's gradients on one GPU, on a stream of their own."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import torch

from slipstream.collector import Collected, Stands
from slipstream.standing import SlotState
from slipstream.types import Place


class OnStream:
    """A collector on a stream of its own; satisfies `Stands`.

    New weights reach it by a `Bulletin`, whose snapshots it waits for; what it wrote is there for all when `collect`
    returns.

    Args:
        make: Makes the collector.
        device: The GPU.
    """

    def __init__(self, make: Callable[[], Stands], device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        with self._after_all():
            self._collector = make()

    @property
    def lanes(self) -> tuple[int, ...]:
        """The lanes it steps."""
        return self._collector.lanes

    @property
    def ahead(self) -> int:
        """As of the collector."""
        return self._collector.ahead

    def arrive(self) -> None:
        """As of the collector."""
        self._collector.arrive()

    def collect(self, places: Sequence[Place], after: Sequence[Sequence[Place]] = ()) -> Collected:
        """As of the collector."""
        with torch.cuda.stream(self._stream):
            collected = self._collector.collect(places, after)
            self._stream.synchronize()
        return collected

    def stop(self) -> None:
        """As of the collector."""
        self._collector.stop()

    def state(self) -> SlotState:
        """Where its slots stand; to be called between two unrolls."""
        with torch.cuda.stream(self._stream):
            return self._collector.state()

    def load(self, state: SlotState) -> None:
        """As of the collector."""
        with self._after_all():
            self._collector.load(state)

    @contextmanager
    def _after_all(self) -> Generator[None]:
        """On its stream, after all that the current one was told."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
