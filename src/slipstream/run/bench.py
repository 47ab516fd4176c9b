"""`slipstream bench`: how fast algorithms train under schedules and placements, and how fast they could.

    for each round:
        for each algorithm: environment, inference and gradient alone (`limit`), whose sum is the limit
            for each schedule and placement: a short training, in turn
    once for each algorithm: a fresh process, from its launch to the first 1,000 steps; what it holds at most

What counts are ratios of two speeds of one round, since other programs share the machine; medians over the rounds.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from slipstream.run import settings
from slipstream.run.config import Config, Placement
from slipstream.run.console import clock
from slipstream.run.limit import STAGES, Stages, measure
from slipstream.run.speed import measure_speed
from slipstream.run.verify import placement_of

AS_CONFIGURED = "default"
"""The placement that the configuration has."""


@dataclass(frozen=True)
class Variant:
    """What is trained.

    Attributes:
        name: As printed: algorithm, schedule and placement.
        algo: Algorithm.
        config: The whole configuration.
    """

    name: str
    algo: str
    config: Config


def variants(configs: Sequence[Config], schedules: Sequence[str], placements: Sequence[str]) -> list[Variant]:
    """Every combination that can be had.

    Args:
        configs: One per algorithm.
        schedules: Schedules; the configuration's own if empty. Those that an algorithm can't have are left out.
        placements: `default`, or as of `verify`.

    Raises:
        ConfigError: A placement is none.
    """
    found = list[Variant]()
    for config in configs:
        for schedule in schedules or (config.schedule,):
            for name in placements:
                own = config.placement if name == AS_CONFIGURED else placement_of(name, config.placement)
                try:
                    variant = replace(config, schedule=schedule, placement=own)  # pyright: ignore[reportArgumentType]
                except ValueError:
                    continue
                place = _configured(own) if name == AS_CONFIGURED else name
                found.append(Variant(f"{config.algo.name} {schedule} {place}", config.algo.name, variant))
    return found


def outline(chosen: Sequence[Variant], rounds: int, seconds: float, stage_seconds: float) -> str:
    """What `bench` of the same arguments measures, and for how long."""
    stages = STAGES * len({variant.algo for variant in chosen})
    whole = rounds * (len(chosen) * seconds + stages * stage_seconds)
    return (
        f"rounds: {rounds}; in each, trainings: {len(chosen)}, {seconds:g} s long, and stages: {stages}, "
        f"{stage_seconds:g} s long; {clock(whole)} in all, and what starting takes"
    )


def bench(
    chosen: Sequence[Variant], rounds: int, seconds: float, stage_seconds: float, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Measures all variants.

    Args:
        chosen: From `variants`.
        rounds: How often each is measured.
        seconds: Length of a training.
        stage_seconds: Length of the measurement of a stage.
        tell: Told of every measurement.

    Returns:
        `stages` by algorithm (CPU-seconds per step, steps per second of each stage alone on one core, and the limit),
        `variants` by name (steps per second, the limit, efficiency, ratio to the first variant of the same algorithm),
        `process` by algorithm (seconds to the first 1,000 steps, MB at most), all medians; and `rounds`, as measured.
    """
    stages: dict[str, list[Stages]] = {variant.algo: [] for variant in chosen}
    speeds: dict[str, list[float]] = {variant.name: [] for variant in chosen}
    for number in range(rounds):
        for algo, found in stages.items():
            config = next(variant.config for variant in chosen if variant.algo == algo)
            thread = replace(config.placement, collectors="thread", env_workers=0, replay_shards=0)
            found.append(measure(replace(config, placement=thread), stage_seconds))
            tell(f"round {number + 1}  {algo}: limit {found[-1].limit:,.0f} steps/s")
            for variant in (each for each in chosen if each.algo == algo):
                speed = measure_speed(variant.config, seconds).steps_per_second
                speeds[variant.name].append(speed)
                tell(f"round {number + 1}  {variant.name}: {speed:,.0f} steps/s")
    process = {algo: _process(next(each.config for each in chosen if each.algo == algo)) for algo in stages}
    return {
        "stages": {algo: _median(found) for algo, found in stages.items()},
        "variants": {variant.name: _summary(variant, chosen, speeds, stages) for variant in chosen},
        "process": process,
        "rounds": {"stages": {algo: [s.metrics() for s in found] for algo, found in stages.items()}, "speeds": speeds},
    }


def table(result: Mapping[str, Any]) -> str:
    """What `bench` returned, as Markdown."""
    lines = [
        "| alone, per 1,000 steps | environment | inference | learning | limit, steps/s |",
        "|---|---|---|---|---|",
    ]
    for algo, row in result["stages"].items():
        costs = [f"{1000 * row[f'limit/{stage}_seconds_per_step']:.3f} s" for stage in ("env", "infer", "learn")]
        lines.append(f"| {algo} | {' | '.join(costs)} | {row['limit/steps_per_second']:,.0f} |")
    lines += ["", "| trained | steps/s | of the limit | of the first |", "|---|---|---|---|"]
    for name, row in result["variants"].items():
        cells = f"{row['steps_per_second']:,.0f} | {row['efficiency']:.2f} | {row['of_first']:.2f}"
        lines.append(f"| {name} | {cells} |")
    lines += ["", "| a fresh process | seconds to 1,000 steps | MB at most |", "|---|---|---|"]
    for algo, row in result["process"].items():
        lines.append(f"| {algo} | {row['startup_seconds']:.1f} | {row['peak_mb']:,.0f} |")
    return "\n".join(lines)


def _configured(placement: Placement) -> str:
    """Name of the configured placement: `default`, and what of it is not, but for the device, which all have."""
    usual = settings.plain(Placement(device=placement.device))
    own = [f"{key}={value}" for key, value in settings.plain(placement).items() if value != usual[key]]
    return " ".join([AS_CONFIGURED, *own])


def _summary(
    variant: Variant, chosen: Sequence[Variant], speeds: Mapping[str, list[float]], stages: Mapping[str, list[Stages]]
) -> dict[str, float]:
    own, limits = speeds[variant.name], [found.limit for found in stages[variant.algo]]
    first = speeds[next(each.name for each in chosen if each.algo == variant.algo)]
    return {
        "steps_per_second": statistics.median(own),
        "limit": statistics.median(limits),
        "efficiency": statistics.median(a / b for a, b in zip(own, limits, strict=True)),
        "of_first": statistics.median(a / b for a, b in zip(own, first, strict=True)),
    }


def _median(found: Sequence[Stages]) -> dict[str, float]:
    rows = [stages.metrics() for stages in found]
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def _process(config: Config) -> dict[str, float]:
    """What a fresh process says of its start and its memory."""
    program = [sys.executable, "-m", "slipstream.run.start", json.dumps(settings.plain(config))]
    said = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    return json.loads(said.splitlines()[-1])
