"""What records the work of a GPU, imitated on the CPU, where there are no CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from slipstream.recording import Record


def traced(function: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
    """A `Record` of the operators that PyTorch was asked for: no Python runs again, and all memory stays.

    What a function reads from other memory the next time, what it decides by the numbers in a tensor (which fails
    already while it is traced), and what it counts in Python are thus wrong here as they are with CUDA graphs.
    """
    graph = make_fx(function, tracing_mode="real")()
    with torch.no_grad():
        outputs = graph()

    @torch.no_grad()
    def replay() -> None:
        for to, value in zip(tree_leaves(outputs), tree_leaves(graph()), strict=True):
            if isinstance(to, torch.Tensor):
                to.copy_(value)

    return replay, outputs


class Counting:
    """In place of `slipstream.recording.recorder`: records by `traced`, and counts."""

    def __init__(self) -> None:
        self.recordings = self.replays = 0

    def __call__(self, device: torch.device, wanted: bool) -> Record | None:
        return self._record if wanted else None

    def _record(self, function: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        self.recordings += 1
        replay, outputs = traced(function)

        def counted() -> None:
            self.replays += 1
            replay()

        return counted, outputs
