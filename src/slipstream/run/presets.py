"""Presets: tuned settings for an (algorithm, kind of environment), written as what differs from the defaults.

A preset is a mapping of dotted keys. That of the family comes first, that of the exact id over it, the user's flags
over both. `slipstream presets` prints them; `slipstream train ... --print-config` prints what they lead to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from slipstream.algos import ALGORITHMS
from slipstream.envs.make import VECTOR, env_family
from slipstream.run.config import CALLABLE, Config, algorithm, from_plain, known_settings
from slipstream.run.machine import quick_precision
from slipstream.run.names import aliases
from slipstream.run.preset_table import PRESETS
from slipstream.run.settings import ConfigError, flatten, nearest, nest, plain
from slipstream.run.systems import published

_NEAREST, _FARTHEST = 1_000, 50_000
"""Steps between two checkpoints, at least and at most, unless they are set."""


def family(env: str) -> str:
    """Preset family of an id, found without making the environment; `other` for callables.

    Raises:
        ValueError: For an unknown id; it names the nearest.
        ImportError: If the id needs a package that is not installed; it has the pip line.
    """
    return "other" if env.startswith(CALLABLE) else env_family(env)


def kinds(env: str) -> tuple[str, str]:
    """The names that presets may have `env` under: its family, and its id over that.

    An Atari game is the same game under all of its ids, and a vector environment is many of one kind.

    Raises:
        ValueError: As `family`.
        ImportError: As `family`.
    """
    kind, game = family(env), env.removeprefix(VECTOR)
    if kind == "atari":
        game = re.sub(r"^(envpool:)?(\w+?)(NoFrameskip)?-v\d$", r"ALE/\2-v5", game)
    return kind, game


def preset(algo: str, env: str) -> dict[str, Any]:
    """What the presets say for this algorithm and environment, the exact id over its family."""
    kind, game = kinds(env)
    return {**PRESETS.get((algo, kind), {}), **PRESETS.get((algo, game), {})}


def listed(words: Sequence[str]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """The presets for an algorithm, a family or an environment, or for two of them.

    Raises:
        ConfigError: There are none.
    """
    wanted = [_parts(word) for word in words]
    found = {key: values for key, values in PRESETS.items() if all(each & {*key} for each in wanted)}
    if not found:
        raise ConfigError(f"no preset for {' on '.join(words)}: `slipstream presets` lists all")
    return found


def _parts(word: str) -> set[str]:
    """What a preset may be filed under, if it is to be for `word`."""
    known = {part for key in PRESETS for part in key}
    try:
        return {word} if word in ALGORITHMS else {*kinds(word)}
    except (ValueError, ImportError):
        if word in known:
            return {word}
        raise ConfigError(f"no preset for {word!r}.{nearest(word, known, 'slipstream presets')}") from None


def by_key(algo: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` (dotted or nested) by the dotted keys that they mean.

    Raises:
        ConfigError: Two of them mean one key and have different values.
    """
    others = aliases(known_settings(algo))
    wanted: dict[str, Any] = {}
    for typed, value in flatten(changes).items():
        key = others.get(typed, typed)
        if wanted.setdefault(key, value) != value:
            raise ConfigError(f"{key} is given twice, as {wanted[key]!r} and, by the name {typed}, as {value!r}")
    return wanted


def configure(algo: str, env: str, changes: Mapping[str, Any] | None = None) -> Config:
    """The preset of (algo, env) with `changes` (dotted or nested keys) over it.

    The key `system` stands for the schedule of a published system, under the other changes.

    Raises:
        ConfigError: For an unknown algorithm or key, a wrong value, or settings that contradict each other.
    """
    defaults = plain(Config(env=env, algo=algorithm(algo)()))
    wanted = by_key(algo, changes or {})
    system = published(str(wanted.pop("system", "")), algo, family(env))
    return spelled_out(from_plain(nest(flatten(defaults) | preset(algo, env) | system | wanted)))


def spelled_out(config: Config) -> Config:
    """`config` with what the Atari protocol, `auto` and 0 stand for written out, so that a file tells all."""
    if not config.log.checkpoint_every:
        every = min(max(config.total_steps // 10, _NEAREST), _FARTHEST)
        config = replace(config, log=replace(config.log, checkpoint_every=every))
    if config.net.precision == "auto":
        config = replace(config, net=replace(config.net, precision=quick_precision(config.placement.device)))
    if family(config.env) != "atari":
        return config
    atari = config.env_options.atari
    atari = replace(atari, **asdict(atari.spelled_out()))
    return replace(config, env_options=replace(config.env_options, atari=atari))
