"""The verbs that measure and compare: `verify`, `doctor` and `bench`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from slipstream.algos import ALGORITHMS
from slipstream.envs import EnvError
from slipstream.run import record, settings
from slipstream.run.bench import bench, outline, table, variants
from slipstream.run.config import CALLABLE, Config, override
from slipstream.run.directory import merge_yaml
from slipstream.run.doctor import diagnose
from slipstream.run.limit import measure
from slipstream.run.machine import surroundings
from slipstream.run.options import BenchFlags, DoctorFlags, VerifyFlags
from slipstream.run.plan import plan
from slipstream.run.settings import ConfigError
from slipstream.run.typed import algorithm_of, configuration, file_of, settings_and, settings_of
from slipstream.run.verify import verify

Tell = Callable[[str], None]


def verify_verb(words: list[str], tell: Tell, announce: Tell) -> int:
    """`slipstream verify`; 0 if all placements gave the same bits. What is going to be run is announced."""
    file = file_of(words)
    base = settings_of(file) if file else {}
    algo, words = algorithm_of(words, base)
    chosen, values = settings_and(VerifyFlags, "verify", [algo], words)
    config = configuration(algo, base, values, chosen.system, "verify")
    refuse_callable(config, file)
    outcomes = verify(config, chosen.updates, chosen.placements, chosen.delay)
    tell(f"{algo} on {config.env}, schedule {config.schedule}, lanes {config.lanes}, {chosen.updates} updates")
    steps = chosen.updates * config.num_envs * config.unroll
    announce(f"runs: {1 + len(chosen.placements)}, {chosen.updates} updates ({steps:,} steps) each")
    different = refused = 0
    for number, outcome in enumerate(outcomes):
        same = "the reference" if number == 0 else "identical"
        verdict = f"{same}, {outcome.updates} updates, {outcome.digest}"
        if outcome.refused is not None:
            verdict = f"not to be had: {outcome.refused}"
            refused += 1
        if outcome.difference:
            verdict = f"DIFFERS: {outcome.difference}"
            different += 1
        tell(f"{outcome.placement:10}  {verdict}")
    if refused == len(chosen.placements):
        raise ConfigError("nothing was compared: none of the placements is to be had for this configuration")
    if different:
        raise EnvError(
            f"{different} of {len(chosen.placements)} placements give another run than inline; where an observation or "
            f"a reward is the first that differs, see whether the environment itself repeats: slipstream check-env "
            f"{config.env}"
        )
    return 0


def doctor_verb(words: list[str], tell: Tell) -> int:
    """`slipstream doctor`."""
    file = file_of(words)
    base = settings_of(file) if file else {}
    named = bool(words) and not words[0].startswith("--") and words[0] not in ALGORITHMS
    env, words = (words[:1], words[1:]) if named else ([], words)
    algo, words = algorithm_of(words, {"algo.name": "ppo", **base})
    chosen, values = settings_and(DoctorFlags, "doctor", [algo], [*words, *(f"--env={id}" for id in env)])
    if "env" not in {**base, **values}:
        raise ConfigError("ENV is missing: slipstream doctor ENV [--algo ALGO] (slipstream envs lists them)")
    config = configuration(algo, base, values, chosen.system)
    refuse_callable(config, file)
    if chosen.plan:
        tell(f"{algo} on {config.env}: measuring what a step costs here")
        here = override(config, {"placement.env_workers": 0, "placement.collectors": "thread"})
        for line in plan(config, measure(here, chosen.seconds), chosen.plan, chosen.gigabits):
            tell(line)
        return 0
    found = diagnose(config, chosen.seconds, chosen.rounds, chosen.schedules, tell)
    if chosen.apply:
        place = override(config, found.proposal).placement
        merge_yaml(Path(chosen.apply), {"placement": settings.plain(place)})
        tell(
            f"written:   {chosen.apply}\nuse:       slipstream train {algo} --env {config.env} --config {chosen.apply}"
        )
    return 0


def bench_verb(words: list[str], tell: Tell, announce: Tell) -> int:
    """`slipstream bench`; what is going to be measured is announced."""
    file = file_of(words)
    base = settings_of(file) if file else {}
    count = next((place for place, word in enumerate(words) if word.startswith("--")), len(words))
    algos, words = words[:count] or [str(base.get("algo.name", ""))], words[count:]
    chosen, values = settings_and(BenchFlags, "bench", algos, words)
    configs = [configuration(algo, base, values, chosen.system, "bench") for algo in algos]
    refuse_callable(configs[0], file)
    measured = variants(configs, chosen.schedules, chosen.placements)
    if not measured:
        raise ConfigError(f"none of the schedules {', '.join(chosen.schedules)} is for {', '.join(algos)}")
    lengths = chosen.rounds, chosen.seconds, chosen.seconds / 4
    announce(outline(measured, *lengths))
    result = bench(measured, *lengths, tell)
    tell(table(result))
    if chosen.output:
        device = "cuda" if configs[0].placement.device != "cpu" and torch.cuda.is_available() else "cpu"
        said = {**record.made(["slipstream", "bench", *algos, *words], surroundings(), device), "env": configs[0].env}
        record.save({**said, **result}, Path(chosen.output))
    return 0


def refuse_callable(config: Config, file: Path | None) -> None:
    """Refuses a file of settings whose environment only Python knows."""
    if config.env.startswith(CALLABLE):
        name = config.env.removeprefix(CALLABLE)
        raise ConfigError(f"{file} is for the Python callable {name}, which the command line can't know; add --env ENV")
