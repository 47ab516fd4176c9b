"""Gradients that are not finite: they never reach a parameter, and what they came from is kept."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

_log = logging.getLogger(__name__)


class Rejects:
    """Lets gradient steps be taken, or left out where the gradient is not finite; the log tells of the first.

    Args:
        most: Gradient steps that may be left out in a row; one more is the end.

    Attributes:
        count: Gradient steps that were left out.
        keep: Writes what a gradient came from, by a name and as tensors: the parameters `at.*`, and the batch `batch.*`
            with a number for every shard. It returns a sentence that says where.
    """

    def __init__(self, most: int = 0) -> None:
        self._most = most
        self._in_a_row: Counter[str] = Counter()
        self.count = 0
        self.keep: Callable[[str, Mapping[str, Tensor]], str] = lambda name, tensors: ""

    def take(
        self, apply: Callable[[int], Tensor], update: int, at: object, batch: object, part: str = ""
    ) -> Tensor | None:
        """Takes a gradient step.

        Args:
            apply: Takes it, given the number of the update, and returns the norm of the gradient.
            update: That number.
            at: The networks that the gradient was taken of.
            batch: What it came from.
            part: Of the parameters, where several have steps of their own, which are counted apart.

        Returns:
            The norm; None if the step was left out.

        Raises:
            FloatingPointError: The gradient is not finite, and as many as may be have been left out before it.
        """
        try:
            norm = apply(update)
        except FloatingPointError as error:
            self.count += 1
            self._in_a_row[part] += 1
            tensors = dict(_tensors(at, "at")) | dict(_tensors(batch, "batch"))
            kept = self.keep(f"update-{update}", tensors) or "what it came from was not kept"
            if self._in_a_row[part] > self._most:
                error.add_note(kept)
                raise
            if self.count == 1:
                _log.warning("%s. It is left out; from here on faults/skipped_gradients counts. %s", error, kept)
            return None
        self._in_a_row[part] = 0
        return norm

    def state(self) -> dict[str, Any]:
        """Plain JSON facts that a later `load` needs."""
        return {"count": self.count, "in_a_row": dict(self._in_a_row)}

    def load(self, facts: Mapping[str, Any]) -> None:
        """Continues from what `state` returned, or from none where a checkpoint is older."""
        self.count, self._in_a_row = int(facts.get("count", 0)), Counter(facts.get("in_a_row", {}))


def _tensors(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """All tensors in networks, dataclasses, sequences and trees, by their paths."""
    if isinstance(value, Tensor):
        yield path, value.detach()
    elif isinstance(value, nn.Module):
        yield from _tensors(value.state_dict(), path)
    elif dataclasses.is_dataclass(value):
        yield from _tensors(vars(value), path)
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _tensors(part, f"{path}.{number}")
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _tensors(part, f"{path}.{name}")
