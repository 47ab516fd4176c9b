"""Spaces as JSON: written into every checkpoint, so that an agent loads where its environment is not installed."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import Space, spaces
from numpy.typing import NDArray

Json = dict[str, Any]


def describe(space: Space[Any]) -> Json:
    """The JSON form of a space.

    Raises:
        TypeError: For a kind of space that Slipstream does not support.
    """
    match space:
        case spaces.Box():
            return {
                "kind": "Box",
                "shape": list(space.shape),
                "dtype": str(space.dtype),
                "low": _bounds(space.low),
                "high": _bounds(space.high),
            }
        case spaces.Discrete():
            return {"kind": "Discrete", "n": int(space.n), "start": int(space.start)}
        case spaces.MultiDiscrete():
            return {
                "kind": "MultiDiscrete",
                "nvec": space.nvec.tolist(),
                "start": space.start.tolist(),
                "dtype": str(space.dtype),
            }
        case spaces.MultiBinary():
            return {"kind": "MultiBinary", "n": space.n if isinstance(space.n, int) else list(map(int, space.n))}
        case spaces.Dict():
            return {"kind": "Dict", "spaces": {key: describe(part) for key, part in space.spaces.items()}}
        case spaces.Tuple():
            return {"kind": "Tuple", "spaces": [describe(part) for part in space.spaces]}
        case _:
            raise TypeError(f"unsupported space {space}")


def restore(form: Json) -> Space[Any]:
    """The space that `describe` wrote.

    Raises:
        ValueError: If the form is of an unknown kind.
    """
    match form["kind"]:
        case "Box":
            shape, dtype = tuple(form["shape"]), np.dtype(form["dtype"])
            low, high = (np.broadcast_to(np.array(_numbers(form[end]), dtype), shape) for end in ("low", "high"))
            return spaces.Box(low, high, shape, dtype.type)
        case "Discrete":
            return spaces.Discrete(form["n"], start=form["start"])
        case "MultiDiscrete":
            nvec = np.array(form["nvec"])
            start = np.array(form.get("start", np.zeros_like(nvec)))  # older forms have none
            return spaces.MultiDiscrete(nvec, dtype=np.dtype(form["dtype"]).type, start=start)
        case "MultiBinary":
            return spaces.MultiBinary(form["n"])
        case "Dict":
            return spaces.Dict({key: restore(part) for key, part in form["spaces"].items()})
        case "Tuple":
            return spaces.Tuple([restore(part) for part in form["spaces"]])
        case kind:
            raise ValueError(f"unknown kind of space {kind!r}")


def _bounds(array: NDArray[Any]) -> Any:
    """One number where all are equal; infinities as text, since JSON has none."""
    flat = array.ravel()
    uniform = flat.size > 0 and bool((flat == flat[0]).all())
    values = flat[0].item() if uniform else array.tolist()
    return _text(values)


def _text(values: Any) -> Any:
    if isinstance(values, list):
        return [_text(value) for value in values]
    return str(values) if isinstance(values, float) and not np.isfinite(values) else values


def _numbers(values: Any) -> Any:
    if isinstance(values, list):
        return [_numbers(value) for value in values]
    return float(values) if isinstance(values, str) else values
