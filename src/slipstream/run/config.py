"""The configuration of a run: everything that its result and its speed depend on, in one frozen dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from slipstream.algos import ALGORITHMS
from slipstream.algos.replaying import AnyAlgorithm
from slipstream.envs import EnvOptions
from slipstream.nets.autoencoder import AutoEncoder
from slipstream.nets.trunk import Network
from slipstream.replay.options import UnrollReplay
from slipstream.rewards import RewardTransform
from slipstream.run import settings
from slipstream.run.settings import ConfigError
from slipstream.schedules.parts import Stale
from slipstream.team import Reduction

CALLABLE = "callable:"
"""What `Config.env` starts with where the environment is a Python callable."""


@dataclass(frozen=True)
class Placement:
    """Where the work runs: it decides the speed of a run, never its result.

    Attributes:
        collectors: Who collects: threads; processes, each with its own environments and policy, on the CPU; the same in
            actors of a Ray cluster (ray); or the learner's own thread (inline), for debugging.
        workers: Threads or processes that act, at most one per lane, and threads that differentiate, each with one math
            thread; 0 for one per core. With ray the actors, 0 for one per lane; threads differentiate on every core.
        address: Of the Ray cluster, `auto` or `host:port`, for collectors in ray; without one the run starts a cluster
            of its own on this machine.
        ahead: Unrolls that a collector in ray is told of before the one under way is done, under async, so that it need
            not wait for an answer between two.
        learners: Processes that share the shards, this one among them; the others differentiate theirs, this one adds
            the gradients and applies the sum. Workers are shared out among them. What `reduction` says decides whether
            they change a bit.
        replay_shards: Actors of the Ray cluster that hold the replay, each the rows of some slots, for replays larger
            than one machine's memory; 0 to have it in this process.
        loaders: Threads that gather minibatches (and copy them to a GPU) ahead of the learner; 0 to gather each when it
            is needed, as with collectors inline.
        env_workers: Processes that step environments of this machine's Python; 0 to step them where they are acted in.
            Collector processes share them out, and have one each at least.
        env_threads: Threads of native environments (ALE, EnvPool), per lane; 0 lets them choose.
        restarts: How often in a row, with less than 100 rows between, environments that raised, died or hung, or took
            their collector process with them, are made anew and brought back to where they were, which changes no bit
            of the result; 0 ends the run at once, as does one that fails the same way at the same place again.
        device: Where networks run; auto is the GPU if there is one.
        cuda_graphs: Whether the forwards of acting on a GPU, and the gradients of a network without memory, are
            recorded once for each size and replayed, one launch in place of one per kernel. Gradients through the
            forwards of acting (algo.reuse_forward) and those of PPO with anneal_clip are not.
    """

    collectors: Literal["inline", "thread", "process", "ray"] = "thread"
    workers: int = 0
    address: str = ""
    ahead: int = 1
    learners: int = 1
    replay_shards: int = 0
    loaders: int = 1
    env_workers: int = 0
    env_threads: int = 0
    restarts: int = 3
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        _at_least(
            self,
            0,
            "workers",
            "ahead",
            "replay_shards",
            "loaders",
            "env_workers",
            "env_threads",
            "restarts",
            prefix="placement.",
        )
        _at_least(self, 1, "learners", prefix="placement.")


@dataclass(frozen=True)
class Log:
    """What a run writes down. All distances are in steps, so that two runs write the same rows.

    Attributes:
        dir: Directory of all runs.
        tensorboard: Whether to write TensorBoard events beside metrics.jsonl.
        metrics_every: Steps between two rows of metrics.
        console_every: Steps between two lines when the output is not a terminal; 0 for a twentieth of the run, at most
            100,000.
        checkpoint_every: Steps between two checkpoints; one is also written after every evaluation, at the end and on
            Ctrl-C. 0 for a tenth of the run, but at least 1,000 and at most 50,000.
        keep_last: Newest checkpoints to keep; the best one is kept beside them: by its evaluation, or by the mean
            return of the last 100 training episodes in a run that does not evaluate.
        keep_every: Distance in steps at which checkpoints are kept for good, without their replays; 0 for none.
        save_replay: Whether checkpoints hold the replay: each writes what is new since the last one, and the disk holds
            as many bytes as the memory. Without it a resumed run fills a new one.
        eval_every: Steps between two evaluations; 0 for none.
        eval_episodes: Episodes of each evaluation.
        stall_seconds: Without an update for so long, the run says where its threads are; 0 for never.
    """

    dir: str = "runs"
    tensorboard: bool = True
    metrics_every: int = 1_000
    console_every: int = 0
    checkpoint_every: int = 0
    keep_last: int = 2
    keep_every: int = 0
    save_replay: bool = True
    eval_every: int = 0
    eval_episodes: int = 10
    stall_seconds: float = 120.0

    def __post_init__(self) -> None:
        _at_least(
            self, 0, "console_every", "checkpoint_every", "keep_every", "eval_every", "stall_seconds", prefix="log."
        )
        _at_least(self, 1, "metrics_every", "keep_last", "eval_episodes", prefix="log.")


@dataclass(frozen=True)
class Config:
    """One run. With the device kind and library versions, all but `placement` and `log` decide its bits.

    Attributes:
        env: Environment: a Gymnasium id (`ALE/Pong-v5`), `envpool:ID`, or the name that stands for a Python callable.
        algo: Algorithm with its hyperparameters.
        seed: The one seed that everything random grows from.
        total_steps: Agent decisions to train for, rounded up to whole updates; those that are dropped count as well.
        stop_at_return: Mean raw return of the last 100 training episodes at which the run ends early; none for never.
        num_envs: Environments (slots) stepped in parallel.
        unroll: Rows per environment between two updates (T).
        lanes: Fixed sets of environments that step together; divides `num_envs`.
        group: Lanes that are inferred as one batch, by whichever of them are ready, so that small lanes of environments
            with varying step times need not wait for each other; divides `lanes`. 1: every lane on its own.
        shards: Parts whose gradients are summed in fixed order; 0 for one per group of lanes on a CPU and 1 on a GPU.
        reduction: How the gradients of several learners are added: ordered, shard by shard in their order, to the bits
            of one learner; all_reduce, by torch.distributed as it finds it fastest, to the same sum but for rounding;
            asynchronous, not at all: each learner has minibatches of its own, and gradients are applied as they come.
        schedule: Who runs when; sync acts and learns in turn, with no lag; concurrent does both at once, with weights
            exactly one update old (HTS-RL); async lets collectors run ahead freely (IMPALA), up to `max_lag`.
        max_lag: Updates by which rows may be older than the learner; for schedule async.
        stale: What happens to rows that would be older: collectors wait, or the rows are dropped, which the metric
            lag/dropped_steps counts; for schedule async.
        refresh: When collectors take over new weights, before every unroll or before every row; for schedule async.
        reward: Transform of the reward that is learned from (clip: to [-1, 1]; sign; scale: by the running deviation of
            the return). Reported returns are always raw.
        skip_gradients: How many gradient steps in a row may be left out because the gradient is not finite; one more
            ends the run. What they came from is written to `faults/` in the run's directory.
        exact_resume: Whether environments that can't be brought back to where they were (EnvPool, vector environments
            of your own) start new episodes at every checkpoint, so that a run that is stopped and resumed is the run
            that was not. No episode is longer than `log.checkpoint_every / num_envs` steps then, and a run that is told
            to stop goes on from its last checkpoint. Others go on exactly anyway.
        net: Network.
        autoencoder: Reconstruction of images beside the loss of an actor-critic.
        env_options: Options of the environment.
        placement: Where the work runs.
        log: What is written down.
    """

    env: str
    algo: AnyAlgorithm
    seed: int = 1
    total_steps: int = 1_000_000
    stop_at_return: float | None = None
    num_envs: int = 8
    unroll: int = 128
    lanes: int = 1
    group: int = 1
    shards: int = 0
    reduction: Reduction = "ordered"
    schedule: Literal["sync", "concurrent", "async"] = "sync"
    max_lag: int = 4
    stale: Stale = "wait"
    refresh: Literal["unroll", "row"] = "unroll"
    reward: RewardTransform = "raw"
    skip_gradients: int = 0
    exact_resume: bool = False
    net: Network = field(default_factory=Network)
    autoencoder: AutoEncoder = field(default_factory=AutoEncoder)
    env_options: EnvOptions = field(default_factory=EnvOptions)
    placement: Placement = field(default_factory=Placement)
    log: Log = field(default_factory=Log)

    def __post_init__(self) -> None:
        _at_least(self, 0, "seed", "shards", "skip_gradients")
        _at_least(self, 1, "total_steps", "num_envs", "unroll", "lanes", "group", "max_lag")
        _divides(self, "lanes", "num_envs")
        _divides(self, "group", "lanes")
        if self.shards:
            _divides(self, "shards", "num_envs")
        _covers(self)

    @property
    def reuses_forward(self) -> bool:
        """Whether the gradient goes back through the forwards of acting."""
        return self.algo.replays is False and self.algo.reuse_forward


def algorithm(name: str) -> type[AnyAlgorithm]:
    """The algorithm called `name`.

    Raises:
        ConfigError: If there is none; it names the nearest.
    """
    if name not in ALGORITHMS:
        raise ConfigError(f"unknown algorithm {name!r}.{settings.nearest(name, ALGORITHMS)}")
    return ALGORITHMS[name]


def known_settings(algo: str) -> dict[str, Any]:
    """Every dotted key of a configuration of this algorithm, and its type."""
    return settings.keys(Config, algo=algorithm(algo))


def from_plain(values: Mapping[str, Any]) -> Config:
    """A configuration from the nested mapping that `plain` and config.yaml have; `algo.name` chooses the algorithm.

    Raises:
        ConfigError: For an unknown key, a value of the wrong type, or settings that contradict each other.
    """
    chosen = values.get("algo")
    name = chosen.get("name") if isinstance(chosen, Mapping) else None
    if not isinstance(name, str):
        raise ConfigError(f"algo.name is missing. Known: {', '.join(sorted(ALGORITHMS))}.")
    return settings.build(Config, values, algo=algorithm(name))


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config` with other values at some keys (dotted or nested).

    Raises:
        ConfigError: As `from_plain`.
    """
    values = settings.flatten(settings.plain(config)) | settings.flatten(changes)
    return from_plain(settings.nest(values))


def _at_least(owner: object, least: int, *names: str, prefix: str = "") -> None:
    for name in names:
        value = getattr(owner, name)
        if value < least:
            raise ConfigError(f"{prefix}{name} must be at least {least}, got {value}")


def _covers(config: Config) -> None:
    """Refuses an algorithm whose correction does not cover the schedule's lag."""
    name, most = config.algo.name, config.algo.max_lag
    if config.schedule == "async" and most is not None:
        raise ConfigError(
            f"{name} can't learn from rows of just any older policy, as schedule=async gives them; use "
            "--schedule concurrent, or an algorithm with V-trace (appo, impala)"
        )
    if config.schedule == "concurrent" and most == 0:
        raise ConfigError(
            f"{name} can't learn from rows of an older policy, as schedule=concurrent gives them; use sync"
        )
    if config.autoencoder.weight and config.algo.replays:
        raise ConfigError(
            f"autoencoder.weight is for actor-critics (ppo, a2c, impala, appo), not for {name}; set it to 0"
        )
    if config.exact_resume and config.schedule == "async":
        raise ConfigError("exact_resume: under schedule=async no two runs are the same; use sync or concurrent")
    if config.reuses_forward:
        if config.group > 1:
            raise ConfigError("algo.reuse_forward keeps the forwards of lanes, not of groups of them: use --group 1")
        if config.shards not in (0, config.lanes):
            raise ConfigError(
                f"algo.reuse_forward differentiates lane by lane: with {config.lanes} lanes use --shards "
                f"{config.lanes}, or 0"
            )
    replayed = config.algo.replays or (isinstance(config.algo.replay, UnrollReplay) and config.algo.replay.proportion)
    if config.schedule == "async" and config.stale == "drop" and replayed:
        raise ConfigError(
            f"{name} with a replay learns from rows of any age, there is nothing to drop; use --stale wait"
        )
    if not config.net.latent_from_rl and not (config.autoencoder.weight and config.autoencoder.shapes_encoder):
        raise ConfigError(
            "net.latent_from_rl=False leaves the torso to an auto-encoder, and there is none that shapes it: set "
            "autoencoder.weight and shapes_encoder, or net.latent_from_rl true"
        )
    if not config.net.latent_from_rl and not config.net.share_torso:
        raise ConfigError("net.latent_from_rl=False would leave the values' own torso untrained: set net.share_torso")
    if config.placement.learners > 1 and config.placement.collectors == "inline":
        raise ConfigError(
            "placement.learners: with --placement.collectors inline everything is done in one thread; use thread"
        )
    if config.placement.replay_shards:
        if config.placement.collectors != "ray":
            raise ConfigError(
                "placement.replay_shards are actors of the Ray cluster that collects: use --placement.collectors ray, "
                "or 0 to have the replay in this process"
            )
        if not replayed:
            raise ConfigError(f"placement.replay_shards: {name} has no replay here; use 0")
        if config.algo.replay and config.algo.replay.memory_map:
            raise ConfigError(
                "algo.replay.memory_map keeps the replay on the disk of this machine, and placement.replay_shards in "
                "the memory of others; use one of them"
            )


def _divides(config: Config, part: str, whole: str) -> None:
    parts, total = getattr(config, part), getattr(config, whole)
    if total % parts:
        fits = min((value for value in range(1, total + 1) if total % value == 0), key=lambda value: abs(value - parts))
        more = -(-total // parts) * parts
        raise ConfigError(
            f"{part}={parts} must divide {whole}={total}; nearest that fit: {part}={fits}, or {whole}={more}"
        )


__all__ = [
    "CALLABLE",
    "Config",
    "ConfigError",
    "Log",
    "Placement",
    "algorithm",
    "from_plain",
    "known_settings",
    "override",
]
