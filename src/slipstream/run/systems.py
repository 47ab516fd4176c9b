"""The published systems, by name: `--system hts`.

A system is a schedule and lanes; they lie over the preset and a file, under the user's flags. What it decides beyond
that (its network, its optimiser) is in the presets of its algorithm, but where those have other numbers.
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


# Clemente et al., 2017: its entropy weight and clip norm, a learning rate of 0.0007 per environment.
_PAAC_UPDATE: dict[str, Any] = {
    "num_envs": 32,
    "net.init": "paac",
    "algo.eps": 0.1,
    "algo.lr_scaling": "num_envs",
    "algo.anneal_lr": True,
    "algo.loss_scale": 5.0,
    "algo.ent_coef": 0.01,
    "algo.max_grad_norm": 40.0,
}


def published(system: str, algo: str, family: str) -> dict[str, Any]:
    """The settings of a system, by dotted key; none for the empty name.

    Args:
        system: Its name.
        algo: The algorithm.
        family: Preset family of the environment.

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
    return SYSTEMS[system] | (_PAAC_UPDATE if (system, algo, family) == ("paac", "a2c", "atari") else {})
