"""Gymnasium environments in this process, one after the other: the reference that every other backend must equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import gymnasium
from gymnasium.wrappers import FrameStackObservation
from numpy.typing import NDArray

from slipstream.envs import spaces
from slipstream.envs.rows import RowCheck, Rows
from slipstream.envs.slot import Source, check_lanes, close_all, make_slots
from slipstream.envs.spaces import Actions
from slipstream.history import History
from slipstream.types import EnvSpec, EnvStep


class GymEnvs:
    """`num_envs` Gymnasium environments stepped by whoever calls `send`.

    Every episode is seeded with a function of (seed, slot, episode), so that a slot's life depends on nothing else.

    Args:
        source: What to make.
        num_envs: Slots.
        lanes: Lanes; divides `num_envs`.
        first_slot: Slot of column 0.
        played: Called after every action that brings slots back, as a sign of life.

    Raises:
        EnvError: An environment could not be made; those made before are closed.
        ValueError: An unsupported space, or lanes that don't divide `num_envs`.
    """

    def __init__(
        self,
        source: Source,
        num_envs: int,
        lanes: int = 1,
        first_slot: int = 0,
        played: Callable[[], object] = bool,
    ) -> None:
        self._played = played
        made: dict[int, gymnasium.Env[Any, Any]] = {}
        with ExitStack() as undo:
            undo.callback(close_all, source.id, made)
            first = made[first_slot] = source.make(first_slot)
            self._spec = source_spec(source, first, num_envs, lanes, first_slot)
            for slot in range(first_slot + 1, first_slot + num_envs):
                made[slot] = source.make(slot)
            rows = Rows.empty(first.observation_space, num_envs)
            self._slots = make_slots(source, range(num_envs), rows, list(made.values()), first_slot)
            undo.pop_all()
        self._actions = Actions(first.action_space, self._spec.lane_size, source.id)
        parts = [rows.part(self._spec.columns(lane)) for lane in range(lanes)]
        self._steps = [as_step(part, bool(source.score_key)) for part in parts]
        self._checks = row_checks(source, self._spec, self._actions, parts)
        self._closed = False

    @property
    def spec(self) -> EnvSpec:
        """Spaces, slots and lanes."""
        return self._spec

    def reset(self, seed: int) -> None:
        """Starts every slot at episode 0 of run `seed`."""
        for slot in self._slots:
            slot.reset(seed)

    def restore(self, lane: int, seed: int, history: History) -> None:
        """Plays the episodes of the lane's slots as far as they had come.

        Raises:
            EnvError: As `send`, or an environment could not be made anew.
        """
        for column, slot in enumerate(self._slots[self._spec.columns(lane)]):
            actions = self._actions.encode_all(history.of(column))
            slot.restore(seed, int(history.start[column]), actions, self._played)

    def send(self, action: NDArray[Any], lane: int) -> None:
        """Steps the slots of `lane`, here and now.

        Raises:
            EnvError: An environment raised, or answered with something else than its spaces promise.
            ValueError: Actions of the wrong shape, dtype or range.
        """
        actions = self._actions.encode(action)
        for slot, single in zip(self._slots[self._spec.columns(lane)], actions, strict=True):
            slot.step(single)

    def wait(self, lanes: Sequence[int]) -> list[int]:
        """All of `lanes`: they have answered when `send` returns."""
        return list(lanes)

    def recv(self, lane: int) -> EnvStep:
        """The row of the last `reset` or `send`.

        Raises:
            EnvError: A reward or observation is not finite, and not to be mended.
        """
        return self._checks[lane](self._steps[lane])

    def close(self) -> None:
        """Closes the environments; the second call does nothing."""
        if not self._closed:
            self._closed = True
            close_all(self._spec.id, dict(enumerate(self._slots, self._spec.first_slot)))


def source_spec(
    source: Source, env: gymnasium.Env[Any, Any], num_envs: int, lanes: int, first_slot: int = 0
) -> EnvSpec:
    """The spec of `num_envs` environments like `env`.

    Raises:
        ValueError: An unsupported space, or lanes that don't divide the environments.
    """
    spaces.check_observation_space(env.observation_space, source.id)
    spaces.check_action_space(env.action_space, source.id)
    return EnvSpec(
        id=source.id,
        observation_space=env.observation_space,
        action_space=spaces.policy_action_space(env.action_space),
        num_envs=num_envs,
        lanes=check_lanes(num_envs, lanes),
        deterministic=source.deterministic,
        family=source.family,
        first_slot=first_slot,
        frame_stack=env.stack_size if isinstance(env, FrameStackObservation) else 1,
        seeded_every=1 if source.deterministic else 0,
    )


def row_checks(source: Source, spec: EnvSpec, actions: Actions, lanes: Sequence[Rows]) -> list[RowCheck]:
    """What looks at the rows of each lane."""
    space, rule = spec.observation_space, source.non_finite
    return [RowCheck(actions, space, spec.slots(lane).start, rule, rows) for lane, rows in enumerate(lanes)]


def as_step(rows: Rows, scored: bool = False) -> EnvStep:
    """The rows as the protocol hands them out, with the scores if there are any; shares the memory."""
    score = rows.score if scored else None
    return EnvStep(rows.obs, rows.reward, rows.terminated, rows.truncated, rows.ended, score)
