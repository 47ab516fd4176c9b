from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pytest

from slipstream.run import settings
from slipstream.run.settings import ConfigError


@dataclass(frozen=True)
class Leaf:
    name: ClassVar[str] = "leaf"

    rate: float = 0.5
    sizes: tuple[int, ...] = (5, 7)
    switch: bool = True
    limit: int | None = None


@dataclass(frozen=True)
class Top:
    env: str
    count: int = 3
    kind: Literal["a", "b", "clip"] = "a"
    leaf: Leaf = field(default_factory=Leaf)
    extra: dict[str, int | float | bool | str] = field(default_factory=dict[str, int | float | bool | str])


@pytest.mark.parametrize(
    ("hint", "given", "wanted"),
    [
        (int, "2e6", 2_000_000),
        (int, "2_000", 2_000),
        (int, 3.0, 3),
        (int, 10**18 + 1, 10**18 + 1),
        (float, "3e-4", 3e-4),
        (float, 1, 1.0),
        (bool, "no", False),
        (bool, "True", True),
        (str, 5, "5"),
        (Literal["a", "b"], "b", "b"),
        (tuple[int, ...], "64 32", (64, 32)),
        (tuple[int, ...], "64,32", (64, 32)),
        (tuple[int, ...], [64, "3e1"], (64, 30)),
        (tuple[float, str], ["1", "x"], (1.0, "x")),
        (int | None, "none", None),
        (int | None, "4", 4),
        (int | float | bool | str, 2.0, 2.0),
        (int | float | bool | str, "3", "3"),
        (dict[str, float], "{a: 1}", {"a": 1.0}),
    ],
)
def test_coerce(hint: Any, given: Any, wanted: Any) -> None:
    result = settings.coerce(hint, given, "key")
    assert result == wanted
    assert type(result) is type(wanted)


@pytest.mark.parametrize(
    ("hint", "given", "message"),
    [
        (int, "2.5", "key: expected a whole number (such as 128 or 2e6), got '2.5'"),
        (int, True, "key: expected a whole number (such as 128 or 2e6), got True"),
        (int, "inf", "key: expected a whole number (such as 128 or 2e6), got 'inf'"),
        (float, "x", "key: expected a number, got 'x'"),
        (float, "nan", "key: expected a number, got 'nan'"),
        (bool, "maybe", "key: expected true or false, got 'maybe'"),
        (str, [1], "key: expected text, got [1]"),
        (Literal["raw", "clip"], "clop", "key: expected one of raw, clip, got 'clop'. Did you mean clip?"),
        (tuple[int, ...], "5 x", "key[1]: expected a whole number (such as 128 or 2e6), got 'x'"),
        (tuple[int, str], [1], "key: expected 2 values, got [1]"),
        (tuple[int, ...], None, "key: expected a list such as 64,64, got None"),
        (dict[str, int], 3, "key: expected a mapping such as {name: value}, got 3"),
    ],
)
def test_coerce_says_what_does_not_fit(hint: Any, given: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings.coerce(hint, given, "key")
    assert str(caught.value) == message


def test_plain_and_build_are_inverse() -> None:
    made = Top("x", kind="b", leaf=Leaf(0.1, (2, 3), False, 9), extra={"gravity": 9.8})
    form = settings.plain(made)
    assert form["leaf"] == {"name": "leaf", "rate": 0.1, "sizes": [2, 3], "switch": False, "limit": 9}
    assert settings.build(Top, form) == made
    assert settings.build(Top, settings.nest(settings.flatten(form))) == made


def test_dotted_and_nested_keys_are_the_same() -> None:
    assert settings.flatten({"leaf": {"rate": 1}, "leaf.switch": False}) == {"leaf.rate": 1, "leaf.switch": False}
    assert settings.flatten({"total-steps": 1}) == {"total_steps": 1}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"env": "x", "cuont": 1}, "unknown setting cuont. Did you mean count?"),
        ({"env": "x", "leaf": {"rat": 1}}, "unknown setting leaf.rat. Did you mean leaf.rate?"),
        ({"env": "x", "rate": 1}, "unknown setting rate. Did you mean leaf.rate?"),
        ({"count": 1}, "env is missing"),
        (
            {"env": "x", "leaf": 3},
            "leaf: expected settings below it (leaf.rate, leaf.sizes, leaf.switch, leaf.limit), got 3",
        ),
        ({"env": "x", "leaf": {"name": "other"}}, "leaf.name: expected leaf, got other"),
        (
            {"env": "x", "zzzz": 1},
            "unknown setting zzzz. Known: count, env, extra, kind, leaf.limit, leaf.rate, leaf.sizes, leaf.switch.",
        ),
    ],
)
def test_build_names_the_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings.build(Top, values)
    assert str(caught.value) == message
