"""Presets of the algorithms that learn from replays; see `preset_table`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Preset = Mapping[str, Any]

# Mnih et al., 2015, with Adam as in Dopamine and rlpyt. A slab of 64 steps brings 16 gradient steps of 32 rows.
_ATARI: Preset = {
    "total_steps": 10_000_000,
    "num_envs": 16,
    "unroll": 4,
    "lanes": 2,
    "reward": "clip",
    "net.torso": "nature_cnn",
    "net.init": "default",
    "algo.replay.capacity": 1_000_000,
    "algo.replay.learning_starts": 20_000,
    "algo.exploration.steps": 250_000,
}
# The network of 2013, half as dear as that of the family: what counts is the number of gradient steps.
_PONG: Preset = {
    "total_steps": 2_000_000,
    "net.torso": "nips_cnn",
    "stop_at_return": 18.5,
    "algo.replay.capacity": 500_000,
    "algo.replay.learning_starts": 10_000,
    "algo.exploration.steps": 50_000,
}
# As on Atari; an observation of EnvPool's takes 27 KB, and nothing of it is stacked.
_FOOTBALL: Preset = {
    **{key: value for key, value in _ATARI.items() if key != "reward"},
    "total_steps": 5_000_000,
    "algo.gamma": 0.993,
    "algo.replay.capacity": 100_000,
    "algo.replay.learning_starts": 5_000,
    "algo.exploration.steps": 100_000,
}
# Small networks: one lane and one shard, since a gradient takes less time than handing a half of it to another thread.
_CLASSIC: Preset = {
    "total_steps": 100_000,
    "num_envs": 8,
    "unroll": 4,
    "net.hidden": (128, 128),
    "net.activation": "relu",
    "algo.lr": 1e-3,
    "algo.anneal_lr": True,
    "algo.gamma": 0.98,
    "algo.batch_size": 128,
    "algo.n_step": 3,
    "algo.target_every": 1,
    "algo.tau": 0.01,
    "algo.replay.capacity": 100_000,
    "algo.replay.learning_starts": 1_000,
    "algo.replay.ratio": 0.25,
    "algo.exploration.steps": 10_000,
    "algo.exploration.final": 0.02,
}
_TOY: Preset = {
    **_CLASSIC,
    "total_steps": 20_000,
    "net.hidden": (64,),
    "algo.lr": 2e-3,
    "algo.anneal_lr": False,
    "algo.batch_size": 64,
    "algo.target_every": 200,
    "algo.tau": 1.0,
    "algo.replay.capacity": 20_000,
    "algo.replay.learning_starts": 500,
    "algo.exploration.steps": 4_000,
}
_OTHER: Preset = {**_CLASSIC, "total_steps": 1_000_000, "algo.replay.capacity": 1_000_000, "algo.gamma": 0.99}
_BOX2D: Preset = {
    **_CLASSIC,
    "total_steps": 300_000,
    "net.hidden": (256, 256),
    "algo.lr": 6.3e-4,
    "algo.gamma": 0.99,
    "algo.exploration.steps": 40_000,
}
# At a discount of 0.98 a reward of 1 or -1 at every step is worth 50.
_CATEGORICAL: Preset = {"algo.v_min": -50.0, "algo.v_max": 50.0}
_CARTPOLE: Preset = {"algo.v_min": 0.0, "algo.v_max": 50.0}
# A fall costs 100, a fare brings 20.
_TEXT: Preset = {"algo.v_min": -100.0, "algo.v_max": 20.0}
_RECURRENT: Preset = {
    "net.core": "lstm",
    "net.core_size": 128,
    "unroll": 10,
    "algo.burn_in": 10,
    "algo.length": 20,
    "algo.batch_size": 32,
    "algo.replay.ratio": 0.05,
    "algo.gamma": 0.99,
}
# Continuous control: hyperparameters of the papers (two layers of 256, Adam 3e-4 or 1e-3, a gradient step per step).
_CONTINUOUS: Preset = {
    "total_steps": 1_000_000,
    "num_envs": 4,
    "unroll": 1,
    "net.hidden": (256, 256),
    "net.activation": "relu",
    "net.init": "default",
    "algo.replay.capacity": 1_000_000,
    "algo.replay.learning_starts": 5_000,
}
_PENDULUM: Preset = {
    **_CONTINUOUS,
    "total_steps": 20_000,
    "net.hidden": (64, 64),
    "algo.lr": 1e-3,
    "algo.replay.capacity": 20_000,
    "algo.replay.learning_starts": 500,
}

_ERRANDS = ("CliffWalking-v1", "CliffWalkingSlippery-v1", "Taxi-v4")

REPLAY_PRESETS: dict[tuple[str, str], Preset] = {
    ("dqn", "atari"): _ATARI,
    # 0 after 0.86 M, 15 after 1.10 M, 18 after 1.32 M. With the larger network of the family, and half the rate, -13.9
    # after 0.73 M.
    ("dqn", "ALE/Pong-v5"): {
        **_PONG,
        "algo.lr": 2e-4,
        "algo.double": True,
        "algo.n_step": 3,
        "algo.target_every": 4_000,
    },
    ("c51", "atari"): {**_ATARI, "algo.lr": 2.5e-4, "algo.eps": 0.01, "algo.scale_eps": True},
    ("qrdqn", "atari"): {**_ATARI, "algo.lr": 5e-5, "algo.eps": 0.01, "algo.scale_eps": True},
    # Hessel et al., 2018; its targets and learning rate are the defaults.
    ("rainbow", "atari"): _ATARI,
    # Points come every 40 steps at least, so that no return is beyond 5. Gradients of Pong are a third of the paper's
    # epsilon, 1.5e-4; divided by the batch it leaves Adam its step. In bfloat16: 0 after 0.51 M, 15 after 0.76 M, 18
    # after 0.85 M; with n = 3, 0 after 1.36 M.
    ("rainbow", "ALE/Pong-v5"): {
        **_PONG,
        "algo.lr": 1.5e-4,
        "algo.scale_eps": True,
        "algo.v_min": -5.0,
        "algo.v_max": 5.0,
        "algo.n_step": 10,
        "algo.target_every": 4_000,
    },
    ("r2d2", "atari"): {
        **_ATARI,
        "num_envs": 32,
        "unroll": 40,
        "net.core": "lstm",
        "net.core_size": 512,
        "algo.batch_size": 32,
    },
    # CartPole ends in slow drifts at a discount of 0.98, which greedy episodes don't survive.
    ("dqn", "classic"): {
        **_CLASSIC,
        "algo.double": True,
        "algo.gamma": 0.99,
        "algo.n_step": 5,
        "algo.replay.ratio": 0.5,
        "algo.exploration.steps": 5_000,
        "algo.exploration.final": 0.01,
    },
    ("c51", "classic"): {**_CLASSIC, **_CATEGORICAL},
    ("c51", "CartPole-v1"): _CARTPOLE,
    ("rainbow", "CartPole-v1"): _CARTPOLE,
    ("qrdqn", "classic"): {**_CLASSIC, "algo.quantiles": 32},
    ("rainbow", "classic"): {**_CLASSIC, **_CATEGORICAL},
    ("r2d2", "classic"): {**_CLASSIC, **_RECURRENT},
    ("dqn", "box2d"): {**_BOX2D, "algo.double": True},
    ("c51", "box2d"): {**_BOX2D, "algo.v_min": -300.0, "algo.v_max": 300.0},
    ("qrdqn", "box2d"): {**_BOX2D, "algo.quantiles": 64},
    ("rainbow", "box2d"): {**_BOX2D, "algo.v_min": -300.0, "algo.v_max": 300.0},
    ("r2d2", "box2d"): {**_BOX2D, **_RECURRENT},
    ("sac", "box2d"): _CONTINUOUS,
    ("td3", "box2d"): _CONTINUOUS,
    ("ddpg", "box2d"): _CONTINUOUS,
    ("dqn", "gfootball"): {**_FOOTBALL, "algo.double": True},
    ("c51", "gfootball"): {**_FOOTBALL, "algo.v_min": -2.0, "algo.v_max": 2.0},
    ("qrdqn", "gfootball"): {**_FOOTBALL, "algo.quantiles": 51},
    ("rainbow", "gfootball"): {**_FOOTBALL, "algo.v_min": -2.0, "algo.v_max": 2.0},
    ("r2d2", "gfootball"): {**_FOOTBALL, "unroll": 20, "net.core": "lstm", "algo.burn_in": 20, "algo.length": 40},
    ("dqn", "toy"): _TOY,
    ("c51", "toy"): {**_TOY, "algo.lr": 4e-3, "algo.atoms": 21, "algo.v_min": -1.2, "algo.v_max": 1.2},
    ("qrdqn", "toy"): {**_TOY, "algo.quantiles": 16},
    ("rainbow", "toy"): {**_TOY, "algo.v_min": -2.0, "algo.v_max": 2.0},
    ("r2d2", "toy"): {**_TOY, **_RECURRENT, "net.core_size": 32},
    **{(algo, env): _TEXT for algo in ("c51", "rainbow") for env in _ERRANDS},
    ("dqn", "other"): _OTHER,
    ("c51", "other"): _OTHER,
    ("qrdqn", "other"): _OTHER,
    ("rainbow", "other"): _OTHER,
    ("r2d2", "other"): {**_OTHER, **_RECURRENT},
    ("sac", "mujoco"): _CONTINUOUS,
    ("td3", "mujoco"): {**_CONTINUOUS, "algo.lr": 3e-4},
    ("ddpg", "mujoco"): {**_CONTINUOUS, "algo.lr": 3e-4},
    ("sac", "classic"): _PENDULUM,
    ("td3", "classic"): _PENDULUM,
    ("ddpg", "classic"): _PENDULUM,
    ("sac", "toy"): _PENDULUM,
    ("td3", "toy"): _PENDULUM,
    ("ddpg", "toy"): _PENDULUM,
    ("sac", "other"): _CONTINUOUS,
    ("td3", "other"): {**_CONTINUOUS, "algo.lr": 3e-4},
    ("ddpg", "other"): {**_CONTINUOUS, "algo.lr": 3e-4},
}
