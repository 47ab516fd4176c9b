"""Flags: `--key value`, `--key=value`, `--switch`, `--no-switch`, in any order among the positional arguments.

They become the text that `settings` understands, so that a flag, a line of YAML and an entry of a Python mapping are
checked by the same code with the same messages.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from slipstream.run import settings
from slipstream.run.settings import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")


def split(
    arguments: Sequence[str], known: Mapping[str, Any], aliases: Mapping[str, str] | None = None
) -> tuple[list[str], dict[str, Any]]:
    """Positional arguments, and flags as text by key; of a flag that is typed twice the last one counts.

    Args:
        arguments: What was typed after the verb.
        known: Every dotted key and its type. A key below one of a `dict` type is known too.
        aliases: Other names, and the keys they stand for.

    Raises:
        ConfigError: For an unknown flag (it names the nearest), one without its value, or two names of one setting with
            different values.
    """
    positional: list[str] = []
    values: dict[str, Any] = {}
    names: dict[str, str] = {}
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--"):
            positional.append(word)
            continue
        name, equals, attached = word[2:].partition("=")
        key, negated = _key(name, known, aliases or {})
        if equals:
            waiting.insert(0, attached)
        value = "false" if negated else _value(key, known, waiting, bool(equals))
        flag = _flag(name)
        if names.setdefault(key, flag) != flag and values[key] != value:
            raise ConfigError(f"{names[key]} {values[key]} and {flag} {value} are the same setting; leave one out")
        values[key] = value
    return positional, values


def parse(kind: type[Options], arguments: Sequence[str], verb: str, *optional: str) -> Options:
    """The options of a verb; its fields without a default are positional, in their order, and then the `optional` ones.

    Raises:
        ConfigError: For a missing or superfluous argument, an unknown flag, or a wrong value.
    """
    return placed(kind, *split(arguments, settings.keys(kind)), verb, *optional)


def placed(
    kind: type[Options], positional: Sequence[str], values: Mapping[str, Any], verb: str, *optional: str
) -> Options:
    """The same from what `split` gave.

    Raises:
        ConfigError: For a missing or superfluous argument, or a wrong value.
    """
    required = [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]
    names = [*required, *optional]
    if len(positional) > len(names):
        raise ConfigError(f"unexpected argument {positional[len(names)]!r}; see slipstream {verb} --help")
    given = {**values, **dict(zip(names, positional, strict=False))}
    for name in required:
        if name not in given:
            raise ConfigError(f"{name.upper()} is missing: type slipstream {verb} {' '.join(required).upper()}")
    return settings.build(kind, given)


def _key(name: str, known: Mapping[str, Any], aliases: Mapping[str, str]) -> tuple[str, bool]:
    """The key that a flag means, and whether it is switched off by `no-`."""
    dotted = name.replace("-", "_")
    key = aliases.get(dotted, dotted)
    parent = key.rpartition(".")[0]
    if key in known or typing.get_origin(known.get(parent)) is dict:
        return key, False
    group, _, leaf = dotted.rpartition(".")
    switch = f"{group}.{leaf.removeprefix('no_')}" if group else leaf.removeprefix("no_")
    switch = aliases.get(switch, switch)
    if leaf.startswith("no_") and known.get(switch) is bool:
        return switch, True
    if dotted.startswith("no_") and known.get(dotted.removeprefix("no_")) is bool:
        return dotted.removeprefix("no_"), True
    others = [other for other, key in aliases.items() if key != f"algo.{other}"]  # `--lr` is near where `--algo.lr` is
    flags, also = ([_flag(each) for each in names] for names in (known, others))
    raise ConfigError(f"unknown flag --{name}.{settings.nearest(f'--{name}', flags, also=also)}")


def _value(key: str, known: Mapping[str, Any], waiting: list[str], attached: bool) -> Any:
    """Takes the words that belong to a flag from those that wait."""
    hint = known.get(key, str)
    free = 0
    while free < len(waiting) and (attached or not waiting[free].startswith("--")):
        free += 1
        if attached or typing.get_origin(hint) is not tuple:
            break
    if hint is bool and not (free and (attached or waiting[0].lower() in settings.SWITCH_WORDS)):
        return "true"
    if not free:
        raise ConfigError(f"{_flag(key)} needs a value")
    words = [waiting.pop(0) for _ in range(free)]
    return " ".join(words) if key in known else _number(words[0])


def _number(text: str) -> int | float | bool | str:
    """Text for which no type is declared: a number or a truth value if it looks like one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")
