"""Slots whose rows are known in advance, cut into slabs, for tests of the replay."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from slipstream.types import Trajectory

STACK = 3


@dataclass
class Row:
    """What a slot showed, did and got at one row."""

    obs: np.ndarray
    action: int
    reward: float
    terminated: bool
    truncated: bool
    valid: bool


@dataclass
class Stream:
    """One slot: episodes of random lengths with ends of all kinds; an observation stacks frames that occur once."""

    slot: int
    seed: int
    rows: list[Row] = field(default_factory=list[Row])

    def __post_init__(self) -> None:
        self.random = np.random.default_rng([self.seed, self.slot])
        self.frame = 0
        self.start()

    def start(self) -> None:
        """Begins an episode: the stack is padded, by zeros or by the first frame."""
        first = self._frame()
        padding = np.zeros_like(first) if self.random.random() < 0.5 else first
        self.stack = [padding] * (STACK - 1) + [first]
        self.dead = False

    def next(self) -> Row:
        """One more row."""
        obs = np.stack(self.stack)
        ends = self.random.random()
        if self.dead:
            row = Row(obs, int(self.random.integers(5)), 0.0, False, False, False)
            self.start()
        else:
            over = "terminated" if ends < 0.1 else "truncated" if ends < 0.2 else "life" if ends < 0.3 else ""
            reward = float(self.random.integers(-4, 5))
            action = int(self.random.integers(5))
            row = Row(obs, action, reward, over in ("terminated", "life"), over == "truncated", True)
            self.stack = [*self.stack[1:], self._frame()]
            self.dead = over in ("terminated", "truncated")
        self.rows.append(row)
        return row

    def _frame(self) -> np.ndarray:
        self.frame += 1
        number = self.slot * 1000 + self.frame
        return np.array([[number % 251, number // 251 % 251], [self.slot, number % 7]], np.uint8)


def slab(streams: list[Stream], unroll: int) -> Trajectory:
    """The next unroll of each stream, as a slab with one column for each; a stream may come twice."""
    width = len(streams)
    trajectory = Trajectory(
        obs=torch.zeros(unroll + 1, width, STACK, 2, 2, dtype=torch.uint8),
        action=torch.zeros(unroll, width, dtype=torch.int64),
        log_prob=torch.zeros(unroll, width),
        reward=torch.zeros(unroll, width),
        terminated=torch.zeros(unroll, width, dtype=torch.bool),
        truncated=torch.zeros(unroll, width, dtype=torch.bool),
        valid=torch.zeros(unroll, width, dtype=torch.bool),
        version=torch.zeros(unroll, width, dtype=torch.int32),
        slot=torch.tensor([stream.slot for stream in streams]),
        state0=(torch.zeros(width, 4),),
        extras={"value": torch.zeros(unroll + 1, width)},
    )
    for column, stream in enumerate(streams):
        trajectory.state0[0][column] = float(len(stream.rows)) + 0.25 * stream.slot
        for t in range(unroll):
            row = stream.next()
            number = len(stream.rows) - 1
            trajectory.obs[t, column] = torch.from_numpy(row.obs)
            trajectory.action[t, column] = row.action
            trajectory.reward[t, column] = row.reward
            trajectory.terminated[t, column] = row.terminated
            trajectory.truncated[t, column] = row.truncated
            trajectory.valid[t, column] = row.valid
            trajectory.log_prob[t, column] = -float(number)
            trajectory.version[t, column] = number
            trajectory.extras["value"][t, column] = 0.5 * number
        trajectory.obs[unroll, column] = torch.from_numpy(np.stack(stream.stack))
    return trajectory


def like(slots: int, unroll: int) -> dict[str, object]:
    """A slab's layout."""
    return vars(slab([Stream(slot, 0) for slot in range(slots)], unroll))


def head(stream: Stream) -> np.ndarray:
    """The observation after the last row."""
    return np.stack(stream.stack)
