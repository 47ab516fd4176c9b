"""Trees of arrays: a leaf, a dict of trees (sorted by key) or a tuple of trees.

Observations of `Dict` and `Tuple` spaces, recurrent states and slabs are trees, so one set of functions
walks them all. A leaf is anything that is not a `dict` or a `tuple`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Tree = Any
"""A leaf (tensor, array, space), `dict[str, Tree]` or `tuple[Tree, ...]`. Recursive: opaque to the type checker."""


def map(function: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """The tree of `function(leaf, *leaves of the others at the same place)`."""
    if isinstance(tree, dict):
        return {key: map(function, tree[key], *(other[key] for other in others)) for key in sorted(tree)}
    if isinstance(tree, tuple):
        return tuple(map(function, *children) for children in zip(tree, *others, strict=True))
    return function(tree, *others)


def leaves(tree: Tree) -> list[Any]:
    """All leaves, dicts in key order."""
    return [leaf for _, leaf in items(tree)]


def items(tree: Tree, prefix: str = "") -> list[tuple[str, Any]]:
    """All `(path, leaf)` pairs; the path joins keys and positions with a dot and is empty for a bare leaf."""
    if isinstance(tree, dict):
        children = [(str(key), tree[key]) for key in sorted(tree)]
    elif isinstance(tree, tuple):
        children = [(str(position), child) for position, child in enumerate(tree)]
    else:
        return [(prefix, tree)]
    join = f"{prefix}." if prefix else ""
    return [pair for key, child in children for pair in items(child, join + key)]
