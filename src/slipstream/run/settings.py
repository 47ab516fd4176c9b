"""Settings: one path from presets, files, mappings and flags to frozen dataclasses, with errors that name the key.

A setting's key is dotted (`algo.lr`, `placement.workers`); dashes and underscores are the same. Values may be typed or
text: `2e6` is an integer, `64,64` a tuple, `none` an absent optional.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml

from slipstream.run.names import elsewhere

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Plain = dict[str, Any]
"""A nested dict of plain values (numbers, text, lists, dicts), as in YAML."""

Built = TypeVar("Built", bound="DataclassInstance")

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
SWITCH_WORDS = _TRUE + _FALSE
"""Text that stands for a truth value."""


_LISTED = 12
"""Names that an error message can show."""


class ConfigError(ValueError):
    """A setting that is unknown, of the wrong type or at odds with another; the message names it and says what fits."""


def nearest(
    name: str, known: Iterable[str], listing: str = "slipstream train ALGO --help", also: Iterable[str] = ()
) -> str:
    """What to type instead of an unknown name: ` Did you mean X?`, or all names, or the few nearest ones.

    Where another library's setting has no like here, what to set in its place.

    Args:
        name: What was typed.
        known: What may be.
        listing: The command that shows all.
        also: Other names that are understood, for who has mistyped one of them.
    """
    names = sorted(known)
    if hint := elsewhere(name, names):
        return f" {hint}."
    by_leaf = {_leaf(candidate): candidate for candidate in reversed(names)}

    def close(cutoff: float, count: int) -> list[str]:
        leaves = difflib.get_close_matches(_leaf(name), by_leaf, n=count, cutoff=cutoff)
        return [by_leaf[leaf] for leaf in leaves]

    found = (
        _with_word(name, names) or difflib.get_close_matches(name, [*names, *also], n=1, cutoff=0.7) or close(0.6, 1)
    )
    if found or (found := [each for each in names if each.lower() == name.lower()]):
        return f" Did you mean {found[0]}?"
    if len(names) <= _LISTED:
        return f" Known: {', '.join(names)}." if names else ""
    similar = f"; the nearest are {', '.join(found)}" if (found := close(0.5, 3)) else ""
    return f" `{listing}` lists all{similar}."


def plain(value: Any) -> Any:
    """The plain form of a settings value; a dataclass becomes a dict that starts with its class's `name`, if any."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {"name": name} if (name := _name_of(type(value))) else {}
        return named | {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return value


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested mappings; a key that is dotted already may stand among them."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}".replace("-", "_")
        flat |= flatten(value, f"{path}.") if isinstance(value, Mapping) and value else {path: value}
    return flat


def nest(flat: Mapping[str, Any]) -> Plain:
    """Nested dicts of dotted keys."""
    nested: Plain = {}
    for key, value in flat.items():
        *parents, leaf = key.split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    return nested


def field_types(kind: type, **replaced: type) -> dict[str, Any]:
    """Resolved types of a dataclass's fields; `replaced` narrows a field that is declared as a protocol."""
    hints = typing.get_type_hints(kind)
    return {field.name: replaced.get(field.name, hints[field.name]) for field in dataclasses.fields(kind)}


def keys(kind: type, prefix: str = "", **replaced: type) -> dict[str, Any]:
    """Every dotted key below a dataclass and its type."""
    found: dict[str, Any] = {}
    for name, hint in field_types(kind, **replaced).items():
        nested = _dataclass_of(hint)
        found |= keys(nested, f"{prefix}{name}.") if nested else {f"{prefix}{name}": hint}
    return found


def build(kind: type[Built], values: Mapping[str, Any], prefix: str = "", **replaced: type) -> Built:
    """A dataclass from nested plain values.

    Raises:
        ConfigError: For an unknown or missing key, or a value of the wrong type.
    """
    hints = field_types(kind, **replaced)
    known = keys(kind, prefix, **replaced)
    for key in values:
        if key not in hints:
            raise ConfigError(f"unknown setting {prefix}{key}.{nearest(f'{prefix}{key}', known)}")
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.name in values:
            arguments[field.name] = coerce(hints[field.name], values[field.name], f"{prefix}{field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{prefix}{field.name} is missing")
    try:
        return kind(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        named = str(error).startswith(prefix)
        raise ConfigError(str(error) if named else f"{prefix.rstrip('.')}: {error}") from error


def coerce(hint: Any, value: Any, key: str) -> Any:
    """`value` as the annotation `hint` wants it.

    Raises:
        ConfigError: If it does not fit.
    """
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(typing.get_args(hint), value, key)
    if origin is Literal:
        return _coerce_literal(typing.get_args(hint), value, key)
    if origin is tuple:
        return _coerce_tuple(typing.get_args(hint), value, key)
    if nested := _dataclass_of(hint):
        return _coerce_dataclass(nested, value, key)
    if origin is dict:
        return _coerce_dict(typing.get_args(hint)[1], value, key)
    simple = {bool: _coerce_bool, int: _coerce_int, float: _coerce_float, str: _coerce_str}
    return simple[hint](value, key)


def _with_word(name: str, names: Sequence[str]) -> list[str]:
    """The plainest of the names that have the last part of `name` as a word, in its group if it names one."""
    word, group = _leaf(name).replace("_", "-"), name.rpartition(".")[0]
    having = [
        each
        for each in names
        if each.startswith(group and f"{group}.") and word in _leaf(each).replace("_", "-").split("-")
    ]
    return sorted(having, key=lambda each: (each.count("."), len(each)))[:1]


def _leaf(key: str) -> str:
    return key.rpartition(".")[2].lstrip("-")


def _name_of(kind: type) -> str | None:
    """The name that a class (not a field) carries, as algorithms do."""
    own = any(field.name == "name" for field in dataclasses.fields(kind))
    name = None if own else getattr(kind, "name", None)
    return name if isinstance(name, str) else None


def _dataclass_of(hint: Any) -> type | None:
    return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None


def _coerce_dataclass(kind: type, value: Any, key: str) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        below = ", ".join(f"{key}.{field.name}" for field in dataclasses.fields(kind))
        raise ConfigError(f"{key}: expected settings below it ({below}), got {value!r}")
    values: Plain = {str(name): item for name, item in value.items()}
    named = _name_of(kind)
    if named is not None and (given := values.pop("name", named)) != named:
        raise ConfigError(f"{key}.name: expected {named}, got {given}")
    return build(kind, values, f"{key}.")


def _coerce_dict(hint: Any, value: Any, key: str) -> Plain:
    value = yaml.safe_load(value) if isinstance(value, str) else value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}: expected a mapping such as {{name: value}}, got {value!r}")
    return {str(name): coerce(hint, item, f"{key}.{name}") for name, item in value.items()}


def _coerce_union(options: tuple[Any, ...], value: Any, key: str) -> Any:
    if type(None) in options and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
        return None
    if type(value) in options:
        return value
    problems: list[str] = []
    for option in options:
        if option is type(None):
            continue
        try:
            return coerce(option, value, key)
        except ConfigError as error:
            problems.append(str(error))
    raise ConfigError("; or ".join(problems))


def _coerce_literal(choices: tuple[Any, ...], value: Any, key: str) -> Any:
    for choice in choices:
        if value == choice or str(value) == str(choice):
            return choice
    listed = ", ".join(str(choice) for choice in choices)
    close = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    hint = f". Did you mean {close[0]}?" if close else ""
    raise ConfigError(f"{key}: expected one of {listed}, got {value!r}{hint}")


def _coerce_tuple(items: tuple[Any, ...], value: Any, key: str) -> tuple[Any, ...]:
    if isinstance(value, str):
        value = [part for part in value.strip("()[]").replace(",", " ").split() if part]
    elif isinstance(value, int | float):
        value = [value]
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{key}: expected a list such as 64,64, got {value!r}")
    parts: list[Any] = list(value)
    if len(items) == 2 and items[1] is Ellipsis:
        hints: list[Any] = [items[0]] * len(parts)
    elif len(items) == len(parts):
        hints = list(items)
    else:
        raise ConfigError(f"{key}: expected {len(items)} values, got {value!r}")
    return tuple(
        coerce(hint, part, f"{key}[{place}]") for place, (hint, part) in enumerate(zip(hints, parts, strict=True))
    )


def _coerce_bool(value: Any, key: str) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in _TRUE:
        return True
    if str(value).lower() in _FALSE:
        return False
    raise ConfigError(f"{key}: expected true or false, got {value!r}")


def _coerce_int(value: Any, key: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        return int(value) if isinstance(value, str) else _whole(value)
    except ValueError:
        pass
    try:
        return _whole(float(value)) if isinstance(value, str) else _whole(value)
    except (ValueError, OverflowError):
        raise ConfigError(f"{key}: expected a whole number (such as 128 or 2e6), got {value!r}") from None


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, float) or not value.is_integer():
        raise ValueError
    return int(value)


def _coerce_float(value: Any, key: str) -> float:
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isnan(number):
            return number
    raise ConfigError(f"{key}: expected a number, got {value!r}")


def _coerce_str(value: Any, key: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise ConfigError(f"{key}: expected text, got {value!r}")
