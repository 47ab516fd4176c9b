"""Gymnasium's or a user's own `gymnasium.vector.VectorEnv`, one per lane, with its autoreset brought to the one rule.

The rule wants a dead row after an episode: its action is ignored, its successor is the reset observation.

- NEXT_STEP does just that.
- SAME_STEP resets within the step that ends the episode. Its true last observation is in `info["final_obs"]`; on the
  dead row the fresh episode is stepped with the others, and then reset again with the seed of (seed, slot, episode).
- DISABLED is told to reset as soon as an episode ends, and from there on is like SAME_STEP.

Gymnasium's SyncVectorEnv and AsyncVectorEnv take one seed per slot, so in the latter two modes a slot's episodes are
those that `GymEnvs` would play, at the price of one or two extra resets. Others get one integer, as the API says:
that of the first slot concerned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from numpy.typing import NDArray

from slipstream import dice, tree
from slipstream.envs import spaces
from slipstream.envs.gym import as_step
from slipstream.envs.options import NonFinite
from slipstream.envs.rows import EnvError, RowCheck, Rows
from slipstream.envs.slot import RAISED, Source, check_lanes, close_all, error_line
from slipstream.envs.spaces import Actions
from slipstream.history import History
from slipstream.tree import Tree
from slipstream.types import BoolArray, EnvSpec, EnvStep

Vector = VectorEnv[Any, Any, Any]


class VectorEnvs:
    """Vector environments made by a callable, each with as many environments as a lane has slots.

    In NEXT_STEP mode only the first episode is seeded; later ones use the environments' own streams.

    Args:
        factory: Makes one vector environment; called once per further lane.
        first: The one of lane 0; closed with the others, also where construction fails.
        id: Name, for messages.
        num_envs: Slots.
        lanes: Lanes; divides `num_envs`.
        first_slot: Slot of column 0.
        non_finite: As in `EnvOptions`, but for `skip`.
        family: As in `EnvSpec`.

    Raises:
        EnvError: The callable raised.
        ValueError: A missing or unknown autoreset mode, another number of environments than a lane has slots, or an
            unsupported space.
    """

    def __init__(
        self,
        factory: Callable[[], object],
        first: Vector,
        id: str,
        num_envs: int,
        lanes: int,
        first_slot: int = 0,
        non_finite: NonFinite = "raise",
        family: str = "other",
    ) -> None:
        made = {first_slot: first}
        with ExitStack() as undo:
            undo.callback(close_all, id, made)
            size = num_envs // check_lanes(num_envs, lanes)
            source = Source(factory, id)
            for start in range(first_slot + size, first_slot + num_envs, size):
                made[start] = _made(source, start)
            for vector in made.values():
                if vector.num_envs != size:
                    raise ValueError(
                        f"{id}: the vector environment has {vector.num_envs} environments, but a lane has {size} slots "
                        f"(num_envs {num_envs} over {lanes} lanes)"
                    )
            spaces.check_observation_space(first.single_observation_space, id)
            self._actions = Actions(first.single_action_space, size, id)
            self._lanes = [_Lane(vector, id, self._actions, start, non_finite) for start, vector in made.items()]
            undo.pop_all()
        self._spec = EnvSpec(
            id=id,
            observation_space=first.single_observation_space,
            action_space=spaces.policy_action_space(first.single_action_space),
            num_envs=num_envs,
            lanes=lanes,
            family=family,
            first_slot=first_slot,
        )

    @property
    def spec(self) -> EnvSpec:
        """Spaces, slots and lanes."""
        return self._spec

    def reset(self, seed: int) -> None:
        """Starts every slot at episode 0 of run `seed`."""
        for lane in self._lanes:
            lane.reset(seed)

    def restore(self, lane: int, seed: int, history: History) -> None:
        """Not possible: episodes after a slot's first have no seeds of their own."""
        raise NotImplementedError(f"{self._spec.id} can't be brought back to where it was")

    def send(self, action: NDArray[Any], lane: int) -> None:
        """Steps the vector environment of `lane`, here and now.

        Raises:
            EnvError: It raised, or answered with something else than its spaces and its autoreset mode promise.
            ValueError: Actions of the wrong shape, dtype or range.
        """
        self._lanes[lane].step(self._actions.encode(action))

    def wait(self, lanes: Sequence[int]) -> list[int]:
        """All of `lanes`: they have answered when `send` returns."""
        return list(lanes)

    def recv(self, lane: int) -> EnvStep:
        """The row of the last `reset` or `send`.

        Raises:
            EnvError: A reward or observation is not finite.
        """
        return self._lanes[lane].row()

    def close(self) -> None:
        """Closes the vector environments; the second call does nothing."""
        lanes, self._lanes = self._lanes, []
        close_all(self._spec.id, {lane.first_slot: lane.vector for lane in lanes})


class _Lane:
    """A vector environment, the row it filled, and the episodes its slots are in."""

    def __init__(self, vector: Vector, id: str, actions: Actions, first_slot: int, non_finite: NonFinite) -> None:
        self.vector, self._id, self.first_slot = vector, id, first_slot
        self._check = RowCheck(actions, vector.single_observation_space, first_slot, non_finite)
        self._mode = autoreset_mode(vector, id)
        self._seeds_per_slot = isinstance(vector.unwrapped, SyncVectorEnv | AsyncVectorEnv)
        self._rows = Rows.empty(vector.single_observation_space, vector.num_envs)
        self._write = spaces.observation_writer(vector.single_observation_space, self._rows.obs)
        self._plain = isinstance(vector.single_observation_space, Box)
        self._episode = [0] * vector.num_envs
        self._seed = self._count = 0

    def reset(self, seed: int) -> None:
        self._seed, self._count, self._episode = seed, 0, [0] * self.vector.num_envs
        self._show(self._call_reset(None))
        for array in (self._rows.reward, self._rows.terminated, self._rows.truncated, self._rows.ended):
            array.fill(0)

    def step(self, action: NDArray[Any]) -> None:
        self._count += 1
        rows, dead = self._rows, self._rows.ended.copy()
        try:
            obs, reward, terminated, truncated, info = self.vector.step(action)
        except RAISED as error:
            raise EnvError(f"{self._place()}: step raised {error_line(error)}") from error
        self._show(obs)
        rows.reward[:] = self._column(reward, "numbers as reward", "fiub")
        rows.terminated[:] = self._flags(terminated, "terminated")
        rows.truncated[:] = self._flags(truncated, "truncated")
        if np.count_nonzero(dead):
            self._bury(dead)
        np.logical_or(rows.terminated, rows.truncated, out=rows.ended)
        if np.count_nonzero(rows.ended):
            self._end(info)

    def row(self) -> EnvStep:
        return self._check(as_step(self._rows), self._count)

    def _flags(self, value: Any, what: str) -> NDArray[Any]:
        expected = f"True or False as {what}"
        flags = self._column(value, expected, "biu")
        if flags.dtype != np.bool_ and not np.isin(flags, (0, 1)).all():
            raise EnvError(f"{self._place()}: expected {expected}, got {flags}")
        return flags

    def _column(self, value: Any, expected: str, kinds: str) -> NDArray[Any]:
        """What has come, if it is one value of those kinds for each slot."""
        expected = f"{expected}, one for each of {self.vector.num_envs} slots"
        try:
            column = np.asarray(value)
        except (TypeError, ValueError) as error:  # lists of unequal lists, tensors of another device
            raise EnvError(f"{self._place()}: expected {expected}, got {type(value).__name__}: {error}") from error
        if column.shape != (self.vector.num_envs,) or column.dtype.kind not in kinds:
            got = f"{type(value).__name__} {column.dtype} {list(column.shape)}"
            raise EnvError(f"{self._place()}: expected {expected}, got {got}")
        return column

    def _end(self, info: dict[str, Any]) -> None:
        """Shows the last observations of episodes, and has their slots reset where nobody else does."""
        final = info.get("final_obs")
        if (final is not None) != (self._mode is AutoresetMode.SAME_STEP):
            is_there = "are" if final is not None else "are not"
            raise EnvError(
                f"{self._place()}: autoreset_mode says {self._mode.name}, but at the end of an episode last "
                f"observations {is_there} in info['final_obs'], as only SAME_STEP has them; is it another mode?"
            )
        if self._mode is AutoresetMode.SAME_STEP:
            self._fill([int(column) for column in np.flatnonzero(self._rows.ended)], final)
        elif self._mode is AutoresetMode.DISABLED:
            self._call_reset(self._rows.ended.copy())

    def _bury(self, dead: BoolArray) -> None:
        """Makes the rows of slots whose episode had ended dead ones, which hold the reset observation."""
        rows = self._rows
        if self._mode is AutoresetMode.NEXT_STEP:
            flagged = dead & (rows.terminated | rows.truncated | (rows.reward != 0))
            if np.count_nonzero(flagged):
                slot = self.first_slot + int(np.flatnonzero(flagged)[0])
                raise EnvError(
                    f"{self._place()}: autoreset_mode says NEXT_STEP, but slot {slot} has a reward or an end on the "
                    "step that should have reset it; is it another mode?"
                )
            return
        for column in np.flatnonzero(dead):
            self._episode[column] += 1
        before = tree.map(np.copy, rows.obs)
        self._show(self._call_reset(dead))
        alive = ~dead
        for old, new in zip(tree.leaves(before), tree.leaves(rows.obs), strict=True):
            if not np.array_equal(old[alive], new[alive], equal_nan=old.dtype.kind == "f"):
                raise EnvError(f"{self._place()}: reset(options={{'reset_mask': mask}}) changed slots outside the mask")
        rows.reward[dead], rows.terminated[dead], rows.truncated[dead] = 0.0, False, False

    def _call_reset(self, mask: BoolArray | None) -> Any:
        columns = range(self.vector.num_envs) if mask is None else [int(column) for column in np.flatnonzero(mask)]
        seeds: list[int | None] = [None] * self.vector.num_envs
        for column in columns:
            seeds[column] = dice.env_seed(self._seed, "env", self.first_slot + column, self._episode[column])
        reset: Any = self.vector.reset  # its annotation knows nothing of lists
        try:
            seed = seeds if self._seeds_per_slot else seeds[columns[0]]
            return reset(seed=seed, options=None if mask is None else {"reset_mask": mask})[0]
        except RAISED as error:
            raise EnvError(f"{self._place()}: reset raised {error_line(error)}") from error

    def _show(self, obs: Tree) -> None:
        """Takes the observations of all slots: at once where that is one array as it should be."""
        mine = self._rows.obs
        if self._plain and isinstance(obs, np.ndarray) and (obs.shape, obs.dtype) == (mine.shape, mine.dtype):
            mine[...] = obs
        else:
            self._fill(range(self.vector.num_envs), obs)

    def _fill(self, columns: Sequence[int], obs: Tree) -> None:
        try:
            for column in columns:
                self._write(column, _pick(obs, column))
        except (ValueError, IndexError, KeyError) as error:
            raise EnvError(f"{self._place()}: {error}") from error

    def _place(self) -> str:
        return f"{self._id}: slots {self.first_slot} to {self.first_slot + self.vector.num_envs - 1}, row {self._count}"


def _made(source: Source, start: int) -> Vector:
    """The vector environment of a further lane, from slot `start` on."""
    made = source.call(start)
    if not isinstance(made, VectorEnv):
        raise ValueError(
            f"{source.id}: expected another vector environment for slot {start}, got {type(made).__name__}"
        )
    return made


def autoreset_mode(vector: Vector, id: str) -> AutoresetMode:
    """The mode that the vector environment declares in its metadata.

    Raises:
        ValueError: None, or one that Gymnasium does not know.
    """
    declared = vector.metadata.get("autoreset_mode")
    try:
        return AutoresetMode(declared)
    except ValueError:
        raise ValueError(
            f"{id}: metadata['autoreset_mode'] is {declared!r}; set it to AutoresetMode.NEXT_STEP, SAME_STEP or "
            "DISABLED of gymnasium.vector, whichever is true"
        ) from None


def _pick(batch: Tree, column: int) -> Tree:
    """One observation of a batch."""
    if isinstance(batch, dict):
        return {key: _pick(child, column) for key, child in batch.items()}
    if isinstance(batch, tuple):
        return tuple(_pick(child, column) for child in batch)
    return batch[column]
