"""Schedules: who runs when. Each is a short generator that yields one report per update."""

from collections.abc import Callable, Generator

from slipstream.schedules.asynchronous import asynchronous
from slipstream.schedules.concurrent import concurrent
from slipstream.schedules.parts import Parts
from slipstream.schedules.sync import sync
from slipstream.types import Report

Schedule = Callable[[Parts], Generator[Report]]

SCHEDULES: dict[str, Schedule] = {"sync": sync, "concurrent": concurrent, "async": asynchronous}

__all__ = ["SCHEDULES", "Parts", "Schedule", "asynchronous", "concurrent", "sync"]
