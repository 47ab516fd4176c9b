"""The memory of one row, and its check: what every backend writes and hands out as an `EnvStep`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import Space
from gymnasium.spaces import Box
from numpy.typing import NDArray

from slipstream import tree
from slipstream.envs import spaces
from slipstream.envs.options import EnvOptions, NonFinite
from slipstream.ops.spaces import ACTION_MASK, space_tree
from slipstream.tree import Tree

if TYPE_CHECKING:  # it imports torch, which worker processes do without
    from slipstream.types import BoolArray, EnvStep, FloatArray


_log = logging.getLogger(__name__)


class EnvError(RuntimeError):
    """An environment did what it may not: raised, died, or answered with something else than its spaces promise.

    The message names the environment, the slot, and its step and episode, or else rows since the reset of all slots.
    """


class EnvFailure(EnvError):  # noqa: N818 - one kind of error, not another
    """An environment raised, or its process died or hangs: it may go well if it is tried again.

    Args:
        text: The message.
        kind: What it is, without what differs from one to the next of the same kind; by default its first line.
            "" for what comes of the machine rather than of the environment, and may come often.
    """

    def __init__(self, text: str, kind: str | None = None) -> None:
        super().__init__(text)
        self.kind = text.partition("\n")[0] if kind is None else kind


@dataclass(frozen=True)
class Rows:
    """One row for `B` slots, see `EnvStep` for shapes and meaning; `score` is there even if nothing writes it.

    Attributes:
        skipped: int64 `[B]`, which of `numbers`, from 1 on, was not finite, so that the episode was cut here; 0: none.
        spike: float32 `[B]`, what it was there.
        step: int64 `[B]`, steps of the episode, if slots are what writes the row; where one fails, with that step.
        episode: int64 `[B]`, its number, likewise.
    """

    obs: Tree
    reward: FloatArray
    terminated: BoolArray
    truncated: BoolArray
    ended: BoolArray
    score: FloatArray
    skipped: NDArray[np.int64]
    spike: FloatArray
    step: NDArray[np.int64]
    episode: NDArray[np.int64]

    @staticmethod
    def empty(space: Space[Any], size: int) -> Rows:
        """Zeros for `size` slots with observations of `space`."""
        terminated, truncated, ended = (np.zeros(size, np.bool_) for _ in range(3))
        reward, score, spike = (np.zeros(size, np.float32) for _ in range(3))
        skipped, step, episode = (np.zeros(size, np.int64) for _ in range(3))
        obs = spaces.empty_observations(space, size)
        return Rows(obs, reward, terminated, truncated, ended, score, skipped, spike, step, episode)

    def numbers(self) -> list[tuple[str, NDArray[Any]]]:
        """What may not be finite, by name."""
        return [("reward", self.reward), ("score", self.score), *tree.items(self.obs, "observation")]

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
            self.skipped[slots],
            self.spike[slots],
            self.step[slots],
            self.episode[slots],
        )

    def place(self, column: int) -> str:
        """Where a slot is, for messages."""
        return f"step {self.step[column]}, episode {self.episode[column]}"


class RowCheck:
    """The last look at a lane's row: refuses what its spaces don't promise, or mends what is not finite.

    Args:
        actions: The lane's.
        space: Of one observation.
        first_slot: Slot of column 0.
        non_finite: As in `EnvOptions`.
        rows: Where slots note their steps and episodes, and that they have cut one; None where there are no such slots.
    """

    def __init__(
        self,
        actions: spaces.Actions,
        space: Space[Any],
        first_slot: int,
        non_finite: NonFinite = "raise",
        rows: Rows | None = None,
    ) -> None:
        self._actions, self._space, self._first_slot = actions, space, first_slot
        self._clamps, self._skips, self._rows = non_finite == "clamp", non_finite == "skip", rows
        self._remedy = (
            "--env-options.non-finite skip can't cut an episode at its reset, clamp goes on"
            if non_finite == "skip"
            else "--env-options.non-finite skip or clamp goes on without them"
        )
        self._told = False

    def __call__(self, step: EnvStep, count: int = 0) -> EnvStep:
        """The row, without NaN and infinity.

        The mask of an episode's last observation may leave an action without a choice: nothing is done there.

        Args:
            step: The row.
            count: Rows since the reset of all slots, for the message where slots don't note where they are.

        Raises:
            EnvError: A number is not finite and is not to be mended, or a mask leaves an action without a choice; it
                names the first slot concerned.
        """
        mended: list[BoolArray] = []
        if self._skips and self._rows is not None and self._rows.skipped.any():
            cut = self._rows.skipped > 0
            mended.append(cut)
            name, _ = self._rows.numbers()[self._rows.skipped[cut][0] - 1]
            message = self._message(cut, f"finite numbers as {name}", count, self._rows.spike)
            self._tell(f"{message}, and the episode is cut")
        score = [] if step.score is None else [("score", step.score)]
        for path, leaf in [("reward", step.reward), *score, *tree.items(step.obs, "observation")]:
            if leaf.dtype.kind == "f" and np.count_nonzero(np.isfinite(leaf)) < leaf.size:
                bad: BoolArray = np.any(~np.isfinite(leaf).reshape(len(leaf), -1), axis=1)
                message = self._message(bad, f"finite numbers as {path}", count, leaf)
                if not self._clamps:
                    raise EnvError(f"{message}; {self._remedy}")
                self._tell(f"{message}, which is clamped")
                step = self._clamped(step)
                mended.append(bad)
        if isinstance(step.obs, dict) and ACTION_MASK in step.obs:
            mask = step.obs[ACTION_MASK]
            empty = self._actions.nothing_allowed(mask) & ~step.ended
            if empty.any():
                raise EnvError(
                    self._message(empty, f"at least one choice for every action in {ACTION_MASK}", count, mask)
                )
        return step._replace(mended=int(np.any(mended, axis=0).sum())) if mended else step

    def _clamped(self, step: EnvStep) -> EnvStep:
        score = None if step.score is None else _finite(step.score)
        obs = tree.map(_finite, step.obs, space_tree(self._space))
        return step._replace(obs=obs, reward=_finite(step.reward), score=score)

    def _message(self, bad: BoolArray, expected: str, count: int, got: Tree) -> str:
        column = int(np.flatnonzero(bad)[0])
        value = tree.map(lambda leaf: leaf[column], got)
        infinite = any(np.isinf(leaf).any() for leaf in tree.leaves(value))
        why = " (float32 holds nothing beyond 3.4e38)" if infinite else ""
        place = f"row {count}" if self._rows is None else self._rows.place(column)
        return f"{self._actions.name}: slot {self._first_slot + column}, {place}: expected {expected}, got {value}{why}"

    def _tell(self, message: str) -> None:
        """Says the first time what the metrics count from then on."""
        if not self._told:
            _log.warning("%s; from here on faults/mended_rows counts, from one row of the metrics to the next", message)
        self._told = True


def require_single_resets(id: str, options: EnvOptions) -> None:
    """Refuses to skip for environments whose episodes can't be cut one by one.

    Raises:
        ValueError: Always where `options.non_finite` is `skip`.
    """
    if options.non_finite == "skip":
        raise ValueError(
            f"{id}: env_options.non_finite=skip cuts an episode, and these environments can't be reset one by one; "
            "use clamp, or raise"
        )


def _finite(leaf: NDArray[Any], space: Space[Any] | None = None) -> NDArray[Any]:
    """A copy with 0 for what is not finite, but the bounds of a Box for infinities where it has some."""
    if leaf.dtype.kind != "f":
        return leaf
    low = high = np.float32(0.0)
    if isinstance(space, Box):
        low, high = (np.where(np.isfinite(bound), bound, 0.0) for bound in (space.low, space.high))
    bounded = np.where(np.isposinf(leaf), high, np.where(np.isneginf(leaf), low, leaf))
    return np.nan_to_num(bounded).astype(leaf.dtype, copy=False)
