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
from typing import Any, Protocol

import cpprb
import numpy as np
import torch
from numpy.typing import NDArray
from torchrl.data import LazyTensorStorage, PrioritizedSampler

from slipstream.replay.prioritized import Proportional

Errors = NDArray[np.float64]

ALPHA, BETA, EPSILON = 0.6, 0.4, 1e-6
OBSERVATION = (4, 84, 84)  # uint8
CHUNK = 1000  # rows added at a time
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


class Cpprb:
    """It can't draw without gathering: without observations a row is one byte."""

    def __init__(self, errors: Errors, shape: tuple[int, ...] = (1,)) -> None:
        self._buffer = cpprb.PrioritizedReplayBuffer(
            len(errors), {"obs": {"shape": shape, "dtype": np.uint8}}, alpha=ALPHA, eps=EPSILON
        )
        for start in range(0, len(errors), CHUNK):
            chunk = errors[start : start + CHUNK]
            self._buffer.add(obs=np.ones((len(chunk), *shape), np.uint8), priorities=chunk)

    def step(self, errors: Errors) -> Any:
        drawn = self._buffer.sample(len(errors), beta=BETA)
        self._buffer.update_priorities(drawn["indexes"], errors)
        return drawn


class TorchRL:
    """Its sampler and storage called directly, which leaves out what its replay buffer does around them."""

    def __init__(
        self, errors: Errors, shape: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        self._gathers, self._dtype = shape is not None, dtype
        self._storage = LazyTensorStorage(len(errors))
        for start in range(0, len(errors), CHUNK):
            rows = torch.arange(start, min(start + CHUNK, len(errors)))
            self._storage.set(rows, torch.ones((len(rows), *(shape or (1,))), dtype=torch.uint8))
        self._sampler = PrioritizedSampler(len(errors), ALPHA, BETA, eps=EPSILON, dtype=dtype)
        self._sampler.update_priority(torch.arange(len(errors)), torch.from_numpy(errors).to(dtype))

    def step(self, errors: Errors) -> Any:
        items, drawn = self._sampler.sample(self._storage, len(errors))
        rows = self._storage.get(items) if self._gathers else None
        self._sampler.update_priority(items, torch.from_numpy(errors).to(self._dtype))
        return rows, drawn


SAMPLING: dict[str, Callable[[Errors], Replay]] = {
    "slipstream": Slipstream,
    "cpprb": Cpprb,
    "torchrl": TorchRL,
    "torchrl, float64": lambda errors: TorchRL(errors, dtype=torch.float64),
}
# Slipstream's replay goes here, first, as soon as it gathers observations by itself.
WITH_OBSERVATIONS: dict[str, Callable[[Errors], Replay]] = {
    "cpprb": lambda errors: Cpprb(errors, OBSERVATION),
    "torchrl": lambda errors: TorchRL(errors, OBSERVATION),
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
