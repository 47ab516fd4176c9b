"""Who learns in a run: policy, learner, and a replay where the algorithm has one."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from torch import nn

from slipstream import memory, slab
from slipstream.algos import PPO
from slipstream.algos.algorithm import SlabAlgorithm
from slipstream.algos.replaying import Networks, ReplayAlgorithm
from slipstream.crew import Crew
from slipstream.learner import Learner
from slipstream.loader import Loader
from slipstream.nets.actor_critic import ActorCritic
from slipstream.nets.autoencoder import make_decoder
from slipstream.nets.check import check_policy
from slipstream.nets.policy import ActorCriticPolicy, Policy
from slipstream.objective import Differentiate, Hire, Recordings, alone, differentiated
from slipstream.reconstruction import Reconstruction
from slipstream.recording import recorder
from slipstream.rejects import Rejects
from slipstream.replay import rows
from slipstream.replay.mixer import Mixer
from slipstream.replay.options import ReplayOptions, UnrollReplay
from slipstream.replay.sharded import ShardedRows
from slipstream.replay.stored import Stored
from slipstream.replay.windows import Windows
from slipstream.replay_learner import ReplayLearner
from slipstream.rewards import TrainingReward
from slipstream.run.config import Config, ConfigError
from slipstream.run.machine import available_memory
from slipstream.tree import Tree
from slipstream.types import EnvSpec

_SHARE = 0.9
"""Of the free memory, what a replay may take."""


def make_learner(
    config: Config,
    spec: EnvSpec,
    torso: nn.Module | None,
    policy: ActorCriticPolicy | None,
    crew: Crew,
    loader: Loader,
    device: torch.device,
    hire: Hire = alone,
) -> Learner | ReplayLearner:
    """The learner that the algorithm wants, with a policy on `device`.

    Args:
        config: The configuration.
        spec: Spaces and slots.
        torso: The user's feature extractor, in place of `config.net.torso`.
        policy: The user's whole policy, in place of `config.net`.
        crew: Threads that differentiate.
        loader: Gathers minibatches.
        device: Where networks live.
        hire: Finds those who differentiate some of the shards.

    Raises:
        ValueError: If algorithm, environments and settings don't fit together.
        ConfigError: If there is no room for the replay, or the user's policy does not store what the algorithm wants.
    """
    algo = config.algo
    by_lane = device.type == "cpu" or config.reuses_forward
    shards = config.shards or (config.lanes // config.group if by_lane else 1)
    if algo.replays is True:
        if policy is not None:
            raise ConfigError(f"{algo.name} has a policy of its own kind: give torso=, not policy=")
        return _replay_learner(algo, config, spec, torso, shards, crew, loader, device, hire)
    if policy is None:
        policy = algo.make_policy(spec, config.net, torso, config.seed)
    else:
        check_policy(policy, spec)
        _require_params(algo, policy, spec)
        if config.reuses_forward:
            raise ConfigError(
                "algo.reuse_forward: a policy of your own does not keep its forwards; give torso=, or set it to false"
            )
    return _slab_learner(algo, config, spec, policy.to(device), shards, crew, loader, hire)


def _slab_learner(
    algo: SlabAlgorithm,
    config: Config,
    spec: EnvSpec,
    policy: ActorCriticPolicy,
    shards: int,
    crew: Crew,
    loader: Loader,
    hire: Hire,
) -> Learner:
    learner = Learner(
        algo,
        policy,
        crew,
        loader,
        num_envs=config.num_envs,
        shards=shards,
        total_steps=config.total_steps,
        seed=config.seed,
        reward=TrainingReward(config.reward, config.num_envs, algo.gamma),
        mixer=_mixer(algo.replay, config, spec, policy, loader) if algo.replay and algo.replay.proportion else None,
        reconstruction=_reconstruction(config, spec, policy) if config.autoencoder.weight else None,
        rejects=Rejects(config.skip_gradients),
        hire=hire,
        differentiate=_differentiate(config, policy, next(policy.parameters()).device),
    )
    learner.check(config.unroll)
    return learner


def _require_params(algo: SlabAlgorithm, policy: ActorCriticPolicy, spec: EnvSpec) -> None:
    """Refuses a user's own policy that does not store its distributions, for an algorithm that compares with them."""
    remembers = algo.replay is not None and algo.replay.remembers
    if remembers and "params" not in slab.layout(spec, policy, 1)["extras"]:
        raise ConfigError(
            "algo.replay.clone_policy and trust_region compare with the distribution that acted, which a policy of "
            "your own stores only if its act has distribution.params() in extras['params']; give torso= in place of "
            "policy=, or set both to 0"
        )


def _reconstruction(config: Config, spec: EnvSpec, policy: ActorCriticPolicy) -> Reconstruction:
    if not isinstance(policy, ActorCritic):
        raise ConfigError(
            "autoencoder.weight: a policy of your own does not tell what its heads see; give torso=, or set 0"
        )
    bfloat16 = config.net.precision == "bfloat16"
    decoder = make_decoder(spec, config.autoencoder, *policy.trunk.encoded, config.seed, bfloat16)
    return Reconstruction(decoder.to(next(policy.parameters()).device), config.seed)


def _mixer(options: UnrollReplay, config: Config, spec: EnvSpec, policy: ActorCriticPolicy, loader: Loader) -> Mixer:
    like = slab.layout(spec, policy, config.unroll)
    extras = tuple(like["extras"])
    layout = rows.layout(like, options.capacity, spec.frame_stack, ("log_prob", "version", "state0", *extras))
    least = _least_capacity(config, config.unroll, config.unroll, round(options.proportion * config.num_envs))
    shape = config.unroll, config.unroll
    windows = Windows(_stored(layout, like["obs"], config, spec, options, least, *shape), *shape)
    return Mixer(windows, config.num_envs, options.proportion, extras, loader.begin, config.seed)


def _replay_learner(
    algo: ReplayAlgorithm,
    config: Config,
    spec: EnvSpec,
    torso: nn.Module | None,
    shards: int,
    crew: Crew,
    loader: Loader,
    device: torch.device,
    hire: Hire,
) -> ReplayLearner:
    policy = algo.make_policy(spec, config.net, torso, config.seed)
    critic = algo.make_critic(spec, config.net, torso, config.seed)
    like = slab.layout(spec, policy, config.unroll)
    names = ("state0",) if policy.recurrent else ()
    layout = rows.layout(like, algo.replay.capacity, spec.frame_stack, names)
    stride = algo.stride(config.unroll)
    least = _least_capacity(config, algo.span, stride, algo.batch_size)
    stored = _stored(layout, like["obs"], config, spec, algo.replay, least, stride, algo.span)
    return ReplayLearner(
        algo,
        Networks(policy.to(device), critic.to(device)),
        Windows(stored, stride, algo.span, algo.replay.alpha),
        crew,
        loader,
        num_envs=config.num_envs,
        shards=shards,
        loss_dice=algo.loss_dice(spec),
        total_steps=config.total_steps,
        seed=config.seed,
        reward=TrainingReward(config.reward, config.num_envs, algo.gamma),
        rejects=Rejects(config.skip_gradients),
        hire=hire,
        differentiate=_differentiate(config, policy, device),
    )


def _differentiate(config: Config, policy: Policy, device: torch.device) -> Differentiate:
    """How the learner differentiates: by recordings, if what is recorded stays what it is.

    It does not for forwards that are kept or cut where episodes start, nor for a loss that changes with progress.
    """
    changes = isinstance(config.algo, PPO) and config.algo.anneal_clip
    wanted = config.placement.cuda_graphs and not (config.reuses_forward or policy.recurrent or changes)
    record = recorder(device, wanted)
    return differentiated if record is None else Recordings(device, record)


def replay_line(config: Config, replay: Stored) -> str:
    """What a run says of its replay at the start: how many rows, and what they take where."""
    options = config.algo.replay
    shards = config.placement.replay_shards
    where = f"on the disk of {config.log.dir}" if options and options.memory_map else "in memory, when it is full"
    where = f"in {shards} shard{'s' * (shards > 1)} on the Ray cluster" if shards else where
    return f"The replay keeps {replay.slots * replay.kept:,} rows: {_size_text(replay.bytes)} {where}."


def _size_text(size: int) -> str:
    """Bytes as GB, or as MB where they are few."""
    return f"{size / 1e9:.2f} GB" if size >= 10**8 else f"{size / 1e6:.2f} MB"


def _least_capacity(config: Config, span: int, stride: int, windows: int) -> int:
    """Rows in which so many windows of `span` rows that begin at every `stride`-th row have their place for sure."""
    return (span + 2 * config.unroll) * config.num_envs + windows * stride


def _stored(
    layout: Tree,
    obs: Tree,
    config: Config,
    spec: EnvSpec,
    options: ReplayOptions | UnrollReplay,
    least: int,
    stride: int,
    span: int,
) -> Stored:
    """Room for a replay of such windows: here, or in shards that are still to be started."""
    place = config.placement
    if not place.replay_shards:
        return rows.Rows(_allocated(layout, config, options, least), config.unroll, obs)
    if place.replay_shards > config.num_envs:
        raise ConfigError(
            f"placement.replay_shards={place.replay_shards}: each has the rows of some of the {config.num_envs} "
            f"environments; use {config.num_envs} at most"
        )
    if not place.address:  # a private cluster is this machine
        _require_room(layout, config, options, least)
    frames, shards = spec.frame_stack, place.replay_shards
    return ShardedRows(layout, config.unroll, obs, frames, shards, stride, span, place.restarts)


def _allocated(layout: Tree, config: Config, options: ReplayOptions | UnrollReplay, least: int) -> Tree:
    """Memory for a replay, after a look at whether there is enough."""
    _require_room(layout, config, options, least)
    if not options.memory_map:
        return rows.allocate(layout)
    try:
        with tempfile.TemporaryFile(dir=config.log.dir) as file:  # without a name, so that nothing is left behind
            return memory.share(file.fileno(), layout, reserve=True)
    except OSError as error:
        needed = _size_text(rows.size(layout))
        raise ConfigError(
            f"algo.replay.memory_map: the {needed} of algo.replay.capacity={options.capacity:,} can't be reserved on "
            f"the disk of {config.log.dir} ({error.strerror or error}); lower the capacity, or use --log.dir to keep "
            "runs elsewhere"
        ) from error


def _require_room(layout: Tree, config: Config, options: ReplayOptions | UnrollReplay, least: int) -> None:
    """Refuses a replay that there is no room for; fewer rows than `least` are not proposed."""
    capacity, needed = options.capacity, rows.size(layout)
    if options.memory_map:
        folder = Path(config.log.dir)
        folder.mkdir(parents=True, exist_ok=True)
        where, free = f"on the disk of {folder}", shutil.disk_usage(folder).free
    else:
        where, free = "in memory", available_memory()
    if free is not None and needed > _SHARE * free:
        fits = int(capacity * _SHARE * free / needed)
        ways = [f"--algo.replay.capacity {max(fits // 1000 * 1000, least)}"] if fits >= least else []
        ways.append(
            "--log.dir to keep runs elsewhere" if options.memory_map else "--algo.replay.memory-map to keep it on disk"
        )
        raise ConfigError(
            f"algo.replay.capacity={capacity:,} needs {_size_text(needed)}, and {_size_text(free)} are free {where}"
            + ("" if fits >= least else f", too little for the {least:,} rows that this run wants at least")
            + f"; use {', or '.join(ways)}"
        )
