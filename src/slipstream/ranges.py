"""Ranges of the numbers that users set, whose errors name the key as typed; and when a count passes a multiple."""

from __future__ import annotations

import math


def at_least(owner: object, prefix: str, least: float, *names: str) -> None:
    """Refuses fields of `owner` below `least`, or not a number.

    Args:
        owner: A dataclass.
        prefix: What stands before a field's name where users type it (`algo.`).
        least: The least value allowed.
        names: Fields.

    Raises:
        ValueError: Names the first that does not fit.
    """
    for name in names:
        value = getattr(owner, name)
        if not value >= least:
            raise ValueError(f"{prefix}{name} must be at least {least}, got {value}")


def above(owner: object, prefix: str, bound: float, *names: str) -> None:
    """Refuses fields not greater than `bound`; otherwise as `at_least`."""
    for name in names:
        value = getattr(owner, name)
        if not value > bound:
            raise ValueError(f"{prefix}{name} must be above {bound}, got {value}")


def between(owner: object, prefix: str, least: float, most: float, *names: str) -> None:
    """Refuses fields outside `[least, most]`; otherwise as `at_least`."""
    for name in names:
        value = getattr(owner, name)
        if not least <= value <= most:
            raise ValueError(f"{prefix}{name} must be between {least} and {most}, got {value}")


def finite(owner: object, prefix: str, *names: str) -> None:
    """Refuses fields that are infinite or not a number; otherwise as `at_least`."""
    for name in names:
        value = getattr(owner, name)
        if not math.isfinite(value):
            raise ValueError(f"{prefix}{name} must be a finite number, got {value}")


def ordered(owner: object, prefix: str, low: str, high: str) -> None:
    """Refuses the field `low` unless both are finite and it is below `high`; otherwise as `at_least`."""
    finite(owner, prefix, low, high)
    if not getattr(owner, low) < getattr(owner, high):
        raise ValueError(f"{prefix}{low}={getattr(owner, low)} must be below {prefix}{high}={getattr(owner, high)}")


def crossed(before: float, now: float, every: int) -> bool:
    """Whether a multiple of `every` lies in `(before, now]`; never for `every=0`. Needs no memory, so it resumes."""
    return every > 0 and now // every > before // every
