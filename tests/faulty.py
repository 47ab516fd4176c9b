"""Environments that say when they fail, `tests.faulty:Faulty-v0`, and that fail once, `tests.faulty:Once-v0`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import gymnasium

from slipstream.envs.toy import _FAULTS, Chaos


class Faulty(Chaos):
    """Chaos that writes the time to a file just before its fault."""

    def __init__(self, path: str, fault: Any = "raise", at: int = 3) -> None:
        super().__init__(fault, at)
        self._path = Path(path)

    def step(self, action: Any) -> Any:
        if self._steps + 1 == self._at:
            self._path.write_text(str(time.monotonic()))
        return super().step(action)


class Once(Chaos):
    """Chaos whose fault comes once in all processes, or a few times, to whichever environment is there first.

    Args:
        path: A folder, where the faults that have come are noted.
        fault: As for `Chaos`.
        at: Its step; 0 is the reset.
        times: How often it comes.
        spared: A process where it never comes.
    """

    def __init__(self, path: str, fault: Any = "none", at: int = 3, times: int = 1, spared: int = 0) -> None:
        super().__init__("none", at)
        self._path, self._later, self._times, self._spared = Path(path), fault, times, spared

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        if self._at == 0 and self._comes():
            _FAULTS[self._later](())
        return super().reset(seed=seed)

    def step(self, action: Any) -> Any:
        self._fault = self._later if self._steps + 1 == self._at and self._comes() else "none"
        return super().step(action)

    def _comes(self) -> bool:
        if self._later == "none" or os.getpid() == self._spared:
            return False
        for number in range(self._times):
            try:
                (self._path / str(number)).touch(exist_ok=False)
            except FileExistsError:
                continue
            return True
        return False


gymnasium.register("Faulty-v0", Faulty)
gymnasium.register("Once-v0", Once)
