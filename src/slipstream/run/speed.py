"""How fast a configuration trains here: steps per second, by the clock and of the cores it had."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from slipstream.run.config import Config, ConfigError
from slipstream.run.limit import learning_at_once
from slipstream.run.machine import cores, cpu_seconds
from slipstream.run.training import Training

_WARM_UP = 2
"""Updates before the clock starts: threads, caches and allocators have settled then."""


@dataclass(frozen=True)
class Speed:
    """A measurement.

    Attributes:
        steps_per_second: Agent decisions per second of training.
        busy: Share of the cores that this process and those that it started kept busy.
    """

    steps_per_second: float
    busy: float


def measure_speed(config: Config, seconds: float) -> Speed:
    """Trains for at least `seconds` after two updates of warm-up; nothing is written.

    Raises:
        ConfigError: The configuration's steps are used up before.
    """
    config = learning_at_once(replace(config, stop_at_return=None))
    training = Training(config)
    try:
        reports = iter(training)
        for _ in range(_WARM_UP - 1):
            next(reports, None)
        before = next(reports, None)
        start, spent = time.perf_counter(), cpu_seconds()
        for report in reports:
            elapsed = time.perf_counter() - start
            if before is not None and elapsed >= seconds:
                busy = (cpu_seconds() - spent) / elapsed / cores()
                return Speed((report.steps - before.steps) / elapsed, busy)
    finally:
        training.close()
    raise ConfigError(
        f"total_steps={config.total_steps:,} are used up in less than {seconds:g} seconds: measure for less time, or "
        "raise them"
    )
