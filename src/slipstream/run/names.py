"""Other libraries' names of settings: those that mean what is called otherwise here, and those that don't quite."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

_ALIASES = {
    "env_id": "env",
    "total_timesteps": "total_steps",
    "timesteps": "total_steps",
    "n_envs": "num_envs",
    "num_steps": "unroll",
    "learners": "placement.learners",
    "num_learners": "placement.learners",
}
_HYPERPARAMETERS = {
    "learning_rate": "lr",
    "n_epochs": "epochs",
    "update_epochs": "epochs",
    "clip_coef": "clip_range",
    "norm_adv": "normalize_advantage",
    "buffer_size": "replay.capacity",
    "learning_starts": "replay.learning_starts",
    "start_e": "exploration.initial",
    "exploration_initial_eps": "exploration.initial",
    "end_e": "exploration.final",
    "exploration_final_eps": "exploration.final",
    "target_update_interval": "target_every",
    "target_network_frequency": "target_every",
    "policy_frequency": "policy_delay",
    "policy_noise": "target_noise",
    "target_policy_noise": "target_noise",
    "noise_clip": "target_noise_clip",
    "n_steps": "n_step",
}
_OF_ACTOR_CRITICS = {"n_steps": "unroll"}  # Stable-Baselines3 has one name for what is collected and for what is summed

# What is counted otherwise here: a name, a key that an algorithm has if this is for it, and what to set.
_RATIO = "algo.replay.ratio is the number of gradient steps per collected step: "
_MINIBATCHES = "algo.batch_size is the rows of a minibatch: num_envs x unroll / "
_ELSEWHERE = (
    ("gradient_steps", "algo.replay.ratio", f"{_RATIO}gradient_steps / (train_freq x n_envs)"),
    ("train_freq", "algo.replay.ratio", f"{_RATIO}gradient_steps / (train_freq x n_envs)"),
    ("train_frequency", "algo.replay.ratio", f"{_RATIO}1 / train_frequency"),
    (
        "exploration_fraction",
        "algo.exploration.steps",
        "algo.exploration.steps is the length of the decay in steps: exploration_fraction x total_steps",
    ),
    ("num_minibatches", "algo.epochs", f"{_MINIBATCHES}num_minibatches"),
    ("nminibatches", "algo.epochs", f"{_MINIBATCHES}nminibatches"),
    (
        "ent_coef",
        "algo.alpha",
        "algo.alpha is the weight of the entropy, where it starts; --algo.adapt-alpha adapts it (auto)",
    ),
)


def aliases(known: Iterable[str]) -> dict[str, str]:
    """Other names of the dotted keys in `known`: those of other libraries, and hyperparameters without `algo.`."""
    names = set(known)
    own = {name.removeprefix("algo."): name for name in names}
    others = {name: f"algo.{field}" for name, field in _HYPERPARAMETERS.items()}
    # The later of two counts, if there is such a key.
    pairs = [
        *_OF_ACTOR_CRITICS.items(),
        *own.items(),
        *others.items(),
        *((f"algo.{name}", key) for name, key in others.items()),
        *_ALIASES.items(),
    ]
    return {name: key for name, key in pairs if key in names and name not in names}


def alias_lines() -> str:
    """What to tell users about the names in `aliases`, in lines of 100 characters."""
    pairs = [*_ALIASES.items(), *((name, f"algo.{field}") for name, field in _HYPERPARAMETERS.items())]
    names = ", ".join(f"{_dashed(name)} ({_dashed(key)})" for name, key in pairs)
    theirs = ", ".join(f"{_dashed(name)} is {_dashed(key)}" for name, key in _OF_ACTOR_CRITICS.items())
    own = "Hyperparameters may be typed without `algo.` (--lr 3e-4), and other libraries' names are understood:"
    return textwrap.fill(f"{own} {names}. Of actor-critics {theirs}.", 100, break_on_hyphens=False)


def elsewhere(name: str, known: Iterable[str]) -> str:
    """What to set in place of a setting that only other libraries have; empty if there is nothing to say.

    Args:
        name: What was typed.
        known: What may be; flags or dotted keys.
    """
    names = {_dotted(each) for each in known}
    leaf = _dotted(name).removeprefix("algo.")
    return next((what for other, key, what in _ELSEWHERE if other == leaf and key in names), "")


def _dashed(key: str) -> str:
    return "--" + key.replace("_", "-")


def _dotted(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")
