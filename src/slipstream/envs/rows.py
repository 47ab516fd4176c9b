"""The memory of one row: what every backend writes and hands out as an `EnvStep`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import Space
from numpy.typing import NDArray

from slipstream import tree
from slipstream.envs import spaces
from slipstream.ops.spaces import ACTION_MASK
from slipstream.tree import Tree

if TYPE_CHECKING:  # it imports torch, which worker processes do without
    from slipstream.types import BoolArray, EnvStep, FloatArray


class EnvError(RuntimeError):
    """An environment did what it may not: raised, died, or answered with something else than its spaces promise.

    The message names the environment, the slot and the step.
    """


class EnvFailure(EnvError):  # noqa: N818 - one kind of error, not another
    """An environment raised, or its process died or hangs: it may go well if it is tried again."""


@dataclass(frozen=True)
class Rows:
    """One row for `B` slots, see `EnvStep` for shapes and meaning; `score` is there even if nothing writes it."""

    obs: Tree
    reward: FloatArray
    terminated: BoolArray
    truncated: BoolArray
    ended: BoolArray
    score: FloatArray

    @staticmethod
    def empty(space: Space[Any], size: int) -> Rows:
        """Zeros for `size` slots with observations of `space`."""
        terminated, truncated, ended = (np.zeros(size, np.bool_) for _ in range(3))
        reward, score = (np.zeros(size, np.float32) for _ in range(2))
        return Rows(spaces.empty_observations(space, size), reward, terminated, truncated, ended, score)

    def part(self, slots: slice) -> Rows:
        """The same memory, restricted to some slots."""

        def cut(leaf: NDArray[Any]) -> NDArray[Any]:
            return leaf[slots]

        return Rows(
            tree.map(cut, self.obs),
            self.reward[slots],
            self.terminated[slots],
            self.truncated[slots],
            self.ended[slots],
            self.score[slots],
        )


def check_row(step: EnvStep, actions: spaces.Actions, first_slot: int, count: int) -> None:
    """Refuses NaN and infinity in rewards and float observations, and masks that leave an action without a choice.

    The mask of an episode's last observation may do so: nothing is done there.

    Args:
        step: The row.
        actions: The lane's.
        first_slot: Slot of column 0.
        count: Steps since the reset, for the message.

    Raises:
        EnvError: Names the first slot concerned.
    """

    def refuse(bad: BoolArray, expected: str, got: Tree) -> None:
        column = int(np.flatnonzero(bad)[0])
        value = tree.map(lambda leaf: leaf[column], got)
        place = f"{actions.name}: slot {first_slot + column}, step {count}"
        raise EnvError(f"{place}: expected {expected}, got {value}")

    score = [] if step.score is None else [("score", step.score)]
    for path, leaf in [("reward", step.reward), *score, *tree.items(step.obs, "observation")]:
        if leaf.dtype.kind == "f" and not np.isfinite(leaf).all():
            finite = np.isfinite(leaf).reshape(len(leaf), -1)
            refuse(np.asarray(~finite.all(axis=1)), f"finite numbers as {path}", leaf)
    if isinstance(step.obs, dict) and ACTION_MASK in step.obs:
        mask = step.obs[ACTION_MASK]
        empty = actions.nothing_allowed(mask) & ~step.ended
        if empty.any():
            refuse(empty, f"at least one choice for every action in {ACTION_MASK}", mask)
