"""Settings that can't change anything in a run, and runs in which nothing can be learned any more.

They are said at the start, since whoever typed a setting expects something of it.

They are warnings: the run is the one that was asked for, and a file of settings may have been written for another
environment. What counts is that a setting differs from the preset, which nobody typed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from operator import attrgetter
from typing import NamedTuple

import torch
from gymnasium import spaces

from slipstream import tree
from slipstream.algos import APPO, C51, DQN, PPO, QRDQN, R2D2, SAC, Rainbow
from slipstream.envs.make import native_threads
from slipstream.learner import Learner
from slipstream.ops.spaces import feature_space, is_image
from slipstream.replay.options import ReplayOptions, UnrollReplay
from slipstream.replay_learner import ReplayLearner
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
    preset = configure(config.algo.name, config.env)
    for rule in _rules(config, spec, own_torso, own_policy):
        found = _changed(rule, config, preset) if rule.idle else []
        if found:
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            warnings.warn(f"no effect: {', '.join(found[:_SHOWN])}{more} ({rule.reason})", stacklevel=3)


def warn_unlearned(config: Config, learner: Learner | ReplayLearner) -> None:
    """Warns of a run with a replay that ends before its next gradient step, or has to wait for its first batch.

    Args:
        config: The run's settings.
        learner: Its learner, as it starts or resumes.
    """
    algo = config.algo
    if algo.replays is not True or not isinstance(learner, ReplayLearner):
        return
    starts, due = algo.replay.learning_starts, learner.due_at
    if due > config.total_steps:
        batch = f"algo.batch_size={algo.batch_size:,}"
        waits = batch if learner.waits_for_batch else f"algo.replay.learning_starts={starts:,}"
        warnings.warn(
            f"nothing will be learned up to total_steps={config.total_steps:,}: the next gradient step is due at step "
            f"{due:,}, by {waits} and algo.replay.ratio={algo.replay.ratio:g}; raise total_steps, or lower "
            f"{waits.partition('=')[0]}",
            stacklevel=3,
        )
    elif learner.waits_for_batch and not learner.steps:
        warnings.warn(
            f"the first gradient step waits until step {due:,}, for a batch of algo.batch_size={algo.batch_size:,}, "
            f"while actions are random up to algo.replay.learning_starts={starts:,} only; set that to {due}",
            stacklevel=3,
        )


def warn_slow_target(config: Config) -> None:
    """Warns of a distance between moves of the target that was typed for a copy, where the preset moves it by a part.

    Other libraries copy the target unless told otherwise, and with 0.01 of it every 1,000 steps hardly anything moves.
    """
    algo, usual = config.algo, configure(config.algo.name, config.env).algo
    learners = (DQN, C51, QRDQN, Rainbow, R2D2)
    if not isinstance(algo, learners) or not isinstance(usual, learners):
        return
    if algo.target_every > usual.target_every and algo.tau == usual.tau < 1:
        warnings.warn(
            f"every algo.target_every={algo.target_every:,} steps the target takes in algo.tau={algo.tau:g} of the "
            "network, by the preset: --algo.tau 1 copies it",
            stacklevel=3,
        )


def _rules(config: Config, spec: EnvSpec, own_torso: bool, own_policy: bool) -> Iterator[Rule]:
    place, net = config.placement, config.net
    on_cpu = place.device == "cpu" or not torch.cuda.is_available()
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
    yield from _rules_of_replays(config)
    drawn = ("frames", "shapes_encoder", "variational", "beta")
    yield Rule("autoencoder", drawn, not config.autoencoder.weight, "autoencoder.weight is 0, so that nothing is drawn")
    names = ("max_lag", "stale", "refresh")
    yield Rule("", names, config.schedule != "async", f"for schedule=async only, and this is {config.schedule}")
    yield Rule("", ("reduction",), place.learners == 1, "there is one learner, by placement.learners")
    yield Rule("env_options.atari", (), spec.family != "atari", f"{name} is no Atari game")
    yield Rule("env_options", ("score_key",), native, f"{name} is stepped by native threads, which give no info")
    idle = not place.env_workers and place.collectors not in ("process", "ray")
    yield Rule("env_options", ("timeout_seconds",), idle, "it is for processes: placement.env_workers or collectors")
    yield Rule("placement", ("env_threads",), not native, f"{name} is stepped in Python; see placement.env_workers")
    yield Rule("placement", ("env_workers",), native, f"{name} is stepped by native threads; see placement.env_threads")
    inline = place.collectors == "inline"
    yield Rule("placement", ("cuda_graphs",), on_cpu, "networks run on the CPU")
    kept = "forwards are kept for the gradient, by algo.reuse_forward"
    yield Rule("placement", ("cuda_graphs",), not on_cpu and config.reuses_forward, kept)
    idle = not on_cpu and place.collectors in ("process", "ray") and net.core != "none"
    yield Rule("placement", ("cuda_graphs",), idle, "acting is on the CPU, and gradients are of a network with memory")
    alone = place.collectors != "ray"
    yield Rule("placement", ("address",), alone, f"collectors are in no Ray cluster, but in {place.collectors}")
    idle = alone or config.schedule != "async"
    yield Rule("placement", ("ahead",), idle, "it is for collectors in a Ray cluster, under schedule=async")
    yield Rule("placement", ("loaders",), inline, "placement.collectors is inline, so that all is done in one thread")
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


def _rules_of_replays(config: Config) -> Iterator[Rule]:
    algo, replay = config.algo, config.algo.replay
    if isinstance(replay, UnrollReplay):
        idle = not replay.proportion
        yield Rule("algo.replay", ("capacity", "memory_map"), idle, "algo.replay.proportion is 0: nothing is replayed")
    if isinstance(replay, ReplayOptions):
        plain = "algo.replay.alpha is 0, so that there are no priorities"
        yield Rule("algo.replay", ("beta",), not replay.alpha, plain)
        if isinstance(algo, R2D2):
            yield Rule("algo", ("eta",), not replay.alpha, plain)
    if isinstance(algo, SAC):
        yield Rule("algo", ("target_entropy",), not algo.adapt_alpha, "algo.adapt_alpha is off: alpha stays as it is")
    if isinstance(algo, Rainbow):
        yield Rule("algo", ("sigma0",), not algo.noisy, "algo.noisy is off, so that no layer is noisy")
        noise = "with algo.noisy epsilon is 0 once learning has begun"
        yield Rule("algo.exploration", ("final", "least", "steps"), algo.noisy, noise)


def _changed(rule: Rule, config: Config, preset: Config) -> list[str]:
    """The settings of a rule that are not as in the preset, as `group.name=value`."""
    given, usual = (attrgetter(rule.group)(each) if rule.group else each for each in (config, preset))
    names = rule.names or vars(given)
    pairs = [(name, getattr(given, name)) for name in names]
    group = f"{rule.group}." if rule.group else ""
    return [f"{group}{name}={value}" for name, value in pairs if value != getattr(usual, name)]
