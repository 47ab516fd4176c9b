"""A policy that says which numbers it was given to draw with, and an environment where every action takes two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from slipstream import dice
from slipstream.nets.actor_critic import ActorCritic
from slipstream.nets.policy import Outputs
from slipstream.nets.trunk import Network
from slipstream.tree import Tree
from slipstream.types import Act, EnvSpec


class Wide(gymnasium.Env[NDArray[np.float32], NDArray[np.int64]]):
    """Episodes of five steps that show random numbers."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(0.0, 1.0, (2,), np.float32)
        self.action_space = spaces.MultiDiscrete([3, 2])
        self._t = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._t = 0
        return self.np_random.random(2, np.float32), {}

    def step(self, action: NDArray[np.int64]) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._t += 1
        return self.np_random.random(2, np.float32), 1.0, self._t == 5, False, {}


class Telling(ActorCritic):
    """Its extra `dice`, float32 `[T+1, B, D]` of a slab, is what every action was drawn with."""

    def __init__(self, spec: EnvSpec) -> None:
        super().__init__(spec, Network(hidden=(5,)))

    def answer(self, said: Outputs, state: Tree, dice: Tensor, greedy: bool = False) -> Act:
        act = super().answer(said, state, dice, greedy)
        return act._replace(extras={**act.extras, "dice": dice})


def drawn(seed: int, slots: Sequence[int], row: int, rows: int) -> Tensor:
    """What `Telling` is to say of `Wide`: the numbers of (seed, slot, row), from row number `row` on."""
    return torch.from_numpy(dice.uniform(dice.keys(seed, "act", slots), row, rows + 1, 2))
