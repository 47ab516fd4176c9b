"""Algorithms: one file, one paper."""

from slipstream.algos.a2c import A2C
from slipstream.algos.ppo import PPO

ALGORITHMS: dict[str, type[A2C] | type[PPO]] = {"a2c": A2C, "ppo": PPO}

__all__ = ["A2C", "ALGORITHMS", "PPO"]
