"""Algorithms: one file, one paper."""

from slipstream.algos.a2c import A2C
from slipstream.algos.appo import APPO
from slipstream.algos.c51 import C51
from slipstream.algos.ddpg import DDPG
from slipstream.algos.dqn import DQN
from slipstream.algos.impala import IMPALA
from slipstream.algos.ppo import PPO
from slipstream.algos.qrdqn import QRDQN
from slipstream.algos.r2d2 import R2D2
from slipstream.algos.rainbow import Rainbow
from slipstream.algos.replaying import AnyAlgorithm
from slipstream.algos.sac import SAC
from slipstream.algos.td3 import TD3

_ALL: tuple[type[AnyAlgorithm], ...] = (A2C, APPO, C51, DDPG, DQN, IMPALA, PPO, QRDQN, R2D2, Rainbow, SAC, TD3)

ALGORITHMS: dict[str, type[AnyAlgorithm]] = {algorithm.name: algorithm for algorithm in _ALL}

__all__ = [
    "A2C",
    "ALGORITHMS",
    "APPO",
    "C51",
    "DDPG",
    "DQN",
    "IMPALA",
    "PPO",
    "QRDQN",
    "R2D2",
    "SAC",
    "TD3",
    "Rainbow",
]
