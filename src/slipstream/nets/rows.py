"""Rows of observations as networks take them: their leading dimensions made one, their action mask set aside."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slipstream import tree
from slipstream.ops.distributions import ActionHead
from slipstream.ops.spaces import ACTION_MASK, feature_space, mask_space
from slipstream.tree import Tree
from slipstream.types import EnvSpec


class ObservedRows:
    """What rows `[T, B, *O]`, flat samples `[N, *O]` and the slots of a lane `[B, *O]` have in common.

    Attributes:
        masked: Whether observations carry an action mask.

    Args:
        spec: What the environments show and want.
        head: How actions are parameterised; a mask has P entries, one per choice.

    Raises:
        ValueError: Observations carry an action mask that does not fit the actions.
    """

    def __init__(self, spec: EnvSpec, head: ActionHead) -> None:
        self.masked = _has_mask(spec, head)
        self._leaf, space = tree.items(feature_space(spec.observation_space))[0]
        self._leaf_dims = len(space.shape or ())

    def flat(self, obs: Tree) -> tuple[Tree, tuple[int, ...]]:
        """The tree `[N, *O]` of rows `[..., *O]`, and the leading dimensions `...`, `(T, B)` or `(N,)`."""
        leading = self._leading(obs)
        return (tree.map(_flat_rows, obs) if len(leading) == 2 else obs), leading

    def mask(self, obs: Tree) -> Tensor | None:
        """The mask's leaves side by side, bool `[..., P]`, True where allowed; None where observations carry none."""
        if not self.masked:
            return None
        leading = len(self._leading(obs))
        return torch.cat([leaf.flatten(leading) for leaf in tree.leaves(obs[ACTION_MASK])], dim=-1) != 0

    def _leading(self, obs: Tree) -> tuple[int, ...]:
        """The dimensions that the observation has beyond its space."""
        leaf = dict(tree.items(obs))[self._leaf] if self._leaf else obs
        return tuple(leaf.shape[: leaf.dim() - self._leaf_dims])


def _flat_rows(leaf: Tensor) -> Tensor:
    """`[T, B, ...]` as `[T*B, ...]`."""
    return leaf.flatten(0, 1)


def _has_mask(spec: EnvSpec, head: ActionHead) -> bool:
    """Whether observations carry an action mask; checks that it fits the actions."""
    mask = mask_space(spec.observation_space)
    if mask is None:
        return False
    entries = sum(math.prod(leaf.shape or ()) for leaf in tree.leaves(mask))
    if head.family == "diag_gaussian" or entries != head.num_params:
        allowed = "no mask" if head.family == "diag_gaussian" else f"{head.num_params} entries, one per choice"
        raise ValueError(
            f"observation 'action_mask' has {entries} entries; the action space {spec.action_space} takes {allowed}"
        )
    return True
