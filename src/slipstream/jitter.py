"""Random delays, to show that timing changes nothing: what a busy machine does, only worse."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from slipstream.history import History
from slipstream.types import Envs, EnvSpec, EnvStep

_SHARE = 0.25


class Jitter:
    """Sleeps now and then, for a random time: a call in four, `seconds` at most.

    Its numbers come from the system's entropy on purpose: two runs never have the same delays.

    Args:
        seconds: The longest delay.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self) -> None:
        """Sleeps, or not."""
        if self.seconds > 0 and _chance() < _SHARE:
            time.sleep(_chance() * self.seconds)


class JitteredEnvs:
    """Environments whose lanes answer late now and then; `Envs` in everything else.

    Args:
        envs: The environments.
        jitter: The delays.
    """

    def __init__(self, envs: Envs, jitter: Jitter) -> None:
        self._envs, self._jitter = envs, jitter

    @property
    def spec(self) -> EnvSpec:
        """Spaces, slots and lanes."""
        return self._envs.spec

    def reset(self, seed: int) -> None:
        """Starts every slot."""
        self._envs.reset(seed)

    def restore(self, lane: int, seed: int, history: History) -> None:
        """Brings a lane back."""
        self._envs.restore(lane, seed, history)

    def send(self, action: NDArray[Any], lane: int) -> None:
        """Steps a lane, perhaps after a delay."""
        self._jitter()
        self._envs.send(action, lane)

    def wait(self, lanes: Sequence[int]) -> list[int]:
        """Waits for whichever lane answers first, and perhaps a little longer."""
        self._jitter()
        return self._envs.wait(lanes)

    def recv(self, lane: int) -> EnvStep:
        """Waits for a lane, and perhaps a little longer."""
        self._jitter()
        return self._envs.recv(lane)

    def close(self) -> None:
        """Releases what the environments hold."""
        self._envs.close()


def _chance() -> float:
    """A number in `[0, 1)` from the system's entropy."""
    return int.from_bytes(os.urandom(4), "little") / 2**32
