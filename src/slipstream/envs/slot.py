"""One Gymnasium environment at one slot: keyed seeds, the one rule for episode ends, checked rows.

`GymEnvs` and `WorkerEnvs` both run these, which is why their rows are bit-identical.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium
import numpy as np
from numpy.typing import NDArray

from slipstream import dice, tree
from slipstream.envs import spaces
from slipstream.envs.options import NonFinite
from slipstream.envs.rows import EnvError, EnvFailure, Rows
from slipstream.ops.spaces import allowed

_log = logging.getLogger(__name__)

RAISED = (Exception, SystemExit)
"""What an environment's own code may raise; one that leaves the program must not end a run without a word."""

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Source:
    """What the slots of one run are made of.

    Attributes:
        factory: Makes one environment; travels to worker processes by cloudpickle.
        id: As in `EnvSpec`.
        family: As in `EnvSpec`.
        deterministic: As in `EnvSpec`.
        decorrelate_steps: As in `EnvOptions`.
        score_key: As in `EnvOptions`.
        non_finite: As in `EnvOptions`.
    """

    factory: Callable[[], object]
    id: str
    family: str = "other"
    deterministic: bool = True
    decorrelate_steps: int = 0
    score_key: str = ""
    non_finite: NonFinite = "raise"

    def make(self, slot: int) -> gymnasium.Env[Any, Any]:
        """One environment.

        Raises:
            EnvError: The factory raised, or returned something else, or an environment without spaces.
            ImportError: A package is missing.
        """
        env = self.call(slot)
        if not isinstance(env, gymnasium.Env):
            raise EnvError(f"{self.id}: expected a gymnasium.Env for slot {slot}, got {type(env).__name__}")
        missing = [name for name in ("observation_space", "action_space") if getattr(env, name, None) is None]
        if missing:
            close_all(self.id, {slot: env})
            raise EnvError(f"{self.id}: the environment of slot {slot} ({env}) has no {' and no '.join(missing)}")
        return env

    def call(self, slot: int) -> object:
        """What the factory makes.

        Raises:
            EnvError: It raised.
            ImportError: A package is missing.
        """
        try:
            return self.factory()
        except ImportError:
            raise  # its message has the pip line
        except RAISED as error:
            raise EnvError(f"{self.id}: making the environment of slot {slot} failed: {error_line(error)}") from error


def check_lanes(num_envs: int, lanes: int) -> int:
    """`lanes`, if it splits the environments evenly.

    Raises:
        ValueError: It doesn't.
    """
    if num_envs < 1 or lanes < 1 or num_envs % lanes:
        raise ValueError(f"lanes must divide num_envs, got num_envs {num_envs} and lanes {lanes}")
    return lanes


class Slot:
    """An environment, the memory of its row, and its place in time.

    Args:
        source: What the environment was made by, for seeds and messages.
        env: The environment.
        index: The slot, for seeds and messages.
        rows: Memory for several slots.
        column: The slot's column in `rows`.
    """

    def __init__(self, source: Source, env: gymnasium.Env[Any, Any], index: int, rows: Rows, column: int) -> None:
        self._env: Any = env  # its answers are not trusted to have the types they should have
        self._source, self._index, self.column = source, index, column
        self._rows = rows
        self._write = spaces.observation_writer(env.observation_space, rows.obs)
        self._seed = self._episode = 0
        self._ended = self._broken = False

    def reset(self, seed: int) -> None:
        """Starts episode 0 of run `seed` and writes the first row, after the random steps of decorrelation."""
        self._seed, self._episode = seed, -1
        obs = self._begin()
        if self._source.decorrelate_steps:
            obs = self._decorrelate(obs)
        self._put(obs, 0.0, False, False, 0.0)

    def restore(self, seed: int, start: int, actions: NDArray[Any], played: Callable[[], object]) -> None:
        """Plays episode `start` of run `seed` as far as `actions` lead, and writes the row that they end at.

        An environment that has raised is made anew first. `played` is called after every action.
        """
        if self._broken:
            self._renew()
        if start == 0:
            self.reset(seed)
        else:
            self._seed, self._episode = seed, start - 1
            self._put(self._begin(), 0.0, False, False, 0.0)
        for action in actions:
            self.step(action)
            played()

    def step(self, action: Any) -> None:
        """Writes the row that `action` caused, or the reset if the episode had ended."""
        if self._ended:
            self._put(self._begin(), 0.0, False, False, 0.0)
            return
        self._rows.step[self.column] += 1
        answer = self._play(action)
        if self._source.non_finite == "skip":
            self._put_or_skip(*answer)
        else:
            self._put(*answer)

    def close(self) -> None:
        """Closes the environment, which may raise."""
        self._env.close()

    def _renew(self) -> None:
        with suppress(*RAISED):
            self._env.close()
        self._env = self._source.make(self._index)
        self._broken = False

    def _put(self, obs: Any, reward: float, terminated: bool, truncated: bool, score: float) -> None:
        rows, column = self._rows, self.column
        try:
            self._write(column, obs)
        except ValueError as error:
            raise EnvError(f"{self._place()}: {error}") from error
        rows.reward[column], rows.score[column] = reward, score
        rows.terminated[column] = terminated
        rows.truncated[column] = truncated
        rows.ended[column] = self._ended = terminated or truncated
        rows.skipped[column] = 0

    def _put_or_skip(self, obs: Any, reward: float, terminated: bool, truncated: bool, score: float) -> None:
        """As `_put`; the episode is cut at the observation before if a number is not finite."""
        rows, column = self._rows, self.column
        before = tree.map(lambda leaf: leaf[column].copy(), rows.obs)
        with np.errstate(over="ignore"):
            self._put(obs, reward, terminated, truncated, score)
        cells = [np.ravel(leaf[column]) for _, leaf in rows.numbers()]
        bad = [number for number, cell in enumerate(cells, 1) if not np.isfinite(cell).all()]
        if not bad:
            return
        first = cells[bad[0] - 1]
        rows.skipped[column], rows.spike[column] = bad[0], first[~np.isfinite(first)][0]
        for leaf, kept in zip(tree.leaves(rows.obs), tree.leaves(before), strict=True):
            leaf[column] = kept
        rows.reward[column] = rows.score[column] = 0.0
        rows.terminated[column] = False
        rows.truncated[column] = rows.ended[column] = self._ended = True

    def _begin(self) -> Any:
        self._episode += 1
        self._rows.step[self.column], self._rows.episode[self.column] = 0, self._episode
        return self._reset(dice.env_seed(self._seed, "env", self._index, self._episode))

    def _reset(self, seed: int) -> Any:
        try:
            answer = self._env.reset(seed=seed)
        except RAISED as error:
            self._broken = True
            raise EnvFailure(f"{self._place()}: reset raised {error_line(error)}") from error
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise EnvError(f"{self._place()}: reset must return (observation, info), got {type(answer).__name__}")
        return answer[0]

    def _play(self, action: Any) -> tuple[Any, float, bool, bool, float]:
        try:
            answer = self._env.step(action)
        except RAISED as error:
            self._broken = True
            raise EnvFailure(f"{self._place()}: step({action}) raised {error_line(error)}") from error
        if not isinstance(answer, tuple) or len(answer) != 5:
            got = f"{len(answer)} values" if isinstance(answer, tuple) else type(answer).__name__
            raise EnvError(
                f"{self._place()}: step must return (observation, reward, terminated, truncated, info), got {got}; "
                "an environment of the old Gym API needs a wrapper such as shimmy's"
            )
        obs, reward, terminated, truncated, info = answer
        score = 0.0
        if key := self._source.score_key:
            if not isinstance(info, dict) or key not in info:
                has = ", ".join(sorted(map(str, info))) if isinstance(info, dict) else type(info).__name__
                raise EnvError(f"{self._place()}: env_options.score_key={key} is not in info, which has: {has}")
            score = self._number(info[key], f"info[{key!r}]")
        flags = self._flag(terminated, "terminated"), self._flag(truncated, "truncated")
        return obs, self._number(reward, "reward"), *flags, score

    def _number(self, value: Any, what: str) -> float:
        if not isinstance(value, float | int | np.number | np.bool_):
            if not isinstance(value, np.ndarray) or value.ndim or value.dtype.kind not in "fiub":
                raise EnvError(f"{self._place()}: expected a number as {what}, got {type(value).__name__} {value!r}")
            value = value.item()
        number = float(value)
        return math.copysign(math.inf, number) if abs(number) > _LARGEST else number  # it will be a float32

    def _flag(self, value: Any, what: str) -> bool:
        if type(value) is bool:  # what nearly all answer
            return value
        bare = np.asarray(value) if isinstance(value, int) or hasattr(value, "__array__") else None  # of JAX, torch too
        if bare is None or bare.ndim or bare.dtype.kind not in "biu" or bare not in (0, 1):
            raise EnvError(f"{self._place()}: expected True or False as {what}, got {type(value).__name__} {value!r}")
        return bool(bare)

    def _decorrelate(self, obs: Any) -> Any:
        """Plays the slot's random steps; returns an observation from which the episode goes on."""
        steps, generator = random_start(self._seed, self._index, self._source.decorrelate_steps)
        actions = spaces.Actions(self._env.action_space, 1, self._source.id)
        for number in range(steps):
            action = actions.encode(actions.sample(generator, allowed(obs))[None])[0]
            obs, _, terminated, truncated, _ = self._play(action)
            if terminated or truncated:
                obs = self._reset(dice.env_seed(self._seed, "decorrelate", self._index, number))
        return obs

    def _place(self) -> str:
        return f"{self._source.id}: slot {self._index}, {self._rows.place(self.column)}"


def random_start(seed: int, slot: int, most: int) -> tuple[int, np.random.Generator]:
    """How many random steps a slot plays before its first row, in `[0, most]`, and where it draws their actions."""
    generator = np.random.Generator(np.random.Philox(dice.seed_sequence(seed, "decorrelate", slot)))
    return int(generator.integers(0, most + 1)), generator


def make_slots(
    source: Source, columns: Sequence[int], rows: Rows, envs: Sequence[gymnasium.Env[Any, Any]], first_slot: int
) -> list[Slot]:
    """Slots over environments that must all have the spaces of the first.

    Args:
        source: What the environments were made by.
        columns: Their columns in `rows`.
        rows: Memory for all columns.
        envs: The environments.
        first_slot: Slot of column 0.

    Raises:
        EnvError: An environment has other spaces than the first.
    """
    first = envs[0]
    for column, env in zip(columns, envs, strict=True):
        if env.observation_space != first.observation_space or env.action_space != first.action_space:
            raise EnvError(
                f"{source.id}: slot {first_slot + column} has spaces {env.observation_space} and {env.action_space}, "
                f"but slot {first_slot + columns[0]} has {first.observation_space} and {first.action_space}"
            )
    return [Slot(source, env, first_slot + column, rows, column) for column, env in zip(columns, envs, strict=True)]


class Closes(Protocol):
    """An environment, of whatever kind."""

    def close(self) -> object:
        """Releases what it holds; may raise."""
        ...


def close_all(id: str, envs: Mapping[int, Closes]) -> None:
    """Closes environments, given by their slots, or by the first of several.

    What they raise is a line in the log: it must not hide why a run ends, nor end one.
    """
    raised: list[str] = []
    for slot, env in envs.items():
        try:
            env.close()
        except RAISED as error:
            raised.append(f"close of slot {slot} raised {error_line(error)}")
    if raised:
        more = len(raised) - 1
        others = f" (so did those of {more} other{'s' * (more > 1)})" if more else ""
        _log.warning("%s: %s%s", id, raised[0], others)


def error_line(error: BaseException) -> str:
    """`TypeName: message`."""
    return f"{type(error).__name__}: {error}"
