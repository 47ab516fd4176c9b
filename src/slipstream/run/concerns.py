"""What a run says of itself when its metrics show that it can't learn what it should: once, and what to change."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from slipstream.types import Report


class Concern(NamedTuple):
    """A metric that should stay small.

    Attributes:
        metric: Its name.
        bound: What its mean should not exceed.
        words: What it means, and what to change; `{share}` is the mean.
    """

    metric: str
    bound: float
    words: str


CONCERNS = (
    Concern(
        "train/beyond_atoms",
        0.05,
        "{share:.0%} of what returns are learned from lies beyond the atoms, where nothing can be told apart: widen "
        "algo.v_min and algo.v_max (train/beyond_atoms)",
    ),
)

_UPDATES = 100


class Concerns:
    """Observer that warns, once each, of what the mean of a metric over 100 updates that have it gives cause for."""

    def __init__(self) -> None:
        self._means = {concern: (torch.zeros(()), 0) for concern in CONCERNS}

    def __call__(self, report: Report) -> None:
        """Adds an update."""
        for concern, (total, count) in list(self._means.items()):
            if concern.metric not in report.metrics:
                continue
            total, count = total + _tensor(report.metrics[concern.metric]), count + 1
            if count < _UPDATES:
                self._means[concern] = total, count
            elif (share := float(total) / count) <= concern.bound:
                self._means[concern] = torch.zeros(()), 0
            else:
                del self._means[concern]
                warnings.warn(concern.words.format(share=share), stacklevel=2)

    def close(self) -> None:
        """There is nothing to close."""


def _tensor(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value).detach()
