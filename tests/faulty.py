"""Environments for command lines: `tests.faulty:Faulty-v0` says when it fails, `Once-v0` fails but once, `Rude-v0`."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from slipstream.envs.toy import Chaos


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
    """Chaos whose fault comes once among all environments with the same path, which is a file from then on."""

    def __init__(self, path: str, fault: Any = "raise", at: int = 3) -> None:
        super().__init__(fault, at)
        self._path, self._later = Path(path), fault

    def step(self, action: Any) -> Any:
        self._fault = "none"
        if self._steps + 1 == self._at:
            with suppress(FileExistsError):
                self._path.touch(exist_ok=False)
                self._fault = self._later
        return super().step(action)


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
