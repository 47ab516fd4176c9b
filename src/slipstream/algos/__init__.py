"""Algorithms: one file, one paper."""

from slipstream.algos.a2c import A2C
from slipstream.algos.appo import APPO
from slipstream.algos.impala import IMPALA
from slipstream.algos.ppo import PPO

ALGORITHMS: dict[str, type[A2C] | type[APPO] | type[IMPALA] | type[PPO]] = {
    "a2c": A2C,
    "appo": APPO,
    "impala": IMPALA,
    "ppo": PPO,
}

__all__ = ["A2C", "ALGORITHMS", "APPO", "IMPALA", "PPO"]
