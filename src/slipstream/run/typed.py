"""From what was typed after `train` or `verify` to a configuration: flags over system over file over preset."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from slipstream.algos import ALGORITHMS
from slipstream.run import flags, presets, settings
from slipstream.run.config import Config, known_settings
from slipstream.run.directory import RunDirectory, read_yaml
from slipstream.run.names import aliases
from slipstream.run.options import BenchFlags, DoctorFlags, ResumeOptions, TrainFlags, VerifyFlags
from slipstream.run.settings import ConfigError
from slipstream.run.systems import published

Flags = TypeVar("Flags", TrainFlags, VerifyFlags, DoctorFlags, BenchFlags)

_PROTOCOL = "env_options.atari.protocol"


def algorithm_of(words: Sequence[str], base: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The algorithm that was typed first, or by `--algo`, or that the file names; and the words that are left."""
    algo, left = "", list(words)
    if left and not left[0].startswith("--"):
        algo = left.pop(0)
    elif "--algo" in left:
        place = left.index("--algo")
        algo, left = "".join(left[place + 1 : place + 2]), left[:place] + left[place + 2 :]
    elif named := [word for word in left if word.startswith("--algo=")]:
        algo, left = named[0].removeprefix("--algo="), [word for word in left if word != named[0]]
    return algo or str(base.get("algo.name", "")), left


def settings_and(
    kind: type[Flags], verb: str, algos: Sequence[str], words: Sequence[str]
) -> tuple[Flags, dict[str, Any]]:
    """The verb's own flags, and the settings that were typed, which are for all of the algorithms."""
    if not all(algos):
        raise ConfigError(f"ALGO is missing: slipstream {verb} {'|'.join(sorted(ALGORITHMS))} --env ENV")
    known = {algo: known_settings(algo) for algo in algos}
    _refuse_ambiguous(known, words)
    positional, mine, values = _apart(kind, _merged(known.values()), words)
    if positional:
        raise ConfigError(f"unexpected argument {positional[0]!r}; see slipstream {verb} {algos[0]} --help")
    for key in values:
        having = [algo for algo, own in known.items() if key in own]
        lacking = [algo for algo in algos if algo not in having]
        if having and lacking:
            flag, those = f"--{key.replace('_', '-')}", " ".join(having)
            raise ConfigError(
                f"{flag} is no setting of {', '.join(lacking)}: leave it out, or type slipstream {verb} {those} ... "
                f"{flag} {values[key]}, and {', '.join(lacking)} apart"
            )
    return settings.build(kind, mine), values


def _refuse_ambiguous(known: Mapping[str, Mapping[str, Any]], words: Sequence[str]) -> None:
    """Refuses a name that is one setting of one algorithm and another of the next."""
    meant = {algo: aliases(own) for algo, own in known.items()}
    for word in words:
        flag = word.partition("=")[0]
        name = flag.removeprefix("--").replace("-", "_")
        keys = {algo: names[name] for algo, names in meant.items() if name in names}
        if word.startswith("--") and len({*keys.values()}) > 1:
            each = " and ".join(f"--{key.replace('_', '-')} of {algo}" for algo, key in keys.items())
            raise ConfigError(f"{flag} is {each}; type which of them you mean, or the algorithms apart")


def resumed(words: Sequence[str]) -> tuple[ResumeOptions, dict[str, Any]]:
    """The options of `resume`, and the settings, of whichever algorithm, that were typed."""
    positional, mine, values = _apart(ResumeOptions, _merged(map(known_settings, ALGORITHMS)), words)
    return flags.placed(ResumeOptions, positional, mine, "resume"), values


def _merged(known: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Every key that one of the algorithms has at least, and its type."""
    return {key: hint for own in known for key, hint in own.items()}


def _apart(
    kind: type[Any], known: Mapping[str, Any], words: Sequence[str]
) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """Positional arguments, the verb's own flags, and settings."""
    own = settings.keys(kind)
    every = {**known, **own}
    positional, values = flags.split(words, every, aliases(every))
    return positional, {key: values.pop(key) for key in own if key in values}, values


def file_of(words: Sequence[str]) -> Path | None:
    """The file that `--config` names, or that of the run directory that it names."""
    for place, word in enumerate(words):
        if word.startswith("--config=") or (word == "--config" and place + 1 < len(words)):
            named = Path(word.partition("=")[2] or words[place + 1])
            return RunDirectory(named).path / "config.yaml" if named.is_dir() else named
    return None


def settings_of(file: Path) -> dict[str, Any]:
    """What a file says, by dotted key; `algo: ppo` is short for its name."""
    flat = settings.flatten(read_yaml(file))
    return {("algo.name" if key == "algo" else key): value for key, value in flat.items()}


def configuration(algo: str, base: dict[str, Any], values: dict[str, Any], system: str, verb: str = "train") -> Config:
    """Flags over the system, if one is named, over the file, if there is one, over the preset."""
    if base.get("algo.name", algo) != algo:
        raise ConfigError(f"the file is for algo.name {base['algo.name']}, not {algo}")
    if _PROTOCOL in base and values.get(_PROTOCOL, base[_PROTOCOL]) != base[_PROTOCOL]:  # it spells the old one out
        base = {key: value for key, value in base.items() if not key.startswith("env_options.atari.")}
    others = aliases(known_settings(algo))
    file: dict[str, Any] = {}
    for name, value in base.items():
        if file.setdefault(key := others.get(name, name), value) != value:
            raise ConfigError(f"{key} is twice in the file, as {file[key]!r} and, by the name {name}, as {value!r}")
    if not isinstance(env := (file | values).get("env"), str):
        raise ConfigError(f"--env is missing: slipstream {verb} {algo} --env ENV (slipstream envs lists them)")
    return presets.configure(algo, env, file | published(system, algo, presets.family(env)) | values)
