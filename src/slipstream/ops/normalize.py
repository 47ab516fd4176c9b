"""Running statistics that bring observations and rewards to unit scale.

Both are modules whose state is float64 buffers, so they travel with the policy in its `state_dict`. They change only
when `update` is called: the learner calls it once per update, so evaluation and acting see frozen numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import Space, spaces
from torch import Tensor, nn

from slipstream import tree
from slipstream.ops.rounds import rounds
from slipstream.ops.spaces import feature_space, is_image
from slipstream.tree import Tree

_LIMIT = 10.0
_EPSILON = 1e-8


class RunningMoments(nn.Module):
    """Mean and variance of the float vectors in a tree of observations.

    `forward(obs) = clip((obs - mean) / sqrt(var + 1e-8), -10, 10)` on floating-point leaves. Leaves that hold images,
    integers or choices, and the `action_mask`, pass through.

    Args:
        space: Observation space.
    """

    def __init__(self, space: Space[Any]) -> None:
        super().__init__()
        self._parts, width = _parts(space)
        self.moments = _Moments(width)

    @property
    def count(self) -> Tensor:
        """Rows seen, float64 scalar."""
        return self.moments.count

    @property
    def mean(self) -> Tensor:
        """Mean of all normalised leaves one after the other, float64 `[F]`."""
        return self.moments.mean

    @property
    def variance(self) -> Tensor:
        """Population variance, float64 `[F]`; 1 before the first update."""
        return self.moments.variance

    @torch.no_grad()
    def update(self, obs: Tree, valid: Tensor) -> None:
        """Takes a batch into account.

        Args:
            obs: Tree of `[..., *O]`.
            valid: bool `[...]`; dead rows are skipped.
        """
        found = dict(tree.items(obs))
        vectors = [
            found[path][valid].unsqueeze(-1).flatten(1)
            for path, part in tree.items(self._parts)
            if part.shape is not None
        ]
        if vectors:
            self.moments.update(torch.cat(vectors, dim=1).to(self.mean.device, torch.float64))

    def forward(self, obs: Tree) -> Tree:
        """The tree with its float vectors normalised, float32 `[..., *O]`; other leaves are the same tensors."""
        mean = self.mean.float()
        scale = (self.variance + _EPSILON).rsqrt().float()

        def normalise(part: _Part, leaf: Tensor) -> Tensor:
            if part.shape is None:
                return leaf
            place = slice(part.start, part.stop)
            centred = leaf - mean[place].view(part.shape)
            return (centred * scale[place].view(part.shape)).clamp(-_LIMIT, _LIMIT)

        normalised: Tree = tree.map(normalise, self._parts, obs)
        # Keys that are no features (the action mask) are passed on untouched.
        return {**obs, **normalised} if isinstance(obs, dict) else normalised


class ReturnScale(nn.Module):
    """Standard deviation of the discounted return of every slot, to bring rewards to unit scale.

    A running return `ret <- gamma * ret + r` is kept per slot; its variance over all rows seen so far is the square of
    the scale. The end of an episode resets it; the loss of a life does not.

    Args:
        num_envs: Number of slots, B.
        gamma: Discount per step.
    """

    ret: Tensor

    def __init__(self, num_envs: int, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma
        self.moments = _Moments(1)
        self.register_buffer("ret", torch.zeros(num_envs, dtype=torch.float64))

    @property
    def variance(self) -> Tensor:
        """Population variance of the running return, float64 scalar; 1 before the first update."""
        return self.moments.variance.squeeze(0)

    @torch.no_grad()
    def update(self, reward: Tensor, valid: Tensor, slot: Tensor) -> None:
        """Takes a slab into account; the running returns carry over to the next slab.

        Args:
            reward: float32 `[T, B]`, raw.
            valid: bool `[T, B]`. A dead row follows every end of an episode, so it is where the return starts again.
            slot: int64 `[B]`, the slot of each column. Columns of the same slot follow each other in time.
        """
        reward = reward.double()
        returns = torch.empty_like(reward)
        for columns in rounds(slot):
            ret = self.ret[slot[columns]]
            for t in range(len(reward)):
                ret = torch.where(valid[t, columns], self.gamma * ret + reward[t, columns], 0.0)
                returns[t, columns] = ret
            self.ret[slot[columns]] = ret
        self.moments.update(returns[valid].unsqueeze(1))

    def forward(self, reward: Tensor) -> Tensor:
        """`clip(reward / sqrt(var + 1e-8), -10, 10)`, float32, any shape; the mean is not subtracted."""
        return (reward * (self.variance + _EPSILON).rsqrt().float()).clamp(-_LIMIT, _LIMIT)


class _Moments(nn.Module):
    """Count, mean and sum of squared deviations of vectors, merged batch by batch.

    The parallel formula of Chan, Golub and LeVeque (1979), in float64: batches a (so far) and b (new), n rows each,
        mean = mean_a + delta n_b / n        M2 = M2_a + M2_b + delta^2 n_a n_b / n        delta = mean_b - mean_a
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("m2", torch.zeros(width, dtype=torch.float64))

    @property
    def variance(self) -> Tensor:
        """Population variance, `[F]`; 1 before the first update."""
        return torch.where(self.count > 0, self.m2 / self.count.clamp(min=1.0), 1.0)

    def update(self, rows: Tensor) -> None:
        """Merges float64 `rows[n, F]`; nothing happens for n = 0."""
        count = len(rows)
        if count == 0:
            return
        mean = rows.mean(0)
        delta, total = mean - self.mean, self.count + count
        self.m2 += (rows - mean).square().sum(0) + delta.square() * (self.count * count / total)
        self.mean += delta * (count / total)
        self.count += count


@dataclass(frozen=True)
class _Part:
    """Where a leaf lies in the flat statistics; `shape` is None for a leaf that passes through."""

    shape: tuple[int, ...] | None = None
    start: int = 0
    stop: int = 0


def _parts(space: Space[Any]) -> tuple[Tree, int]:
    """The `_Part` of every leaf, and the width of the flat statistics."""
    width = 0

    def part(leaf: Space[Any]) -> _Part:
        nonlocal width
        if not isinstance(leaf, spaces.Box) or is_image(leaf) or not np.issubdtype(leaf.dtype, np.floating):
            return _Part()
        start, width = width, width + math.prod(leaf.shape)
        return _Part(leaf.shape, start, width)

    return tree.map(part, feature_space(space)), width
