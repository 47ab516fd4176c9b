"""Observation and action spaces: what is supported, arrays for them, checked writing, actions in the env's terms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import Space, spaces
from numpy.typing import NDArray

from slipstream import tree
from slipstream.ops.spaces import space_tree
from slipstream.tree import Tree

Write = Callable[[int, Any], None]


def check_observation_space(space: Space[Any], name: str) -> None:
    """Accepts Box, Discrete, MultiDiscrete, MultiBinary, and Dict and Tuple of those.

    Args:
        space: Space of one observation.
        name: The environment, for the message.

    Raises:
        ValueError: Another space, with its place in the tree.
    """
    try:
        leaves = tree.leaves(space_tree(space))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    for leaf in leaves:
        if isinstance(leaf, spaces.Box) and leaf.dtype.kind not in "fiub":
            raise ValueError(f"{name}: observation space {leaf} has dtype {leaf.dtype}; expected numbers")


def check_action_space(space: Space[Any], name: str) -> None:
    """Accepts Discrete, MultiDiscrete and Box.

    Raises:
        ValueError: Another space.
    """
    if isinstance(space, spaces.Box):
        if space.dtype.kind != "f":
            raise ValueError(
                f"{name}: action space {space} has dtype {space.dtype}; a Box of actions must be of floats"
            )
        if space.shape == ():
            raise ValueError(
                f"{name}: action space {space} has no dimension; declare Box(low, high, (1,)), take action[0]"
            )
    elif not isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        raise ValueError(
            f"{name}: action space {space} is not supported; expected Discrete, MultiDiscrete or Box. "
            "Convert it with gymnasium.wrappers.TransformAction."
        )
    elif isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim != 1:
        raise ValueError(f"{name}: action space {space} has a {space.nvec.ndim}-dimensional nvec; expected a flat one")


def policy_action_space(space: Space[Any]) -> Space[Any]:
    """The space in the policy's terms: integers count from 0; `Actions` adds the start of the env's own space."""
    if isinstance(space, spaces.Discrete):
        return spaces.Discrete(int(space.n))
    if isinstance(space, spaces.MultiDiscrete):
        return spaces.MultiDiscrete(space.nvec.astype(np.int64))
    return space


def leaf_dtype(space: Space[Any]) -> np.dtype[Any]:
    """Dtype of a leaf as it arrives: the space's own, float64 as float32."""
    dtype = np.dtype(space.dtype)
    return np.dtype(np.float32) if dtype == np.float64 else dtype


def empty_observations(space: Space[Any], rows: int) -> Tree:
    """A tree of zeros `[rows, *O]` for observations of `space`."""

    def zeros(leaf: Space[Any]) -> NDArray[Any]:
        return np.zeros((rows, *leaf_shape(leaf)), leaf_dtype(leaf))

    return tree.map(zeros, space_tree(space))


def leaf_shape(space: Space[Any]) -> tuple[int, ...]:
    """Shape of one observation of a leaf space; a Discrete observation is a scalar."""
    return tuple(space.shape or ())


def observation_writer(space: Space[Any], arrays: Tree) -> Write:
    """A function `write(row, observation)` that copies an observation into row `row` of `arrays`, checking it.

    Args:
        space: Space of one observation.
        arrays: Tree of arrays `[B, *O]`, as from `empty_observations`.

    Returns:
        `write`; it raises ValueError on a wrong structure, shape or dtype. The one cast it makes is float64 to float32.
    """
    return _writer(space, arrays, "")


def _writer(space: Space[Any], arrays: Tree, path: str) -> Write:
    join = f"{path}." if path else ""
    if isinstance(space, spaces.Dict):
        children = {key: _writer(child, arrays[key], join + str(key)) for key, child in space.spaces.items()}
        return _dict_writer(children, path)
    if isinstance(space, spaces.Tuple):
        return _tuple_writer([_writer(c, arrays[i], f"{join}{i}") for i, c in enumerate(space.spaces)], path)
    if isinstance(space, spaces.Discrete):
        return _discrete_writer(space, arrays, path)
    return _array_writer(arrays, path)


def _dict_writer(children: dict[str, Write], path: str) -> Write:
    def write(row: int, value: Any) -> None:
        if not isinstance(value, dict) or value.keys() != children.keys():
            got = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"observation{_at(path)}: expected a dict with keys {sorted(children)}, got {got}")
        for key, child in children.items():
            child(row, value[key])

    return write


def _tuple_writer(children: list[Write], path: str) -> Write:
    def write(row: int, value: Any) -> None:
        if not isinstance(value, tuple | list) or len(value) != len(children):
            got = f"{len(value)} entries" if isinstance(value, tuple | list) else type(value).__name__
            raise ValueError(f"observation{_at(path)}: expected a tuple of {len(children)} entries, got {got}")
        for child, entry in zip(children, value, strict=True):
            child(row, entry)

    return write


def _discrete_writer(space: spaces.Discrete, array: NDArray[Any], path: str) -> Write:
    low, high = int(space.start), int(space.start) + int(space.n) - 1

    def write(row: int, value: Any) -> None:
        integer = isinstance(value, int | np.integer) or (
            isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "iu"
        )
        if not integer or not low <= int(value) <= high:
            raise ValueError(f"observation{_at(path)}: expected an integer in [{low}, {high}], got {_describe(value)}")
        array[row] = value

    return write


def _array_writer(array: NDArray[Any], path: str) -> Write:
    shape, dtype = array.shape[1:], array.dtype

    def write(row: int, value: Any) -> None:
        got = value if isinstance(value, np.ndarray) else np.asarray(value)
        narrowed = got.dtype == np.float64 and dtype == np.float32
        if got.shape != shape or not (got.dtype == dtype or narrowed):
            raise ValueError(f"observation{_at(path)}: expected {dtype} {list(shape)}, got {_describe(value)}")
        array[row] = got

    return write


class Actions:
    """Actions of a lane, from the policy's terms to the environment's.

    Args:
        space: The environment's own action space.
        size: Slots per lane.
        name: The environment, for messages.

    Attributes:
        name: The environment.
        shape: `[B, *A]`.
        dtype: Of the environment's actions.
    """

    def __init__(self, space: Space[Any], size: int, name: str) -> None:
        check_action_space(space, name)
        self.name, self._box = name, isinstance(space, spaces.Box)
        self.shape = (size, *leaf_shape(space))
        if isinstance(space, spaces.Box):
            self._low, self._high = space.low, space.high
            self.dtype = np.dtype(space.dtype)
        elif isinstance(space, spaces.MultiDiscrete):
            self._counts, self._start = space.nvec.astype(np.int64), space.start.astype(np.int64)
            self.dtype = np.dtype(np.int64)
        elif isinstance(space, spaces.Discrete):
            self._counts, self._start = np.int64(space.n), np.int64(space.start)
            self.dtype = np.dtype(np.int64)
        self._shifted = not self._box and bool(np.any(self._start))
        if not self._box:
            self._firsts = np.cumsum([0, *np.ravel(self._counts)[:-1]])  # of every action's choices in a flat mask

    def encode(self, action: NDArray[Any]) -> NDArray[Any]:
        """A new array `[B, *A]`: Box clipped to its bounds and in the env's dtype, integers shifted by their start.

        Raises:
            ValueError: Wrong shape or dtype, an integer out of range, or a float that is not a number.
        """
        if action.shape[:1] != self.shape[:1]:
            raise self._misshapen(action)
        return self.encode_all(action)

    def encode_all(self, action: NDArray[Any]) -> NDArray[Any]:
        """As `encode`, for any number of actions."""
        if action.shape[1:] != self.shape[1:] or action.dtype.kind != ("f" if self._box else "i"):
            raise self._misshapen(action)
        if self._box:
            if np.isnan(action).any():
                raise ValueError(f"{self.name}: the policy chose an action that is not a number (NaN)")
            return np.clip(action, self._low, self._high).astype(self.dtype, copy=False)
        allowed = (action >= 0) & (action < self._counts)
        if np.count_nonzero(allowed) < allowed.size:
            raise ValueError(f"{self.name}: expected actions in [0, {self._counts}), got {action.tolist()}")
        return action + self._start if self._shifted else action.astype(np.int64)

    def _misshapen(self, action: NDArray[Any]) -> ValueError:
        kind = "floats" if self._box else "integers"
        return ValueError(
            f"{self.name}: expected actions {list(self.shape)} of {kind}, got {action.dtype} {list(action.shape)}"
        )

    def nothing_allowed(self, mask: Tree) -> NDArray[np.bool_]:
        """Where a mask leaves an action without a choice, bool `[B]`; nowhere if it is no mask of these actions.

        Args:
            mask: Tree `[B, ...]` whose leaves, side by side, have an entry for every choice of every action.
        """
        flat = np.concatenate([leaf.reshape(len(leaf), -1) for leaf in tree.leaves(mask)], axis=1) != 0
        if self._box or flat.shape[1] != np.sum(self._counts):
            return np.zeros(len(flat), np.bool_)
        return np.asarray(~np.logical_or.reduceat(flat, self._firsts, axis=1).all(axis=1))

    def sample(self, generator: np.random.Generator, mask: NDArray[np.bool_] | None = None) -> NDArray[Any]:
        """One random action `[*A]` in the policy's terms; unbounded Box dimensions are drawn from a normal.

        Args:
            generator: Draws.
            mask: bool, flat, which choices are allowed; None for all.
        """
        if not self._box and mask is not None:
            parts = np.split(mask, self._firsts[1:])
            drawn = [generator.choice(np.flatnonzero(part) if part.any() else len(part)) for part in parts]
            return np.reshape(np.array(drawn, np.int64), self.shape[1:])
        if not self._box:
            return np.asarray(generator.integers(0, self._counts, self.shape[1:]), np.int64)
        bounded = np.isfinite(self._low) & np.isfinite(self._high)
        low, high = np.where(bounded, self._low, 0.0), np.where(bounded, self._high, 1.0)
        uniform = low + (high - low) * generator.random(self.shape[1:])
        return np.where(bounded, uniform, generator.standard_normal(self.shape[1:])).astype(np.float32)


def _at(path: str) -> str:
    return f" '{path}'" if path else ""


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
