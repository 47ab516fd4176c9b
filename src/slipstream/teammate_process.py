"""The life of a process that differentiates shards: commands and answers are lines of JSON, tensors come by gloo."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import cloudpickle
import torch

from slipstream import process
from slipstream.teammate import Meeting, Teammate


def main() -> None:
    """Entry point of the process."""
    fds = process.enter()
    torch.set_num_threads(1)
    self = _Process()
    answer = partial(process.answer, fds.answers[0])
    if answer(partial(self.make, fds)):
        with open(fds.commands, "rb") as commands:
            for line in commands:
                told = json.loads(line)
                if answer(partial(self.obey, told)) and "differentiate" in told:
                    self.teammate.deliver()
    process.leave()


class _Process:
    teammate: Teammate

    def make(self, fds: process.Descriptors) -> None:
        """Makes the networks."""
        duty, rank = cloudpickle.loads(process.read_file(fds.setup))
        self.teammate = Teammate(duty, rank)

    def obey(self, told: dict[str, Any]) -> bytes | None:
        """Does what the first learner says."""
        if "join" in told:
            Meeting(**told["join"]).join(told["rank"])
            return None
        return json.dumps(self.teammate.differentiate(**told["differentiate"])).encode()
