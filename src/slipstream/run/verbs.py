"""The verbs of the command line. An error is one clear message, the last line, and a non-zero exit code."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro
import yaml

from slipstream.algos import ALGORITHMS
from slipstream.envs import EnvError, check_env, list_envs
from slipstream.envs.toy import settings_line
from slipstream.replay.sharded import ShardLostError
from slipstream.run import flags, loop, presets, settings, video
from slipstream.run.agent import load
from slipstream.run.config import Config
from slipstream.run.console import Lasting, clock, return_text
from slipstream.run.directory import latest, to_yaml
from slipstream.run.files import CheckpointError
from slipstream.run.loop import Own, Trained
from slipstream.run.measuring import bench_verb, doctor_verb, refuse_callable, verify_verb
from slipstream.run.names import alias_lines
from slipstream.run.options import (
    BenchFlags,
    CheckOptions,
    DoctorFlags,
    EnvsOptions,
    EvalOptions,
    ResumeOptions,
    TrainFlags,
    VerifyFlags,
    WatchOptions,
)
from slipstream.run.settings import ConfigError
from slipstream.run.signals import Interrupted
from slipstream.run.systems import SYSTEMS
from slipstream.run.typed import algorithm_of, configuration, file_of, resumed, settings_and, settings_of
from slipstream.team_group import LearnerError

_USAGE = """\
slipstream: fast parallel deep reinforcement learning

  slipstream train ALGO --env ENV [--total-steps 2e6] [--seed 1] [--algo.lr 3e-4] ...   train a new run
  slipstream resume RUN [--total-steps 4e6]     train a run on from its newest checkpoint
  slipstream resume --latest runs               the same for the newest run in there, in jobs that may be stopped
  slipstream eval RUN [--episodes 30]           mean return over whole episodes
  slipstream watch RUN                          video of an episode
  slipstream envs [WORD]                        environments, by family
  slipstream algos                              algorithms
  slipstream presets [ALGO] [FAMILY|ENV]        tuned settings
  slipstream check-env ENV                      test an environment for the contract
  slipstream doctor ENV [--algo ppo]            what a step costs here, the bottleneck, a faster placement
  slipstream bench ALGO... --env ENV ...        steps per second by schedule and placement, and the limit
  slipstream verify ALGO --env ENV ...          prove that placement and timing change no bit of a run

`slipstream VERB --help` lists the flags of a verb; --debug shows the traceback of an error; --version.
"""

_TRAIN_USAGE = """\
usage: slipstream train ALGO --env ENV [FLAGS]

A new run from the tuned preset of (ALGO, ENV), with the flags over it.

  ALGO                 {algorithms}
  --env ENV            environment; `slipstream envs` lists them
  --total-steps 2e6    agent decisions to train for
  --seed 1             the one seed that everything random grows from
  --config FILE|RUN    settings between preset and flags: a YAML file with any of them, or all those of an earlier run
  --system hts         the schedule of a published system, under the flags: {systems}
  --print-config       print the whole configuration and stop
  --algo.lr 3e-4 ...   any other setting: `slipstream train ALGO --env ENV --help` lists them with the defaults for ENV

{aliases}
"""

_TAKES = {"verify": "verify ALGO --env ENV", "doctor": "doctor ENV [--algo ALGO]", "bench": "bench ALGO... --env ENV"}
"""What a verb is followed by, where its options don't say."""

_EXPECTED = (
    ConfigError,
    CheckpointError,
    EnvError,
    LearnerError,
    ShardLostError,
    ValueError,
    ImportError,
    OSError,
    FloatingPointError,
)
"""Errors whose message says all; anything else is a bug in Slipstream and shows its traceback."""

_out = Lasting(soft_wrap=True, highlight=False, markup=False, emoji=False)
_error = Lasting(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


def run(words: Sequence[str]) -> int:
    """Runs one command and returns its exit code, as `cli.main` has it.

    Args:
        words: What was typed after `slipstream`.
    """
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return _dispatch(words)
        except Interrupted as stop:
            _error.print(f"slipstream: {stop}")
            return 128 + stop.signal
        except KeyboardInterrupt as stop:
            _error.print("\n".join(["slipstream: interrupted", *getattr(stop, "__notes__", [])]))
            _leave_hanging_threads(130)
            return 130
        except BrokenPipeError:  # the reader of our output has seen enough, as in `slipstream envs | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        except Exception as error:  # noqa: BLE001 - the one place where errors become messages
            return _report(error, debug)


def _leave_hanging_threads(code: int) -> None:
    """Ends the program here if a worker hangs in an environment: an orderly end might wait for it for ever."""
    if any(thread.name.startswith("slipstream-") for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _dispatch(words: list[str]) -> int:
    verb, *rest = words or ["--help"]
    if verb == "--version":
        _out.print(f"slipstream {importlib.metadata.version('slipstream')}")
        return 0
    if verb in ("--help", "-h", "help"):
        _out.print(_USAGE, end="")
        return 0
    if verb not in VERBS:
        raise ConfigError(f"unknown verb {verb!r}.{settings.nearest(verb, VERBS)}")
    if verb != "train" and any(word in ("--help", "-h") for word in rest):
        if verb not in OPTIONS:
            _out.print(_USAGE, end="")
            return 0
        return _help(OPTIONS[verb], f"slipstream {_TAKES.get(verb, verb)}", None)
    return VERBS[verb](rest)


def _report(error: Exception, debug: bool) -> int:
    """Prints an error, its message last."""
    expected = isinstance(error, _EXPECTED)
    if debug or not expected:
        _error.print("".join(traceback.format_exception(error)), end="")
    for note in getattr(error, "__notes__", []):
        _error.print(note)
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        message = f"{place}{error.strerror}"
    else:
        message = str(error) if expected and str(error) else f"{type(error).__name__}: {error}"
    headline, _, details = message.partition("\n")  # such as a worker's traceback
    if details.strip():
        _error.print(details.rstrip())
    _error.print(f"slipstream: error: {headline}")
    return 2 if isinstance(error, ConfigError) else 1


def _show_warning(message: Warning | str, category: type[Warning], *place: Any) -> None:
    _error.print(f"slipstream: warning: {message}")


def _help(kind: type, program: str, default: Any) -> int:
    config = (tyro.conf.PositionalRequiredArgs, tyro.conf.PositionalMetavarFromFieldName)
    try:
        tyro.cli(kind, args=["--help"], prog=program, default=default, config=config)
    except SystemExit as finished:
        return int(finished.code or 0)
    return 0


def _train(words: list[str]) -> int:
    typed = ["slipstream", "train", *words]
    wants_help = any(word in ("--help", "-h") for word in words)
    words = [word for word in words if word not in ("--help", "-h")]
    file = file_of(words)
    base = settings_of(file) if file else {}
    algo, words = algorithm_of(words, base)
    if wants_help and not algo:
        names = {"algorithms": ", ".join(sorted(ALGORITHMS)), "systems": ", ".join(SYSTEMS)}
        _out.print(_TRAIN_USAGE.format(**names, aliases=alias_lines()), end="")
        return 0
    chosen, values = settings_and(TrainFlags, "train", [algo], words)
    if wants_help:
        return _train_help(configuration(algo, {"env": "CartPole-v1"} | base, values, chosen.system))
    config = configuration(algo, base, values, chosen.system)
    refuse_callable(config, file)
    if chosen.print_config:
        _out.print(to_yaml(config), end="")
        return 0
    return _finish(loop.train(config, Own(), typed, _out))


def _train_help(default: Config) -> int:
    """All flags with the defaults of the preset, as far as the environment is given."""
    # The algorithm is declared as a protocol; its own class has the flags.
    hints = settings.field_types(Config, algo=type(default.algo))
    kind = dataclasses.make_dataclass("Config", list(hints.items()), frozen=True, namespace={"__doc__": Config.__doc__})
    filled = kind(*(getattr(default, name) for name in hints))
    code = _help(kind, f"slipstream train {default.algo.name}", filled)
    _out.print(
        f"--config FILE|RUN, --system and --print-config are explained by `slipstream train --help`.\n{alias_lines()}"
    )
    return code


def _finish(trained: Trained) -> int:
    """What to do with the run, as commands that can be pasted."""
    path, progress = trained.run.path, trained.progress
    frames = f" ({progress.steps * progress.frames_per_step:,} frames)" if progress.frames_per_step > 1 else ""
    enough = f"ended by --stop-at-return {progress.stop_at_return:g}\n" if progress.solved else ""
    _out.print(
        f"Trained for {progress.steps:,} steps{frames} "
        f"in {clock(progress.mark().seconds)}: return {return_text(progress)}\n{enough}"
        f"run:       {path}\n"
        f"evaluate:  slipstream eval {path} --episodes 30\n"
        f"watch:     slipstream watch {path}\n"
        f"go on:     slipstream resume {path} --total-steps {2 * progress.total_steps}"
    )
    return 0


def _resume(words: list[str]) -> int:
    options, changes = resumed(words)
    path = latest(Path(options.run)) if options.latest else Path(options.run)
    if options.total_steps:
        changes["total_steps"] = options.total_steps
    try:
        return _finish(loop.resume(path, Own(), changes, _out))
    except loop.Finished as finished:
        if not options.latest:
            raise
        _out.print(str(finished))
        return 0


def _eval(words: list[str]) -> int:
    options = flags.parse(EvalOptions, words, "eval")
    agent = load(options.run, options.checkpoint)
    result = agent.evaluate(options.episodes, options.greedy, options.seed)
    reward = result.reward
    manner = "greedy" if options.greedy else "sampled"
    _out.print(
        f"{agent.config.algo.name} on {agent.config.env} after {agent.steps:,} steps, {options.episodes} episodes with "
        f"{manner} actions\n"
        f"return: mean {reward.mean:.2f}  std {reward.std:.2f}  min {reward.least:.2f}  max {reward.greatest:.2f}\n"
        f"length: mean {sum(result.lengths) / len(result.lengths):,.1f} steps"
    )
    return 0


def _envs(words: list[str]) -> int:
    options = flags.parse(EnvsOptions, words, "envs", "word")
    found = {family: [id for id in ids if options.word.lower() in id.lower()] for family, ids in list_envs().items()}
    if not any(found.values()):
        raise ConfigError(f"no environment id contains {options.word!r}")
    for family, ids in found.items():
        if ids:
            _out.print(f"{family} ({len(ids)})")
            _out.print("".join(f"  {id:20} {settings_line(id)}".rstrip() + "\n" for id in ids), end="")
    return 0


def _algos(words: list[str]) -> int:
    if words:
        raise ConfigError(f"unexpected argument {words[0]!r}: type slipstream algos")
    for name, kind in ALGORITHMS.items():
        module = inspect.getmodule(kind)
        _out.print(f"{name:8} {(module.__doc__ or '').splitlines()[0]}" if module else name)
    return 0


def _presets(words: list[str]) -> int:
    for (algo, kind), values in presets.listed(words).items():
        _out.print(f"# {algo} on {kind}\n{yaml.safe_dump(dict(values), sort_keys=False)}")
    return 0


def _check_env(words: list[str]) -> int:
    options = flags.parse(CheckOptions, words, "check-env")
    findings = check_env(options.env)
    for finding in findings:
        _out.print(str(finding))
    errors = sum(finding.severity == "error" for finding in findings)
    if errors:
        raise EnvError(f"{options.env} breaks the contract, errors: {errors}")
    _out.print(f"{options.env}: no errors, warnings: {len(findings)}")
    return 0


def _watch(words: list[str]) -> int:
    options = flags.parse(WatchOptions, words, "watch")
    agent = load(options.run, options.checkpoint)
    loop.require_callable(agent.config, None, agent.run)
    suffix = video.suffix(options.format)
    for episode in range(options.episodes):
        path = agent.run / "videos" / f"{options.stem(agent.steps, episode)}{suffix}"
        made = video.record(agent, path, episode, options.greedy, options.seed, options.max_steps, options.reconstruct)
        cut = "" if made.ended else ", cut there: --max-steps"
        _out.print(f"{made.path}  (return {made.reward:.4g}, {made.steps:,} steps{cut})")
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "resume": _resume,
    "eval": _eval,
    "watch": _watch,
    "envs": _envs,
    "algos": _algos,
    "presets": _presets,
    "check-env": _check_env,
    "verify": lambda words: verify_verb(words, _out.print, _error.print),
    "doctor": lambda words: doctor_verb(words, _out.print),
    "bench": lambda words: bench_verb(words, _out.print, _error.print),
}

OPTIONS: dict[str, type] = {
    "resume": ResumeOptions,
    "eval": EvalOptions,
    "watch": WatchOptions,
    "envs": EnvsOptions,
    "check-env": CheckOptions,
    "verify": VerifyFlags,
    "doctor": DoctorFlags,
    "bench": BenchFlags,
}
