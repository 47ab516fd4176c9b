"""`slipstream doctor`: what a step costs on this machine, where the time goes, and settings that are faster.

    stages      environment, inference, learning, each alone; their sum is the limit (`limit`)
    beside      what it costs to hand weights to collectors and to write a checkpoint; memory
    placement   the configuration trains under its own placement and under others; they never change the result
    schedule    the same for lanes, environments and schedules, which do
    cores       how fast it would be on more of them (`scale`)

Every trial is one short training. The fastest placement is compared with the configured one once more, in alternating
rounds, since other programs may have shared the machine.
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slipstream import tree
from slipstream.envs.make import native_threads
from slipstream.run import checkpoint, scale
from slipstream.run.config import Config, override
from slipstream.run.limit import Stages, learning_at_once, measure
from slipstream.run.machine import available_memory, cores, processor
from slipstream.run.speed import measure_speed
from slipstream.run.training import Training
from slipstream.weights import copy_into

Changes = Mapping[str, Any]
"""Settings by dotted key, over those of the configuration; empty for the configuration as it is."""

_FASTER = 1.05
"""Ratio from which on a trial counts as faster: less is noise."""
_WAITING = 0.5
"""Share of busy cores below which a run mostly waits."""

_ONE_THREAD = 0.85
"""Cores kept busy from which on one thread computes all the time, and the others wait for it, not for environments."""


@dataclass(frozen=True)
class Beside:
    """What is paid beside the three stages.

    Attributes:
        weights: Seconds to take a snapshot of the weights and to copy it into a collector's policy, once per update.
        checkpoint: Seconds to write a checkpoint to the disk of `log.dir`.
        checkpoint_bytes: Its size.
    """

    weights: float
    checkpoint: float
    checkpoint_bytes: int


@dataclass(frozen=True)
class Memory:
    """Bytes.

    Attributes:
        learner: Parameters, optimiser state and whatever else a checkpoint has.
        slabs: Rows between acting and learning.
        replay: All rows of the replay, when it is full; 0 for none.
        peak: The largest that this process has been, libraries and activations included.
        free: What the machine has left; None where nobody says.
    """

    learner: int
    slabs: int
    replay: int
    peak: int
    free: int | None


@dataclass(frozen=True)
class Trial:
    """A short training.

    Attributes:
        changes: What was changed.
        speed: Steps per second; a median where there were several rounds.
        busy: Share of the cores that it kept busy.
        refused: Why the changes can't be had; None if they can.
    """

    changes: Changes
    speed: float
    busy: float = 0.0
    refused: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found out.

    Attributes:
        stages: Costs of the stages alone, and the limit.
        beside: Other costs.
        memory: Memory.
        placements: Trials of placements, the configured one first.
        schedules: Trials of settings that change the result.
        proposal: The placement settings that were faster than the configured ones; empty if none were.
        gain: How many times as fast they were.
    """

    stages: Stages
    beside: Beside
    memory: Memory
    placements: Sequence[Trial]
    schedules: Sequence[Trial]
    proposal: Changes
    gain: float

    @property
    def efficiency(self) -> float:
        """Speed of the configured placement over the limit."""
        return self.placements[0].speed / self.stages.limit


def diagnose(config: Config, seconds: float, rounds: int, schedules: bool, tell: Callable[[str], None]) -> Diagnosis:
    """Measures everything, some twenty times `seconds`.

    Args:
        config: What is to be trained.
        seconds: Length of each measurement.
        rounds: Alternating rounds in which the best placement must win.
        schedules: Whether to try settings that change the result as well.
        tell: Told of everything as it is found, line by line.
    """
    here = {"placement.env_workers": 0, "placement.collectors": "thread", "placement.replay_shards": 0}
    in_process = override(config, here)
    tell(f"{config.algo.name} on {config.env}: {_shape(config)}")
    tell(f"on {processor()}, {cores()} cores" + _gpu(config))
    tell("\nstage, alone          seconds per 1,000 steps   share")
    stages = measure(in_process, seconds)
    for line in _stage_lines(stages):
        tell(line)
    beside, memory = _examine(in_process)
    for line in (*_beside_lines(config, beside), *_memory_lines(memory)):
        tell(line)

    tell("\nplacement (never changes the result)                  steps/s   of the limit")
    placements = list[Trial]()
    for changes in _placements(config):
        placements.append(trial := _try(config, changes, seconds))
        tell(_trial_line(trial, stages.limit))
    proposal, gain = _best(config, placements, seconds, rounds)
    tried = list[Trial]()
    if schedules:
        tell("\nschedule (changes the result)                         steps/s   as configured = 1")
        for changes in _schedules(config):
            tried.append(trial := _try(config, {**proposal, **changes}, seconds))
            tell(_trial_line(replace(trial, changes=changes), placements[0].speed))
    found = Diagnosis(stages, beside, memory, placements, tried, proposal, gain)
    for line in (*(() if stages.gpu else scale.table(config, stages)), *_verdict(config, found)):
        tell(line)
    return found


def _examine(config: Config) -> tuple[Beside, Memory]:
    """What is paid beside the stages, and what is kept in memory, from a run of two updates."""
    training = Training(learning_at_once(config))
    try:
        reports = iter(training)
        for _ in range(2):
            next(reports, None)
        learner = training.learner
        start = time.perf_counter()
        copy_into(training.policy, learner.weights().tensors)
        weights = time.perf_counter() - start
        tensors, facts = training.state()
        Path(config.log.dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=config.log.dir, prefix=".doctor-") as place:
            start = time.perf_counter()
            checkpoint.save(Path(place), learner.steps, checkpoint.copies(tensors), facts, training.spec)
            written = time.perf_counter() - start
            size = sum(file.stat().st_size for file in Path(place).rglob("*") if file.is_file())
        windows = learner.windows
        memory = Memory(
            learner=_bytes(tensors.values()),
            slabs=sum(_bytes(tree.leaves(vars(slab))) for slab in training.slabs),
            replay=0 if windows is None else windows.rows.bytes,
            peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            free=available_memory(),
        )
    finally:
        training.close()
    return Beside(weights, written, size), memory


def _placements(config: Config) -> Iterator[Changes]:
    """The placement as it is, and others that differ from it in one respect."""
    yield {}
    place, all_cores = config.placement, cores()
    most = max(config.lanes // config.group, config.shards)
    for workers in sorted({1, all_cores, 2 * all_cores}):
        if workers != (place.workers or all_cores) and (workers == 1 or workers <= most):
            yield {"placement.workers": workers}
    yield {"placement.loaders": 0 if place.loaders else 1}
    if native_threads(config.env):
        yield {"placement.env_threads": 0 if place.env_threads else 1}
    else:
        yield {"placement.env_workers": 0 if place.env_workers else all_cores}
    if config.lanes > config.group and place.device != "cuda" and not torch.cuda.is_available():
        here = {"placement.replay_shards": 0} if place.replay_shards else {}
        yield {"placement.collectors": "thread" if place.collectors == "process" else "process"} | here


def _schedules(config: Config) -> Iterator[Changes]:
    """Other lanes, environments and schedules; not all can be had."""
    for schedule in ("sync", "concurrent", "async"):
        if schedule != config.schedule:
            yield {"schedule": schedule}
    for lanes in (config.lanes // 2, config.lanes * 2):
        if lanes and config.num_envs % lanes == 0 and lanes % config.group == 0:
            yield {"lanes": lanes}
    yield {"num_envs": 2 * config.num_envs}


def _try(config: Config, changes: Changes, seconds: float) -> Trial:
    try:
        measured = measure_speed(override(config, dict(changes)), seconds)
    except ValueError as error:  # a ConfigError, or sizes that the algorithm can't share out
        return Trial(changes, 0.0, refused=str(error))
    return Trial(changes, measured.steps_per_second, measured.busy)


def _best(config: Config, trials: Sequence[Trial], seconds: float, rounds: int) -> tuple[Changes, float]:
    """All changes that were faster by themselves, if they still are together and in turn; and how much."""
    own = trials[0].speed
    faster = sorted((trial for trial in trials[1:] if trial.speed > own * _FASTER), key=lambda trial: trial.speed)
    merged: dict[str, Any] = {}
    for trial in faster:
        merged |= trial.changes
    candidates = [dict(faster[-1].changes), *([merged] if len(faster) > 1 else [])] if faster else []
    ratios: list[list[float]] = [[] for _ in candidates]
    for _ in range(rounds if candidates else 0):
        own = _try(config, {}, seconds).speed
        for found, changes in zip(ratios, candidates, strict=True):
            found.append(_try(config, changes, seconds).speed / own)
    gains = [statistics.median(found) for found in ratios]
    if not gains or max(gains) < _FASTER:
        return {}, 1.0
    return candidates[gains.index(max(gains))], max(gains)


def _verdict(config: Config, found: Diagnosis) -> Iterator[str]:
    """The bottleneck in words, and the proposals."""
    stages = found.stages
    costs = {"stepping environments": stages.env, "acting": stages.infer, "learning": stages.learn}
    name = max(costs, key=lambda stage: costs[stage])
    share = costs[name] / (max(costs.values()) if stages.gpu else sum(costs.values()))
    yield ""
    if stages.gpu:
        yield f"The slowest stage is {name}: no run here is faster than it."
    elif found.placements[0].busy < _WAITING:
        busy = found.placements[0].busy
        cause = "waiting" if busy * stages.cores < _ONE_THREAD else "one thread"
        yield f"Bottleneck: {cause}: as configured, the cores are busy for {busy:.0%} of the time. {_ADVICE[cause]}"
        yield f"Of the work that there is, {share:.0%} is {name}."
    else:
        yield f"Bottleneck: {name}, {share:.0%} of the work of a step. {_ADVICE[name]}"
    yield (
        f"As configured it reaches {found.efficiency:.2f} of the limit"
        + (": the rest is waiting, other programs, and what no stage has alone." if found.efficiency < 0.9 else ".")
    )
    if found.proposal:
        yield f"Faster placement, {found.gain:.2f} times when measured again in turn: {_typed(found.proposal)}"
    else:
        yield "No placement was faster than the configured one."
    own = found.placements[0].speed * found.gain
    for trial in sorted(found.schedules, key=lambda trial: -trial.speed):
        if trial.speed > own * _FASTER:
            changes = {key: value for key, value in trial.changes.items() if key not in found.proposal}
            yield f"Changes the result, {trial.speed / own:.2f} times as fast again: {_typed(changes)}"


_ADVICE = {
    "waiting": "The environments take their time without computing here: more of them, in more lanes (--num-envs, "
    "--lanes, --group), or --schedule concurrent, give the cores something to do meanwhile, and change the result.",
    "one thread": "While it computes, the others have nothing to do: there is one lane and one shard, or operations "
    "are so short that threads wait for Python's lock. A larger network or batch would use them; for a small one the "
    "fastest of the lines above is what there is, and a second run beside this one takes the idle cores.",
    "stepping environments": "More environments do not help; cheaper ones do, or more cores.",
    "acting": "Its cost is the network's; fewer and larger lanes make larger batches of it.",
    "learning": "Its cost is the network times the passes over each row: algo.epochs, net.torso and the size of images "
    "would lower it, and change the result; more cores would not.",
}


def _shape(config: Config) -> str:
    grouped = f", {config.group} of them per forward" if config.group > 1 else ""
    return (
        f"{config.num_envs} environments in {config.lanes} lanes{grouped}, unroll {config.unroll}, "
        f"schedule {config.schedule}"
    )


def _gpu(config: Config) -> str:
    used = config.placement.device != "cpu" and torch.cuda.is_available()
    return f" and {torch.cuda.get_device_name()}" if used else ""


def _stage_lines(stages: Stages) -> Iterator[str]:
    costs = {"environment": stages.env, "inference": stages.infer, "learning": stages.learn}
    for name, cost in costs.items():
        yield f"{name:20}  {1000 * cost:23.3f}   {cost / sum(costs.values()):5.0%}"
    if stages.gpu:
        yield f"limit: 1 / the slowest of them = {stages.limit:,.0f} steps/s"
    else:
        yield f"limit: {stages.cores} cores / their sum = {stages.limit:,.0f} steps/s"


def _beside_lines(config: Config, beside: Beside) -> Iterator[str]:
    rows = config.num_envs * config.unroll
    yield f"weights to collectors: {1000 * beside.weights:.2f} ms per update of {rows:,} rows"
    yield (
        f"checkpoint: {beside.checkpoint_bytes / 1e6:.1f} MB in {1000 * beside.checkpoint:.0f} ms, "
        f"every {config.log.checkpoint_every:,} steps"
    )


def _memory_lines(memory: Memory) -> Iterator[str]:
    parts = {"learner": memory.learner, "slabs": memory.slabs, "replay": memory.replay}
    said = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in parts.items() if size)
    free = "" if memory.free is None else f"; {memory.free / 1e9:.1f} GB are free"
    yield f"memory: {said}; this process, with libraries, at most {memory.peak / 1e6:,.0f} MB{free}"


def _trial_line(trial: Trial, reference: float) -> str:
    name = _typed(trial.changes) or "as configured"
    if trial.refused is not None:
        return f"{name:50}  not to be had: {trial.refused}"
    return f"{name:50}  {trial.speed:9,.0f}   {trial.speed / reference:12.2f}"


def _typed(changes: Changes) -> str:
    return " ".join(f"--{key.replace('_', '-')} {value}" for key, value in changes.items())


def _bytes(tensors: Any) -> int:
    return sum(leaf.nbytes for leaf in tensors if isinstance(leaf, Tensor))
