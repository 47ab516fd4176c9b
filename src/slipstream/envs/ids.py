"""What to say about ids that nobody knows."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_id(id: str, known: Iterable[str]) -> str:
    """The message: the nearest of those that are known, and where to find them all."""
    near = difflib.get_close_matches(id, known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    return f"unknown environment '{id}'; {hint}`slipstream envs` lists all"
