"""A collector on a stream of its own: what it waits for, and who waits for it, told by a GPU that is imitated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch

from slipstream.collector import Collected, Stands
from slipstream.on_stream import OnStream
from slipstream.types import Place, Weights
from slipstream.weights import received


class Gpu:
    """Notes what it is told, and on which stream."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        self.current = "learner"

    def stream(self, device: torch.device) -> Any:
        gpu = self

        class Stream:
            name = "collector"

            def wait_stream(self, other: str) -> None:
                gpu.told.append(("collector", f"waits for {other}"))

            def synchronize(self) -> None:
                gpu.told.append((gpu.current, "host waits"))

        return Stream()

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    def note(self, what: str) -> None:
        self.told.append((self.current, what))


class Noting:
    """A collector that does nothing but say on which stream it was asked."""

    lanes, ahead = (3,), 0

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        gpu.note("made")

    def arrive(self) -> None:
        self._gpu.note("arrives")

    def collect(self, places: Any, after: Any = ()) -> Collected:
        self._gpu.note("collects")
        return Collected(1, (), 0.0, 0.0)

    def stop(self) -> None:
        self._gpu.note("stops")

    def state(self) -> Any:
        self._gpu.note("tells its state")

    def load(self, state: Any) -> None:
        self._gpu.note("loads")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    found = Gpu()
    monkeypatch.setattr(torch.cuda, "Stream", found.stream)
    monkeypatch.setattr(torch.cuda, "stream", found.on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: found.current)
    return found


def test_all_that_touches_the_gpu_is_on_the_stream(gpu: Gpu) -> None:
    collector = OnStream(lambda: cast(Stands, Noting(gpu)), torch.device("cuda"))
    assert collector.lanes == (3,)
    assert collector.ahead == 0
    assert collector.collect([Place(0, 0)]).steps == 1
    collector.load(cast(Any, None))
    collector.state()
    collector.stop()
    waits = ("collector", "waits for learner")
    assert gpu.told == [
        *(waits, ("collector", "made")),
        *(("collector", "collects"), ("collector", "host waits")),
        *(waits, ("collector", "loads"), ("collector", "tells its state")),  # asked after every unroll: no wait
        ("learner", "stops"),
    ]


def test_a_failed_unroll_leaves_the_stream(gpu: Gpu) -> None:
    class Failing(Noting):
        def collect(self, places: Any, after: Any = ()) -> Collected:
            raise OSError("broken")

    collector = OnStream(lambda: cast(Stands, Failing(gpu)), torch.device("cuda"))
    with pytest.raises(OSError, match="broken"):
        collector.collect([Place(0, 0)])
    assert gpu.current == "learner"


def test_snapshots_are_waited_for_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ready` is waited for by whoever takes the tensors over, which keep their memory until that is done."""
    told: list[tuple[str, object]] = []

    class Stream:
        def wait_event(self, event: object) -> None:
            told.append(("waits", event))

    class Tensor:
        is_cuda, device = True, torch.device("cuda")

        def record_stream(self, stream: object) -> None:
            told.append(("keeps", stream))

    stream, ready = Stream(), cast(torch.Event, object())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    received(Weights(1, {"a": cast(torch.Tensor, Tensor()), "b": torch.zeros(1)}, ready))
    received(Weights(2, {"b": torch.zeros(1)}))
    assert told == [("waits", ready), ("keeps", stream)]
