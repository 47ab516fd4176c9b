"""The measurements of benchmarks/replay.py, which runs this with an interpreter that has the peers installed.

All libraries live in one process and take turns, A B C A B C, so that whatever else the machine does meets all of them.
Prints one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import cpprb
import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import LazyTensorStorage, PrioritizedSampler

from slipstream.replay import rows
from slipstream.replay.items import transitions
from slipstream.replay.prioritized import Proportional
from slipstream.replay.windows import Windows
from slipstream.types import Trajectory

Errors = NDArray[np.float64]

ALPHA, BETA, EPSILON = 0.6, 0.4, 1e-6
OBSERVATION = (4, 84, 84)  # uint8, a stack of frames
CHUNK = 1000  # rows added at a time
SLOTS, UNROLL = 8, 25  # of Slipstream's slabs
PACKAGES = ("numpy", "torch", "cpprb", "torchrl", "tensordict")


class Replay(Protocol):
    """One library, filled with items of the given errors."""

    def step(self, errors: Errors) -> Any:
        """Draws as many items as there are errors, weighs them, then writes the errors back; returns what it drew."""
        ...


class Slipstream:
    def __init__(self, errors: Errors) -> None:
        self._count = len(errors)
        self._draws = Proportional(self._count, ALPHA, EPSILON)
        self._draws.insert(np.arange(self._count))
        self._draws.update(np.arange(self._count), errors)
        self._generator = np.random.Generator(np.random.Philox(1))

    def step(self, errors: Errors) -> Any:
        drawn = self._draws.draw(self._generator.random(len(errors)), self._count, BETA)
        self._draws.update(drawn.items, errors)
        return drawn


class SlipstreamTransitions:
    """What `ReplayLearner` does for a batch of one-step returns. Each frame is stored once, as in every run."""

    def __init__(self, errors: Errors) -> None:
        slabs = -(-len(errors) // (SLOTS * UNROLL))
        slab = slab_of_ones()
        layout = rows.layout(vars(slab), (slabs + 1) * SLOTS * UNROLL, OBSERVATION[0])
        self._rows = rows.Rows(rows.allocate(layout), UNROLL, slab.obs)
        self._windows = Windows(self._rows, 1, 1, ALPHA)
        for _ in range(slabs):
            self._windows.append(slab)
        slot, row = np.divmod(np.arange(self._windows.count), slabs * UNROLL)
        self._windows.reprioritise(slot, row, np.resize(errors, len(slot)))
        self._generator = np.random.Generator(np.random.Philox(1))

    def step(self, errors: Errors) -> Any:
        drawn = self._windows.draw(self._generator, 1, len(errors), BETA)
        slot, row = drawn.slot[0], drawn.row[0]
        batch = transitions(self._rows, slot, row, 1, 0.99, raw)
        self._windows.reprioritise(slot, row, errors)
        return batch, drawn.weight


class Cpprb:
    """It can't draw without gathering: without transitions a row is one byte."""

    def __init__(self, errors: Errors, gathers: bool = False) -> None:
        size = len(errors)
        columns: dict[str, dict[str, Any]] = {"obs": {"shape": OBSERVATION if gathers else (1,), "dtype": np.uint8}}
        if gathers:
            columns |= {"next_obs": {**columns["obs"]}, "act": {"dtype": np.int64}, "rew": {}, "done": {}}
        self._buffer = cpprb.PrioritizedReplayBuffer(size, columns, alpha=ALPHA, eps=EPSILON)
        for start in range(0, size, CHUNK):
            chunk = errors[start : start + CHUNK]
            ones = {name: np.ones((len(chunk), *column.get("shape", (1,)))) for name, column in columns.items()}
            self._buffer.add(**ones, priorities=chunk)

    def step(self, errors: Errors) -> Any:
        drawn = self._buffer.sample(len(errors), beta=BETA)
        self._buffer.update_priorities(drawn["indexes"], errors)
        return drawn


class TorchRL:
    """Its sampler and storage called directly, which leaves out what its replay buffer does around them."""

    def __init__(self, errors: Errors, gathers: bool = False, dtype: torch.dtype = torch.float32) -> None:
        self._gathers, self._dtype = gathers, dtype
        self._storage = LazyTensorStorage(len(errors))
        for start in range(0, len(errors), CHUNK):
            items = torch.arange(start, min(start + CHUNK, len(errors)))
            obs = torch.ones((len(items), *(OBSERVATION if gathers else (1,))), dtype=torch.uint8)
            one = torch.ones(len(items))
            row = {"obs": obs, "next_obs": obs, "action": one.long(), "reward": one, "done": one.bool()}
            self._storage.set(items, TensorDict(row, batch_size=[len(items)]) if gathers else obs)
        self._sampler = PrioritizedSampler(len(errors), ALPHA, BETA, eps=EPSILON, dtype=dtype)
        self._sampler.update_priority(torch.arange(len(errors)), torch.from_numpy(errors).to(dtype))

    def step(self, errors: Errors) -> Any:
        items, drawn = self._sampler.sample(self._storage, len(errors))
        batch = self._storage.get(items) if self._gathers else None
        self._sampler.update_priority(items, torch.from_numpy(errors).to(self._dtype))
        return batch, drawn


def slab_of_ones() -> Trajectory:
    """A slab in which no episode ends."""

    def columns(dtype: torch.dtype = torch.float32, value: float = 1.0) -> Tensor:
        return torch.full((UNROLL, SLOTS), value, dtype=dtype)

    never = columns(torch.bool, False)
    return Trajectory(
        obs=torch.ones((UNROLL + 1, SLOTS, *OBSERVATION), dtype=torch.uint8),
        action=columns(torch.int64),
        log_prob=columns(),
        reward=columns(),
        terminated=never,
        truncated=never,
        valid=columns(torch.bool),
        version=columns(torch.int32),
        slot=torch.arange(SLOTS),
        state0=(),
        extras={},
    )


def raw(reward: Tensor) -> Tensor:
    """Rewards as they are."""
    return reward


SAMPLING: dict[str, Callable[[Errors], Replay]] = {
    "slipstream": Slipstream,
    "cpprb": Cpprb,
    "torchrl": TorchRL,
    "torchrl, float64": lambda errors: TorchRL(errors, dtype=torch.float64),
}
WITH_OBSERVATIONS: dict[str, Callable[[Errors], Replay]] = {
    "slipstream": SlipstreamTransitions,
    "cpprb": partial(Cpprb, gathers=True),
    "torchrl": partial(TorchRL, gathers=True),
}


def measure(
    libraries: dict[str, Callable[[Errors], Replay]], capacity: int, batch: int, rounds: int, steps: int
) -> list[dict[str, float]]:
    """Microseconds of a step, by library: the median of each round."""
    generator = np.random.Generator(np.random.Philox(0))
    errors = generator.exponential(size=capacity)
    replays = {name: make(errors) for name, make in libraries.items()}
    result: list[dict[str, float]] = []
    for _ in range(rounds):
        row: dict[str, float] = {}
        for name, replay in replays.items():
            seconds: list[float] = []
            for errors in generator.exponential(size=(steps, batch)):
                start = time.perf_counter()
                replay.step(errors)
                seconds.append(time.perf_counter() - start)
            row[name] = 1e6 * statistics.median(seconds)
        result.append(row)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("capacity", "observations", "batch", "rounds", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()

    torch.set_num_threads(1)
    result = {
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "sampling": measure(SAMPLING, args.capacity, args.batch, args.rounds, args.steps),
        "with_observations": measure(WITH_OBSERVATIONS, args.observations, args.batch, args.rounds, args.steps // 10),
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
