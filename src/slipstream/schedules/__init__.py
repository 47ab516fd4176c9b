"""Schedules: who runs when. Each is a short generator of reports."""

from slipstream.schedules.sync import sync

__all__ = ["sync"]
