"""The nouns of Slipstream: what crosses the borders between envs, collecting, learning and running.

Sizes: `T` rows of time, `B` env columns (slots), `A` actions, `N` flat samples, `*O` the shape of one observation.
One convention for time: row t holds o_t, a_t and the reward *caused by* a_t.

Episode ends follow one rule. `obs[t+1]` is always what truly followed `obs[t], action[t]`, the last observation of
an episode included. After a row that ended an episode the next row is *dead* (`valid` is False): its action was
ignored and its successor is the reset observation.

    row      t         t+1       t+2
    obs      s         s_end     s_reset
    valid    True      False     True
    ended    True      False     ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from gymnasium import Space
from numpy.typing import NDArray
from torch import Tensor

from slipstream.history import History
from slipstream.tree import Tree

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float32]


class EnvStep(NamedTuple):
    """One row for the `B` slots of a lane, as arrays that stay untouched until the lane's next `send`.

    Attributes:
        obs: Tree of arrays `[B, *O]`, dtype as in the spec's observation space (float64 arrives as float32).
        reward: float32 `[B]`, raw (never clipped or scaled), caused by the last action; 0 on a dead row.
        terminated: bool `[B]`, the target must not bootstrap. A life loss terminates too, see `ended`.
        truncated: bool `[B]`, the episode was cut; the target bootstraps from `obs`.
        ended: bool `[B]`, the episode is over and the next row is dead. Equal to `terminated | truncated` but for a
            life loss, which terminates the target while the episode goes on.
        score: float32 `[B]`, what counts in returns that are reported, where the reward is shaped for learning; None
            where it is the reward that counts.
        mended: How many of the slots had numbers that were not finite, which `EnvOptions.non_finite` has mended.
    """

    obs: Tree
    reward: FloatArray
    terminated: BoolArray
    truncated: BoolArray
    ended: BoolArray
    score: FloatArray | None = None
    mended: int = 0

    @property
    def reported(self) -> FloatArray:
        """The score, or the reward where there is no score."""
        return self.reward if self.score is None else self.score


@dataclass(frozen=True)
class EnvSpec:
    """What the rest of the library may know about a set of environments.

    Its columns are numbered `0 .. num_envs-1`; lane `l` owns the columns `l*lane_size .. (l+1)*lane_size - 1`. Where
    several sets of environments share a run, column c is the run's slot `first_slot + c`, and seeds and messages go by
    slots.

    Attributes:
        id: What the user typed (`ALE/Pong-v5`, `envpool:gfootball/...`), or the name of a callable.
        observation_space: Space of one observation. Box, Discrete, MultiDiscrete, MultiBinary, Dict and Tuple of those.
        action_space: Space of one action. Discrete, MultiDiscrete or Box.
        num_envs: Number of slots.
        lanes: Number of lanes; divides `num_envs`.
        frames_per_step: Emulator frames per agent decision (4 on Atari with frame skip 4, otherwise 1).
        deterministic: Whether the same seed and actions give the same observations; False makes the run say so.
        family: Preset family: `atari`, `gfootball`, `classic`, `mujoco`, `toy` or `other`.
        first_slot: Slot of column 0, in a set that is a part of a run's environments.
        frame_stack: Frames, the newest last, that observations stack along their first axis; 1 for none.
        seeded_every: Rows of a slot after which its next reset takes a seed of its own again, keyed by (seed, slot,
            number of such resets): 1 where every episode has one. 0 where only the first reset does, so that a slot
            can't be brought back to where it was.
    """

    id: str
    observation_space: Space[Any]
    action_space: Space[Any]
    num_envs: int
    lanes: int = 1
    frames_per_step: int = 1
    deterministic: bool = True
    family: str = "other"
    first_slot: int = 0
    frame_stack: int = 1
    seeded_every: int = 0

    @property
    def lane_size(self) -> int:
        """Slots per lane."""
        return self.num_envs // self.lanes

    def columns(self, lane: int) -> slice:
        """Columns of this set that `lane` owns."""
        return slice(lane * self.lane_size, (lane + 1) * self.lane_size)

    def slots(self, lane: int) -> range:
        """Slots of the run that `lane` owns."""
        first = self.first_slot + lane * self.lane_size
        return range(first, first + self.lane_size)


class Envs(Protocol):
    """`num_envs` environments behind one contract, whatever runs them.

    The loop that calls it, for every lane on its own (lanes may run in any order and in different threads; one lane is
    only ever used by one thread at a time):

        envs.reset(seed)
        step = envs.recv(lane)              # first observations, reward 0, no flag set
        while True:
            envs.send(action, lane)         # returns at once where the backend has its own threads or processes
            step = envs.recv(lane)          # waits for all slots of the lane

    Whoever has several lanes under way may ask `wait` which of them can be received without waiting.
    """

    @property
    def spec(self) -> EnvSpec:
        """Spaces, slots and lanes."""
        ...

    def reset(self, seed: int) -> None:
        """Starts every slot from its own seed, a function of (seed, slot) only.

        The observations are collected with `recv`.
        """
        ...

    def restore(self, lane: int, seed: int, history: History) -> None:
        """Brings the slots of `lane` to where their histories under `reset(seed)` led, whatever has happened to them.

        In place of a `reset`, or after the lane has failed, in which case whatever is broken is made anew. The row that
        the lane shows then is collected with `recv`. Only where `spec.seeded_every` is positive.

        Args:
            lane: The lane.
            seed: That of the run.
            history: Of the lane's slots.
        """
        ...

    def send(self, action: NDArray[Any], lane: int) -> None:
        """Steps the slots of `lane`; a slot whose episode ended is reset and its action ignored.

        Args:
            action: `[B, *A]`, int64 for Discrete and MultiDiscrete, float32 for Box (clipped to the bounds here).
            lane: The lane to step.
        """
        ...

    def wait(self, lanes: Sequence[int]) -> list[int]:
        """Waits until at least one of `lanes` has answered its last `reset` or `send`.

        Args:
            lanes: Lanes of the caller, at least one.

        Returns:
            Some of them, at least one, whose `recv` will not wait (it may raise what went wrong).
        """
        ...

    def recv(self, lane: int) -> EnvStep:
        """Waits for the answer to the lane's last `reset` or `send`."""
        ...

    def close(self) -> None:
        """Releases processes, threads and memory; may be called twice."""
        ...


class Act(NamedTuple):
    """What a policy decided for `B` slots.

    Attributes:
        action: `[B, *A]`, int64 or float32.
        log_prob: float32 `[B]`, log-probability of `action` under the acting policy, summed over action dimensions.
        state: Tree `[B, ...]` to pass to the next `act`; an empty tuple for a feed-forward policy.
        extras: Further columns that the algorithm declared (`value` float32 `[B]` for actor-critics).
    """

    action: Tensor
    log_prob: Tensor
    state: Tree
    extras: Mapping[str, Tensor]


@dataclass(frozen=True)
class Trajectory:
    """A slab: `T` rows of `B` slots, time-major, preallocated and reused; all that goes from acting to learning.

    Row T of `obs` and of the extras belongs to the next slab's row 0; it is there to bootstrap from.

    Attributes:
        obs: Tree `[T+1, B, *O]`.
        action: `[T, B, *A]`.
        log_prob: float32 `[T, B]`.
        reward: float32 `[T, B]`, raw.
        terminated: bool `[T, B]`.
        truncated: bool `[T, B]`.
        valid: bool `[T, B]`, False on dead rows. The collector is its only author.
        version: int32 `[T, B]`, the weights that chose the action.
        slot: int64 `[B]`, the env slot of each column; column b is slot b unless the schedule is `async`.
        state0: Tree `[B, ...]`, recurrent state before row 0 (already zeroed where an episode starts there).
        extras: `[T+1, B, ...]` columns that the algorithm declared.
    """

    obs: Tree
    action: Tensor
    log_prob: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    valid: Tensor
    version: Tensor
    slot: Tensor
    state0: Tree
    extras: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def rows(self) -> int:
        """T."""
        return self.reward.shape[0]

    @property
    def columns(self) -> int:
        """B."""
        return self.reward.shape[1]


class Place(NamedTuple):
    """Where the unroll of one lane goes.

    Attributes:
        slab: Number of the slab.
        column: First column of the lane in it.
    """

    slab: int
    column: int


@dataclass(frozen=True)
class Episode:
    """One finished episode, as its slot saw it.

    Attributes:
        slot: The env slot.
        row: Rows the slot had collected when the episode ended, dead rows included (orders episodes in time).
        length: Agent decisions.
        reward: Sum of raw rewards, or of scores where the environments have them (the return that is reported).
        shaped: Sum of raw rewards where scores are reported instead, else None.
        truncated: Whether a limit ended it.
    """

    slot: int
    row: int
    length: int
    reward: float
    shaped: float | None
    truncated: bool


@dataclass(frozen=True)
class Weights:
    """Immutable snapshot of what acting needs.

    Attributes:
        version: Updates that went into it; 0 before the first.
        tensors: Names and values of the policy's parameters and buffers.
        ready: When they have their values, on a GPU; other streams than that of the learner wait for it.
    """

    version: int
    tensors: dict[str, Tensor]
    ready: torch.Event | None = None


@dataclass(frozen=True)
class Report:
    """What a schedule yields after every update.

    Attributes:
        update: Updates so far; equals the version of the weights.
        steps: Agent decisions so far (valid rows only).
        metrics: `train/*`, `lag/*`, `wait/*` scalars of this update; tensors stay on their device until read.
        episodes: Episodes that ended since the last report, ordered by (row, slot).
        seconds: Wall-clock seconds by stage since the last report: `collect` (the learner only waited for rows),
            `learn` and, inside collecting and summed over workers, `env` (waiting for environments) and `infer`.
        trajectory: What was learned from; untouched until the next report is asked for.
    """

    update: int
    steps: int
    metrics: Mapping[str, Tensor | float]
    episodes: tuple[Episode, ...]
    seconds: Mapping[str, float]
    trajectory: Trajectory
