"""Environments for tests: `Faulty-v0` says when it fails, `Once-v0` fails but once, `Rude-v0` has no manners."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

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


class Rude(Chaos):
    """In its second step it writes 10 MB, starts a process that it forgets, and changes what its process has but once.

    Args:
        path: File for the number of the process that it started.
        megabytes: How much to write.
    """

    def __init__(self, path: str, megabytes: int = 10) -> None:
        super().__init__("none")
        self._path, self._megabytes = Path(path), megabytes

    def step(self, action: Any) -> Any:
        if self._steps == 1:
            for _ in range(self._megabytes):
                os.write(1, b"very long line, " * 62_500)
            started = subprocess.Popen(["sleep", "600"])
            with self._path.open("a") as file:
                file.write(f"{started.pid}\n")
            os.chdir("/")
            os.environ["RUDE"] = "1"
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            np.random.seed(0)
            random.seed(0)
        return super().step(action)


gymnasium.register("Faulty-v0", Faulty)
gymnasium.register("Once-v0", Once)
gymnasium.register("Rude-v0", Rude)
