"""Whether a row of a policy's answer depends on that row alone, to the last bit, on this machine's kernels."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from gymnasium import Space, spaces
from numpy.typing import NDArray
from torch import Tensor

from slipstream import dice, tree
from slipstream.nets.check import dummy_observations
from slipstream.nets.policy import Policy
from slipstream.nets.small import Acts, acting
from slipstream.ops.spaces import space_tree
from slipstream.tree import Tree
from slipstream.types import EnvSpec


@torch.no_grad()
def rows_are_independent(policy: Policy, spec: EnvSpec, rows: int, device: torch.device) -> bool:
    """Whether `act` on `rows` slots gives every slot the same bits whatever the other slots show.

    Two batches of random contents are mixed row by row, so that every row meets every other in both contents: in mix k
    row r comes from the batch that bit k of r names. Layers that share statistics between rows (batch normalisation in
    training mode) fail; kernels whose order of summation depends on the batch's size do not, since the size is fixed.

    Args:
        policy: Any policy.
        spec: What it sees.
        rows: Slots of one forward.
        device: Where the policy lives.
    """
    policy = copy.deepcopy(policy)  # layers with statistics over the batch would learn from what is made up here
    batches = [_random_rows(policy, spec, rows, device, number) for number in (0, 1)]
    actor = acting(policy, rows, device)
    alone = [_answer(actor, *batch) for batch in batches]
    for bit in range(max(1, (rows - 1).bit_length())):
        first = torch.from_numpy((np.arange(rows) >> bit) % 2 == 0).to(device)
        mixed: Tree = tree.map(_Mix(first), batches[0], batches[1])
        answers = _answer(actor, *mixed)
        for leaf, one, other in zip(answers, *alone, strict=True):
            if not _same_bits(leaf, _Mix(first)(one, other)):
                return False
    return True


class _Mix:
    """Rows of one tensor where `first` is True, of another elsewhere."""

    def __init__(self, first: Tensor) -> None:
        self._first = first

    def __call__(self, one: Tensor, other: Tensor) -> Tensor:
        return torch.where(self._first.view(-1, *(1,) * (one.dim() - 1)), one, other)


def _answer(actor: Acts, obs: Tree, state: Tree, uniform: Tensor) -> list[Tensor]:
    act = actor.act(obs, state, uniform)
    extras = [act.extras[name] for name in sorted(act.extras)]
    return [leaf.clone() for leaf in (act.action, act.log_prob, *tree.leaves(act.state), *extras)]


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.cpu().numpy().tobytes() == other.cpu().numpy().tobytes()


def _random_rows(
    policy: Policy, spec: EnvSpec, rows: int, device: torch.device, number: int
) -> tuple[Tree, Tree, Tensor]:
    """Observations, states and uniform numbers for `rows` slots."""
    generator = np.random.Generator(np.random.Philox(dice.seed_sequence(number, "independence")))

    def observed(space: Space[Any], like: Tensor) -> Tensor:
        return _own(_random_leaf(space, tuple(like.shape), generator), like.dtype, device)

    def remembered(leaf: Tensor) -> Tensor:
        return _own(generator.standard_normal(tuple(leaf.shape), np.float32), leaf.dtype, device)

    obs = tree.map(observed, space_tree(spec.observation_space), dummy_observations(spec.observation_space, rows))
    state = tree.map(remembered, policy.initial_state(rows))
    uniform = dice.uniform(dice.keys(number, "independence", range(rows)), 0, 1, policy.dice_width)[0]
    return obs, state, _own(uniform, torch.float32, device)


def _own(array: NDArray[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A copy in PyTorch's own memory, which is aligned: a kernel may sum in another order where it is not."""
    return torch.from_numpy(array).to(device, dtype, copy=True)


def _random_leaf(space: Space[Any], shape: tuple[int, ...], generator: np.random.Generator) -> NDArray[Any]:
    """Contents that a network tells apart: small numbers rather than the far ends of wide bounds."""
    if isinstance(space, spaces.Discrete):
        return generator.integers(space.start, space.start + space.n, shape)
    if isinstance(space, spaces.MultiDiscrete):
        return generator.integers(space.start, space.start + space.nvec, shape)
    if isinstance(space, spaces.Box) and space.dtype.kind == "f":
        return np.clip(generator.standard_normal(shape, np.float32), space.low, space.high)
    if isinstance(space, spaces.Box) and space.dtype.kind in "iu":
        low = np.maximum(space.low.astype(np.float64), -255).astype(np.int64)
        high = np.minimum(space.high.astype(np.float64), 255).astype(np.int64)
        return generator.integers(low, np.maximum(high, low), shape, endpoint=True)
    return generator.integers(0, 2, shape)
