"""The schedules of the published systems, by name: `--system hts`.

They lie over the preset and a file, under the user's flags.

What a system decides beyond its schedule (its algorithm, network, optimiser) is in the presets of its algorithm.
"""

from __future__ import annotations

from typing import Any

from slipstream.run.settings import ConfigError, nearest

SYSTEMS: dict[str, dict[str, Any]] = {
    "paac": {"schedule": "sync", "lanes": 1},
    "alternating": {"schedule": "sync", "lanes": 2},
    "hts": {"schedule": "concurrent", "lanes": 4},
    "impala": {"schedule": "async", "lanes": 4},
    "appo": {"schedule": "async", "lanes": 4},
}


def schedule_of(system: str, algo: str) -> dict[str, Any]:
    """The settings of a system, by dotted key; none for the empty name.

    Raises:
        ConfigError: It is unknown, or the name of another algorithm than `algo`.
    """
    if not system:
        return {}
    if system not in SYSTEMS:
        raise ConfigError(f"unknown system {system!r}.{nearest(system, SYSTEMS)}")
    if system in ("impala", "appo") and algo != system:
        raise ConfigError(
            f"system {system} is an algorithm as well: slipstream train {system} --system {system} --env ENV"
        )
    return SYSTEMS[system]
