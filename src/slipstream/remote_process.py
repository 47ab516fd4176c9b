"""The life of a collector process: an outpost that is told what to do through pipes.

Commands and answers are lines of JSON; where slots are to be brought goes with them as safetensors. Rows, weights,
where slots stand after an unroll, and the state of affairs are in shared memory.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import cloudpickle
import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream import arithmetic, memory, process, slab, tree
from slipstream.nets.policy import Policy
from slipstream.outpost import Outpost, Status, Work, acting_policy
from slipstream.standing import SlotState, Standing
from slipstream.tie import told
from slipstream.tree import Tree
from slipstream.types import EnvSpec, Place, Trajectory
from slipstream.weights import Ring, RingReplica


@dataclass(frozen=True)
class Setup:
    """What a collector process is told once.

    Attributes:
        index: Its number.
        work: Its share of the work.
        layout: Of the shared memory, from `Shared.layout`.
    """

    index: int
    work: Work
    layout: Tree

    @property
    def columns(self) -> slice:
        """Its slots among the run's."""
        spec = self.work.spec
        return slice(spec.first_slot, spec.first_slot + spec.num_envs)


class Shared(NamedTuple):
    """What driver and collector processes both see.

    Attributes:
        slabs: As `Parts.slabs`.
        ring: Weights; the driver publishes.
        status: int64 `[P, 6]`, one row per process, see `Status`.
        slots: Where the run's slots stood at the end of the last unroll; each process writes its own.
        seen: int64 `[B]`, check sums of what they showed there.
    """

    slabs: list[Trajectory]
    ring: Ring
    status: NDArray[np.int64]
    slots: SlotState
    seen: Tensor

    @staticmethod
    def layout(spec: EnvSpec, policy: Policy, rows: int, slabs: int, processes: int) -> Tree:
        """Trees of tensors without memory for `memory.share`."""
        return {
            "slabs": (slab.layout(spec, policy, rows),) * slabs,
            "ring": Ring.layout(policy),
            "status": torch.empty(processes, len(Status.EMPTY), dtype=torch.int64, device="meta"),
            "slots": SlotState.layout(spec.num_envs, tree.leaves(policy.initial_state(1))),
            "seen": torch.empty(spec.num_envs, dtype=torch.int64, device="meta"),
        }

    @staticmethod
    def over(fd: int, layout: Tree) -> Shared:
        """Maps the file."""
        mapped = memory.share(fd, layout)
        status: Tensor = mapped["status"]
        slabs, ring = [Trajectory(**part) for part in mapped["slabs"]], Ring(mapped["ring"])
        return Shared(slabs, ring, status.numpy(), SlotState(*mapped["slots"]), mapped["seen"])


def main(fds: process.Descriptors) -> None:
    """Entry point of the process."""
    arithmetic.settle()
    actor = _Actor()
    answer = partial(process.answer, fds.answers[0])
    if answer(partial(actor.make, fds)):
        for command, more in told(fds.commands):
            answer(partial(actor.obey, command, more))
    actor.close()
    process.leave()


class _Actor:
    """What the process holds."""

    def __init__(self) -> None:
        self._outpost: Outpost | None = None

    def make(self, fds: process.Descriptors) -> None:
        """Makes environments and policy."""
        setup: Setup = cloudpickle.loads(process.read_file(fds.setup))
        shared = Shared.over(fds.memory, setup.layout)
        self._slots, self._seen = shared.slots.part(setup.columns), shared.seen.numpy()[setup.columns]
        replica = RingReplica(acting_policy(setup.work), shared.ring)
        status = Status(shared.status[setup.index])
        self._outpost = Outpost(setup.work, shared.slabs, replica.policy, replica.refresh, status)

    def obey(self, command: dict[str, Any], more: BinaryIO) -> bytes | None:
        """Does what the driver says; `more` holds what comes with it."""
        assert self._outpost is not None
        if "begin" in command:
            self._outpost.begin(**command["begin"])
            return None
        if "restore" in command:
            seed, row, size = (command["restore"][name] for name in ("seed", "row", "bytes"))
            standing = Standing.of(safetensors.torch.load(more.read(size)))
            return json.dumps(self._outpost.restore(seed, row, standing)).encode()
        unroll = self._outpost.collect([Place(*place) for place in command["collect"]])
        if unroll is None:
            return None
        if unroll.slots is not None:
            self._slots.copy_(unroll.slots)
            self._seen[:] = unroll.seen
        return json.dumps(asdict(unroll.collected)).encode()

    def close(self) -> None:
        """Closes the environments."""
        if self._outpost is not None:
            self._outpost.close()
