"""Observation spaces as trees of leaf spaces, and what each leaf is to a network."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gymnasium import Space, spaces
from numpy.typing import NDArray

from slipstream import tree
from slipstream.tree import Tree

ACTION_MASK = "action_mask"
"""Key of a `Dict` observation that says which actions are allowed; never a feature."""


def space_tree(space: Space[Any]) -> Tree:
    """The tree whose leaves are the leaf spaces of `space`, in the shape that its observations have.

    Raises:
        ValueError: A leaf is not Box, Discrete, MultiDiscrete or MultiBinary; its place in the tree is named.
    """
    found = _nested(space)
    for path, leaf in tree.items(found):
        if not isinstance(leaf, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
            where = f" at '{path}'" if path else ""
            raise ValueError(
                f"observation space {leaf}{where} is not supported; expected Box, Discrete, MultiDiscrete or "
                "MultiBinary, or a Dict or Tuple of those. Convert it with gymnasium.wrappers.TransformObservation."
            )
    return found


def mask_space(space: Space[Any]) -> Tree | None:
    """The tree of spaces of the action mask, or None where observations carry none."""
    if isinstance(space, spaces.Dict) and ACTION_MASK in space.spaces:
        return space_tree(space.spaces[ACTION_MASK])
    return None


def feature_space(space: Space[Any]) -> Tree:
    """`space_tree` without the action mask: what the network sees.

    Raises:
        ValueError: Nothing is left, or `space_tree` refuses the space.
    """
    features = space_tree(space)
    if mask_space(space) is not None:
        features = {key: child for key, child in features.items() if key != ACTION_MASK}
    if sum(math.prod(leaf.shape or ()) for leaf in tree.leaves(features)) == 0:
        raise ValueError(f"observation space {space}: holds nothing that a network could see")
    return features


def allowed(obs: Any) -> NDArray[np.bool_] | None:
    """The mask of one observation, flat, choice by choice; None if it has none, or one that allows nothing."""
    if not isinstance(obs, dict) or ACTION_MASK not in obs:
        return None
    mask = np.concatenate([np.ravel(leaf) for leaf in tree.leaves(obs[ACTION_MASK])]) != 0
    return mask if mask.any() else None


def is_image(space: Space[Any]) -> bool:
    """Whether a leaf holds pictures: a Box of three or four dimensions, or a grey uint8 Box of two."""
    if not isinstance(space, spaces.Box):
        return False
    return len(space.shape) in (3, 4) or (len(space.shape) == 2 and space.dtype == np.uint8)


def _nested(space: Space[Any]) -> Tree:
    """The spaces inside Dict and Tuple, whatever they are."""
    match space:
        case spaces.Dict():
            return {key: _nested(child) for key, child in space.spaces.items()}
        case spaces.Tuple():
            return tuple(_nested(child) for child in space.spaces)
        case _:
            return space
