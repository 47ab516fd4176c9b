"""What a run says of itself when its metrics show that it can't learn what it should: once, and what to change."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from slipstream.envs.options import NonFinite
from slipstream.types import Report


class Concern(NamedTuple):
    """A share that should stay small: what a metric adds up to, of something else that reports have.

    Attributes:
        metric: Its name.
        whole: What it is a share of in a report, given the steps since the report before.
        window: How much of that is looked at at a time.
        bound: What the share should not exceed.
        words: What it means, and what to change; `{share}` is the share.
    """

    metric: str
    whole: Callable[[Report, int], int]
    window: int
    bound: float
    words: str


_BEYOND = Concern(
    "train/beyond_atoms",
    lambda report, steps: 1,
    100,
    0.05,
    "{share:.0%} of what returns are learned from lies beyond the atoms, where nothing can be told apart: widen "
    "algo.v_min and algo.v_max (train/beyond_atoms)",
)
_CUT = Concern(
    "faults/mended_rows",
    lambda report, steps: len(report.episodes),
    100,
    0.05,
    "{share:.0%} of the last episodes were cut where the environment had numbers that are not finite, and what comes "
    "after is never learned: mend the environment; --env-options.non-finite raise shows where (faults/mended_rows)",
)
_CLAMPED = Concern(
    "faults/mended_rows",
    lambda report, steps: steps,
    1_000,
    0.05,
    "{share:.0%} of the last steps had numbers that are not finite, and others are learned from in their place: mend "
    "the environment; --env-options.non-finite raise shows where (faults/mended_rows)",
)


class Concerns:
    """Observer that warns, once each, of shares that are large.

    Args:
        non_finite: As in `EnvOptions`; what mended rows are a share of.
        steps: Of the run so far.
    """

    def __init__(self, non_finite: NonFinite = "raise", steps: int = 0) -> None:
        mended = {"skip": [_CUT], "clamp": [_CLAMPED], "raise": []}[non_finite]
        self._sums = {concern: (torch.zeros(()), 0) for concern in [_BEYOND, *mended]}
        self._steps = steps

    def __call__(self, report: Report) -> None:
        """Adds an update."""
        steps, self._steps = report.steps - self._steps, report.steps
        for concern, (total, whole) in list(self._sums.items()):
            if concern.metric not in report.metrics:
                continue
            total, whole = total + _tensor(report.metrics[concern.metric]), whole + concern.whole(report, steps)
            if whole < concern.window:
                self._sums[concern] = total, whole
            elif (share := float(total) / whole) <= concern.bound:
                self._sums[concern] = torch.zeros(()), 0
            else:
                del self._sums[concern]
                warnings.warn(concern.words.format(share=share), stacklevel=2)

    def close(self) -> None:
        """There is nothing to close."""


def _tensor(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value).detach()
