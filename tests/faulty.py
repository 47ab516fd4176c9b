"""An environment that says when it fails: `tests.faulty:Faulty-v0`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import gymnasium

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


gymnasium.register("Faulty-v0", Faulty)
