"""What has failed may go well when it is tried again: how often that is worth it, and after which pause."""

from __future__ import annotations

import logging
from typing import Generic, TypeVar

Failure = TypeVar("Failure", bound=Exception)

_log = logging.getLogger(__name__)

_PROGRESS = 100  # rows without a failure after which the count begins anew
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds


class Patience(Generic[Failure]):
    """With something that goes from row to row and fails now and then.

    It ends where the same failure comes again at the same row, a bug, or once there have been more in a row, with less
    than 100 rows between, than are allowed.

    Args:
        restarts: How many in a row are allowed; 0 for none.
        then: What the log says becomes of it.
    """

    def __init__(self, restarts: int, then: str = "it is brought back to where it was") -> None:
        self._restarts, self._then = restarts, then
        self._row = -_PROGRESS
        self._in_a_row: list[Failure] = []
        self._here: dict[str, Failure] = {}
        self._told = False

    def pause(self, failure: Failure, kind: str, row: int) -> float:
        """Seconds to wait before it is tried again; a line in the log says that it is.

        Args:
            failure: What happened. The log has all of the first, stacks included, and the first line of the others.
            kind: Failures of a kind are the same, and a bug where they come again; those of none, "", are not.
            row: Rows that have gone well; more with every call, or as many.

        Raises:
            Failure: There is no hope: the first in a row, or the first of its kind at this row.
        """
        if row != self._row:
            self._in_a_row = [] if row - self._row >= _PROGRESS else self._in_a_row
            self._row, self._here = row, {}
        self._in_a_row.append(failure)
        if kind and kind in self._here:
            raise self._here[kind]
        self._here[kind] = failure
        attempt = len(self._in_a_row)
        if attempt > self._restarts:
            raise self._in_a_row[0]
        said, _, more = str(failure).partition("\n")
        stack = "" if self._told or not more else f"\n{more}"
        self._told = True
        _log.warning("%s; %s (%d of %d)%s", said, self._then, attempt, self._restarts, stack)
        return min(_FIRST_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE)
