"""Presets: tuned settings for an (algorithm, kind of environment), written as what differs from the defaults.

A preset is a mapping of dotted keys. That of the family comes first, that of the exact id over it, the user's flags
over both. `slipstream presets` prints them; `slipstream train ... --print-config` prints what they lead to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from slipstream.envs.make import env_family
from slipstream.run.config import CALLABLE, Config, algorithm, canonical, from_plain, known_settings
from slipstream.run.settings import flatten, nest, plain

Preset = Mapping[str, Any]

# They start from CleanRL's and Stable-Baselines3-zoo's values and differ where trials with parallel ones were better.
PRESETS: dict[tuple[str, str], Preset] = {
    # Many small minibatches of fresh rows: on Pong the number of gradient steps is what counts. In trials of one seed,
    # 64 rows and minibatches of 128 were at -7 after 0.47 M steps, 128 rows and minibatches of 256 at -15 after 0.43 M.
    ("ppo", "atari"): {
        "total_steps": 10_000_000,
        "num_envs": 16,
        "unroll": 64,
        "lanes": 2,
        "reward": "clip",
        "net.torso": "nature_cnn",
        "algo.lr": 5e-4,
        "algo.epochs": 4,
        "algo.batch_size": 128,
        "algo.clip_range": 0.1,
        "algo.gae_lambda": 0.95,
        "algo.ent_coef": 0.01,
        "algo.vf_coef": 1.0,
        "algo.max_grad_norm": 0.5,
    },
    # The learning rate follows the divergence: twice as high while the policy hardly moves yet, lower once the same
    # steps shake it. Three seeds had 18 after 0.7 to 1.1 M steps. At a constant rate two seeds took 1.0 and 1.2 M; with
    # half the divergence seed 1 was at -11 after 0.36 M, and with a linear decay at -3.7 after 0.6 M.
    ("ppo", "ALE/Pong-v5"): {
        "total_steps": 1_200_000,
        "stop_at_return": 18.5,
        "algo.anneal_lr": False,
        "algo.desired_kl": 0.01,
    },
    # PAAC (Clemente et al., 2017): the paper's entropy weight and clip norm, learning rate 0.0007 per environment.
    ("a2c", "atari"): {
        "total_steps": 10_000_000,
        "num_envs": 32,
        "unroll": 5,
        "lanes": 2,
        "reward": "clip",
        "net.torso": "nips_cnn",
        "net.init": "paac",
        "env_options.atari.life_loss": False,
        "algo.optimizer": "rmsprop_tf",
        "algo.eps": 0.1,
        "algo.lr": 7e-4,
        "algo.lr_scaling": "num_envs",
        "algo.loss_scale": 5.0,
        "algo.ent_coef": 0.01,
        "algo.vf_coef": 0.5,
        "algo.max_grad_norm": 40.0,
    },
    # Kurach et al., 2020 (Google Research Football), as HTS-RL has them, but for minibatches of half the size and a
    # rate that follows the divergence, which is small there: academy_empty_goal_close was at 0.8 after 74 k steps
    # instead of 95 k (one seed each); four epochs were no faster for twice the cost.
    ("ppo", "gfootball"): {
        "total_steps": 5_000_000,
        "num_envs": 16,
        "unroll": 128,
        "lanes": 2,
        "net.torso": "nature_cnn",
        "algo.lr": 3.43e-4,
        "algo.desired_kl": 0.01,
        "algo.gamma": 0.993,
        "algo.epochs": 2,
        "algo.batch_size": 128,
        "algo.clip_range": 0.08,
        "algo.clip_range_vf": 0.08,
        "algo.ent_coef": 0.003,
        "algo.max_grad_norm": 0.64,
    },
    ("a2c", "gfootball"): {
        "total_steps": 5_000_000,
        "num_envs": 32,
        "unroll": 20,
        "lanes": 2,
        "net.torso": "nature_cnn",
        "algo.gamma": 0.993,
        "algo.lr": 1e-3,
        "algo.ent_coef": 0.01,
    },
    ("ppo", "classic"): {
        "total_steps": 100_000,
        "num_envs": 8,
        "unroll": 64,
        "lanes": 2,
        "net.share_torso": False,
        "algo.lr": 2e-3,
        "algo.gamma": 0.98,
        "algo.gae_lambda": 0.9,
        "algo.epochs": 10,
        "algo.batch_size": 128,
        "algo.clip_range": 0.2,
        "algo.ent_coef": 0.0,
    },
    ("ppo", "Acrobot-v1"): {
        "total_steps": 300_000,
        "num_envs": 16,
        "algo.gamma": 0.99,
        "algo.gae_lambda": 0.94,
        "algo.batch_size": 256,
    },
    ("a2c", "classic"): {
        "total_steps": 200_000,
        "num_envs": 8,
        "unroll": 16,
        "lanes": 2,
        "net.share_torso": False,
        "algo.optimizer": "adam",
        "algo.lr": 3e-3,
        "algo.gamma": 0.98,
        "algo.gae_lambda": 0.9,
        "algo.ent_coef": 0.0,
        "algo.normalize_advantage": True,
    },
    ("ppo", "mujoco"): {
        "total_steps": 1_000_000,
        "num_envs": 8,
        "unroll": 256,
        "reward": "scale",
        "net.normalize_obs": True,
        "net.share_torso": False,
        "algo.lr": 3e-4,
        "algo.epochs": 10,
        "algo.batch_size": 64,
        "algo.clip_range": 0.2,
        "algo.ent_coef": 0.0,
    },
    ("ppo", "HalfCheetah-v5"): {
        "net.hidden": (128, 128),
        "net.activation": "relu",
        "net.log_std_init": -1.0,
        "algo.gamma": 0.98,
        "algo.gae_lambda": 0.92,
    },
    ("a2c", "mujoco"): {
        "total_steps": 2_000_000,
        "num_envs": 8,
        "unroll": 8,
        "reward": "scale",
        "net.normalize_obs": True,
        "net.share_torso": False,
        "net.log_std_init": -2.0,
        "algo.lr": 1e-3,
        "algo.gae_lambda": 0.9,
        "algo.ent_coef": 0.0,
        "algo.vf_coef": 0.4,
    },
    ("ppo", "box2d"): {
        "total_steps": 1_000_000,
        "num_envs": 16,
        "unroll": 128,
        "algo.lr": 3e-4,
        "algo.gamma": 0.999,
        "algo.gae_lambda": 0.98,
        "algo.epochs": 4,
        "algo.batch_size": 64,
        "algo.clip_range": 0.2,
    },
    ("a2c", "box2d"): {
        "total_steps": 1_000_000,
        "num_envs": 8,
        "unroll": 8,
        "algo.lr": 8e-4,
        "algo.gamma": 0.995,
        "algo.ent_coef": 1e-5,
    },
    # PPO's rows for rows of any age: a lag counts in updates, each of many gradient steps, so that it is kept small.
    ("appo", "atari"): {
        "total_steps": 10_000_000,
        "schedule": "async",
        "max_lag": 2,
        "num_envs": 16,
        "unroll": 64,
        "lanes": 2,
        "reward": "clip",
        "net.torso": "nature_cnn",
        "algo.lr": 5e-4,
        "algo.epochs": 4,
        "algo.batch_size": 128,
        "algo.clip_range": 0.1,
        "algo.gae_lambda": 0.95,
        "algo.ent_coef": 0.01,
        "algo.vf_coef": 1.0,
    },
    ("appo", "ALE/Pong-v5"): {
        "total_steps": 1_700_000,
        "stop_at_return": 18.0,
        "algo.anneal_lr": False,
        "algo.desired_kl": 0.01,
    },
    # Espeholt et al., 2018, table of the Atari experiments; its losses are sums over 32 unrolls of 20 rows.
    ("impala", "atari"): {
        "total_steps": 10_000_000,
        "schedule": "async",
        "num_envs": 32,
        "unroll": 20,
        "lanes": 4,
        "reward": "clip",
        "net.torso": "nature_cnn",
        "algo.optimizer": "rmsprop_tf",
        "algo.eps": 0.01,
        "algo.lr": 6e-4,
        "algo.loss_scale": 640.0,
        "algo.ent_coef": 0.01,
        "algo.vf_coef": 0.5,
        "algo.max_grad_norm": 40.0,
    },
    ("appo", "gfootball"): {
        "total_steps": 5_000_000,
        "schedule": "async",
        "max_lag": 2,
        "num_envs": 16,
        "unroll": 128,
        "lanes": 4,
        "net.torso": "nature_cnn",
        "algo.lr": 3e-4,
        "algo.gamma": 0.993,
        "algo.epochs": 4,
        "algo.batch_size": 256,
        "algo.clip_range": 0.1,
        "algo.ent_coef": 0.003,
        "algo.max_grad_norm": 0.64,
    },
    # Its losses are sums over an update. As means their gradients are so small, with rewards this rare, that Adam's
    # epsilon drowns them: nothing was learned in 12 k steps; as sums, academy_empty_goal_close was at 0.8 after 58 k.
    ("impala", "gfootball"): {
        "total_steps": 5_000_000,
        "schedule": "async",
        "num_envs": 16,
        "unroll": 16,
        "lanes": 4,
        "net.torso": "nature_cnn",
        "algo.lr": 6e-4,
        "algo.gamma": 0.993,
        "algo.loss_scale": 256.0,
        "algo.ent_coef": 0.003,
        "algo.max_grad_norm": 40.0,
    },
    ("appo", "classic"): {
        "total_steps": 100_000,
        "schedule": "async",
        "max_lag": 1,
        "num_envs": 8,
        "unroll": 64,
        "lanes": 2,
        "net.share_torso": False,
        "algo.lr": 2e-3,
        "algo.gamma": 0.98,
        "algo.gae_lambda": 0.9,
        "algo.epochs": 10,
        "algo.batch_size": 128,
        "algo.clip_range": 0.2,
        "algo.ent_coef": 0.0,
    },
    ("impala", "classic"): {
        "total_steps": 200_000,
        "schedule": "async",
        "num_envs": 8,
        "unroll": 16,
        "lanes": 2,
        "net.share_torso": False,
        "algo.lr": 3e-3,
        "algo.gamma": 0.98,
        "algo.gae_lambda": 0.9,
        "algo.ent_coef": 0.0,
    },
    ("appo", "mujoco"): {
        "total_steps": 1_000_000,
        "schedule": "async",
        "max_lag": 1,
        "num_envs": 8,
        "unroll": 256,
        "lanes": 2,
        "reward": "scale",
        "net.normalize_obs": True,
        "net.share_torso": False,
        "algo.lr": 3e-4,
        "algo.epochs": 10,
        "algo.batch_size": 64,
        "algo.clip_range": 0.2,
        "algo.ent_coef": 0.0,
    },
    ("impala", "mujoco"): {
        "total_steps": 2_000_000,
        "schedule": "async",
        "num_envs": 8,
        "unroll": 16,
        "lanes": 2,
        "reward": "scale",
        "net.normalize_obs": True,
        "net.share_torso": False,
        "net.log_std_init": -2.0,
        "algo.lr": 3e-4,
        "algo.gae_lambda": 0.9,
        "algo.ent_coef": 0.0,
        "algo.vf_coef": 0.4,
    },
    ("appo", "box2d"): {
        "total_steps": 1_000_000,
        "schedule": "async",
        "max_lag": 1,
        "num_envs": 16,
        "unroll": 128,
        "lanes": 2,
        "algo.lr": 3e-4,
        "algo.gamma": 0.999,
        "algo.gae_lambda": 0.98,
        "algo.epochs": 4,
        "algo.batch_size": 64,
        "algo.clip_range": 0.2,
    },
    ("impala", "box2d"): {
        "total_steps": 1_000_000,
        "schedule": "async",
        "num_envs": 16,
        "unroll": 16,
        "lanes": 2,
        "algo.lr": 8e-4,
        "algo.gamma": 0.995,
        "algo.ent_coef": 1e-5,
    },
    ("ppo", "toy"): {"total_steps": 50_000, "num_envs": 16, "unroll": 32, "algo.lr": 1e-3, "algo.batch_size": 128},
    ("a2c", "toy"): {"total_steps": 100_000, "num_envs": 16, "unroll": 8, "algo.lr": 2e-3},
    ("ppo", "other"): {"total_steps": 1_000_000, "num_envs": 8, "unroll": 128, "algo.lr": 3e-4},
    ("a2c", "other"): {"total_steps": 1_000_000, "num_envs": 16, "unroll": 8},
    ("appo", "toy"): {
        "total_steps": 50_000,
        "schedule": "async",
        "max_lag": 1,
        "num_envs": 16,
        "unroll": 32,
        "lanes": 2,
        "algo.lr": 1e-3,
        "algo.batch_size": 128,
    },
    ("impala", "toy"): {
        "total_steps": 100_000,
        "schedule": "async",
        "num_envs": 16,
        "unroll": 16,
        "lanes": 2,
        "algo.lr": 1e-2,
        "algo.gae_lambda": 0.95,
    },
    ("appo", "other"): {
        "total_steps": 1_000_000,
        "schedule": "async",
        "max_lag": 1,
        "num_envs": 8,
        "unroll": 128,
        "lanes": 2,
        "algo.lr": 3e-4,
    },
    ("impala", "other"): {"total_steps": 1_000_000, "schedule": "async", "num_envs": 16, "unroll": 16, "lanes": 2},
}


def family(env: str) -> str:
    """Preset family of an id, found without making the environment; `other` for callables.

    Raises:
        ValueError: For an unknown id; it names the nearest.
        ImportError: If the id needs a package that is not installed; it has the pip line.
    """
    return "other" if env.startswith(CALLABLE) else env_family(env)


def preset(algo: str, env: str) -> dict[str, Any]:
    """What the presets say for this algorithm and environment, the exact id over its family.

    An Atari game is the same game under all of its ids.
    """
    kind = family(env)
    game = re.sub(r"^(envpool:)?(\w+?)(NoFrameskip)?-v\d$", r"ALE/\2-v5", env) if kind == "atari" else env
    return {**PRESETS.get((algo, kind), {}), **PRESETS.get((algo, game), {})}


def configure(algo: str, env: str, changes: Mapping[str, Any] | None = None) -> Config:
    """The preset of (algo, env) with `changes` (dotted or nested keys) over it.

    Raises:
        ConfigError: For an unknown algorithm or key, a wrong value, or settings that contradict each other.
    """
    defaults = plain(Config(env=env, algo=algorithm(algo)()))
    known = known_settings(algo)
    wanted = {canonical(key, known): value for key, value in flatten(changes or {}).items()}
    return spelled_out(from_plain(nest(flatten(defaults) | preset(algo, env) | wanted)))


def spelled_out(config: Config) -> Config:
    """`config` with what the Atari protocol stands for written out, so that a file tells all."""
    if family(config.env) != "atari":
        return config
    atari = config.env_options.atari
    atari = replace(atari, **asdict(atari.spelled_out()))
    return replace(config, env_options=replace(config.env_options, atari=atari))
