"""The published systems, by name: `--system hts`.

A system is a schedule and lanes; they lie over the preset and a file, under the user's flags. What it decides beyond
that (its network, its optimiser) is in the presets of its algorithm; where those have other numbers, they are here.
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


# The numbers of an update as published, by (system, algorithm, family), where presets have others.
_UPDATES: dict[tuple[str, str, str], dict[str, Any]] = {
    # Clemente et al., 2017: its entropy weight and clip norm, a learning rate of 0.0007 per environment.
    ("paac", "a2c", "atari"): {
        "num_envs": 32,
        "net.init": "paac",
        "algo.eps": 0.1,
        "algo.lr_scaling": "num_envs",
        "algo.anneal_lr": True,
        "algo.loss_scale": 5.0,
        "algo.ent_coef": 0.01,
        "algo.max_grad_norm": 40.0,
    },
    # Espeholt et al., 2018, table of the Atari experiments; its losses are sums over 32 unrolls of 20 rows.
    ("impala", "impala", "atari"): {
        "num_envs": 32,
        "unroll": 20,
        "algo.optimizer": "rmsprop_tf",
        "algo.eps": 0.01,
        "algo.lr": 6e-4,
        "algo.gae_lambda": 1.0,
        "algo.loss_scale": 640.0,
        "algo.ent_coef": 0.01,
    },
    # Stooke and Abbeel, 2018: the epsilon-Rainbow, every transition used eight times.
    ("alternating", "rainbow", "atari"): {
        "num_envs": 32,
        "algo.noisy": False,
        "algo.batch_size": 512,
        "algo.n_step": 3,
        "algo.v_min": -10.0,
        "algo.v_max": 10.0,
        "algo.lr": 6.25e-5,
        "algo.eps": 0.005,
        "algo.scale_eps": True,
        "algo.max_grad_norm": 10.0,
        "algo.target_every": 8_000,
        "algo.exploration.steps": 62_500,
        "algo.exploration.final": 0.01,
        "algo.replay.capacity": 1_000_000,
        "algo.replay.ratio": 8 / 512,
        "algo.replay.learning_starts": 20_000,
        "algo.replay.alpha": 0.5,
        "algo.replay.beta": 0.4,
    },
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
    return SYSTEMS[system] | _UPDATES.get((system, algo, family), {})
