"""Settings that can't change anything in a run. They are said at its start, since whoever typed one expects something.

They are warnings: the run is the one that was asked for, and a file of settings may have been written for another
environment. What counts is that a setting differs from the preset, which nobody typed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from gymnasium import spaces

from slipstream import tree
from slipstream.algos import APPO, PPO
from slipstream.envs.make import native_threads
from slipstream.ops.spaces import feature_space, is_image
from slipstream.run.config import CALLABLE, Config
from slipstream.run.presets import configure
from slipstream.types import EnvSpec

_SHOWN = 3


class Rule(NamedTuple):
    """When settings have no effect.

    Attributes:
        group: Dotted name of the settings they belong to; empty for those of the run itself.
        names: Their names in it; empty for all of them.
        idle: Whether they have no effect in this run.
        reason: Why.
    """

    group: str
    names: tuple[str, ...]
    idle: bool
    reason: str


def warn_unused(config: Config, spec: EnvSpec, own_torso: bool, own_policy: bool) -> None:
    """Warns of every setting that differs from the preset and has no effect, one line for each reason.

    Args:
        config: The run's settings.
        spec: Its environments.
        own_torso: Whether it has a torso that `net` does not describe.
        own_policy: Whether it has a policy that `net` does not describe.
    """
    given, preset = _groups(config), _groups(configure(config.algo.name, config.env))
    for rule in _rules(config, spec, own_torso, own_policy):
        found = _changed(rule, given[rule.group], preset[rule.group]) if rule.idle else []
        if found:
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            warnings.warn(f"no effect: {', '.join(found[:_SHOWN])}{more} ({rule.reason})", stacklevel=3)


def _rules(config: Config, spec: EnvSpec, own_torso: bool, own_policy: bool) -> Iterator[Rule]:
    place, net = config.placement, config.net
    name = config.env.removeprefix(CALLABLE)
    native = native_threads(config.env)
    leaves = tree.leaves(feature_space(spec.observation_space))
    images = [leaf for leaf in leaves if is_image(leaf)]
    floats = [leaf for leaf in leaves if isinstance(leaf, spaces.Box) and leaf.dtype.kind == "f" and not is_image(leaf)]
    threads = max(config.lanes // config.group, config.shards)

    if isinstance(config.algo, PPO):
        yield Rule("algo", ("surrogate",), config.schedule == "sync", "under schedule=sync both are the same")
    if isinstance(config.algo, APPO):
        yield Rule("algo", ("ratio_cap",), config.algo.surrogate == "acting", "it is for algo.surrogate=target")
    drawn = ("frames", "shapes_encoder", "variational", "beta")
    yield Rule("autoencoder", drawn, not config.autoencoder.weight, "autoencoder.weight is 0, so that nothing is drawn")
    names = ("max_lag", "stale", "refresh")
    yield Rule("", names, config.schedule != "async", f"they are for schedule=async, and this is {config.schedule}")
    yield Rule("env_options.atari", (), spec.family != "atari", f"{name} is no Atari game")
    yield Rule("env_options", ("score_key",), native, f"{name} is stepped by native threads, which give no info")
    idle = not place.env_workers and place.collectors != "process"
    yield Rule("env_options", ("timeout_seconds",), idle, "it is for processes: placement.env_workers or collectors")
    yield Rule("placement", ("env_threads",), not native, f"{name} is stepped in Python; see placement.env_workers")
    yield Rule("placement", ("env_workers",), native, f"{name} is stepped by native threads; see placement.env_threads")
    idle = not native and place.env_workers > config.num_envs
    yield Rule("placement", ("env_workers",), idle, f"only {config.num_envs} have an environment to step, by num_envs")
    yield Rule("placement", ("workers",), place.workers > threads, f"only {threads} have a lane or a shard to work on")
    yield Rule(
        "log", ("eval_episodes",), not config.log.eval_every, "log.eval_every is 0, so that nothing is evaluated"
    )

    if own_policy:
        yield Rule("net", (), True, "the policy is your own")
        return
    if own_torso:
        yield Rule("net", ("torso", "hidden", "activation"), True, "the torso is your own")
    else:
        yield Rule("net", ("torso",), not images, f"no observation of {name} is an image")
        seen = len(images) == len(leaves) and net.torso not in ("mlp", "auto")
        yield Rule("net", ("hidden", "activation"), seen, f"all that {name} shows are images, seen by {net.torso}")
    yield Rule("net", ("core_size",), net.core == "none", "net.core is none, so that there is no memory")
    continuous = isinstance(spec.action_space, spaces.Box)
    yield Rule("net", ("log_std_init",), not continuous, f"the actions of {name} are not continuous")
    own = f"{config.algo.name} has networks of its own for policy and values"
    yield Rule("net", ("share_torso", "log_std_init"), config.algo.replays and continuous, own)
    yield Rule("net", ("share_torso",), config.algo.replays and not continuous, "there is one network, that of Q")
    yield Rule("net", ("normalize_obs",), not floats, f"no observation of {name} is a vector of floats")


def _groups(config: Config) -> Mapping[str, object]:
    """The parts of a configuration that rules are about."""
    return {
        "": config,
        "algo": config.algo,
        "env_options": config.env_options,
        "env_options.atari": config.env_options.atari,
        "net": config.net,
        "autoencoder": config.autoencoder,
        "placement": config.placement,
        "log": config.log,
    }


def _changed(rule: Rule, given: object, preset: object) -> list[str]:
    """The settings of a rule that are not as in the preset, as `group.name=value`."""
    names = rule.names or vars(given)
    pairs = [(name, getattr(given, name)) for name in names]
    group = f"{rule.group}." if rule.group else ""
    return [f"{group}{name}={value}" for name, value in pairs if value != getattr(preset, name)]
