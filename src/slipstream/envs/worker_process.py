"""The life of one worker process: makes its environments, steps lanes on command, dies with its driver.

Commands of 16 bytes arrive on one pipe; answers leave on one pipe per lane, so that the driver's threads never wait for
each other. Rows and actions are in shared memory, the histories by which slots are brought back to where they were in a
file per lane; pipes carry no data but error reports, and the driver can always write to them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import partial
from typing import Any

import cloudpickle
import gymnasium
from numpy.typing import NDArray

from slipstream import process, subnormal
from slipstream.envs.rows import EnvError
from slipstream.envs.shared import map_shared
from slipstream.envs.slot import Slot, Source, close_all, make_slots
from slipstream.history import History

COMMAND = struct.Struct("<iiQ")
"""What to do with which lane, and a seed. The `History` of a lane that is to be restored is in its file."""
STEP, RESET, RESTORE = range(3)


@dataclass(frozen=True)
class Setup:
    """What a worker is told once.

    Attributes:
        source: What its environments are made of.
        observation_space: Space of one observation, as the driver saw it.
        action_like: An array `[*A]` with the shape and dtype of one action.
        num_envs: Slots of all workers.
        first_slot: Slot of column 0.
        workers: Number of workers.
        index: This worker.
        columns: Its columns, by lane.
        histories: Descriptors of files, by lane.
    """

    source: Source
    observation_space: gymnasium.Space[Any]
    action_like: NDArray[Any]
    num_envs: int
    first_slot: int
    workers: int
    index: int
    columns: tuple[tuple[int, ...], ...]
    histories: tuple[int, ...]


def main(fds: process.Descriptors) -> None:
    """Entry point of the process."""
    subnormal.flush()  # as threads do that step environments
    worker = _Worker(cloudpickle.loads(process.read_file(fds.setup)), fds.memory)
    if process.answer(fds.answers[0], worker.make):
        _serve(fds, worker)
    worker.close()
    process.leave()


class _Worker:
    """The environments of this process, by lane."""

    def __init__(self, setup: Setup, memory: int) -> None:
        shared = map_shared(memory, setup.observation_space, setup.action_like, setup.num_envs, setup.workers)
        self._setup, self._rows, self._action = setup, shared.rows, shared.action
        self._busy = shared.busy[setup.index]
        self._slots: dict[int, Slot] = {}

    def make(self) -> None:
        """Makes the environments."""
        source, first = self._setup.source, self._setup.first_slot
        columns = [column for lane in self._setup.columns for column in lane]
        envs: list[gymnasium.Env[Any, Any]] = []
        for column in columns:
            self._busy[0] = column
            envs.append(source.make(first + column))
        if envs[0].observation_space != self._setup.observation_space:
            raise EnvError(
                f"{source.id}: slot {first + columns[0]} has observation space {envs[0].observation_space}, "
                f"but the driver's environment has {self._setup.observation_space}"
            )
        self._slots = {slot.column: slot for slot in make_slots(source, columns, self._rows, envs, first)}

    def reset(self, lane: int, seed: int) -> None:
        """Resets this worker's slots of `lane`."""
        for column in self._setup.columns[lane]:
            self._busy[0] = column
            self._slots[column].reset(seed)

    def restore(self, lane: int, seed: int) -> None:
        """Brings this worker's slots of `lane` to where the histories of all its slots lead."""
        history = History.parse(process.read_file(self._setup.histories[lane]))
        first = self._setup.num_envs // len(self._setup.columns) * lane
        for column in self._setup.columns[lane]:
            self._busy[0] = column
            start, actions = int(history.start[column - first]), history.of(column - first)
            self._slots[column].restore(seed, start, actions, self._played)

    def step(self, lane: int) -> None:
        """Steps this worker's slots of `lane`."""
        for column in self._setup.columns[lane]:
            self._busy[0] = column
            self._slots[column].step(self._action[column])

    def _played(self) -> None:
        self._busy[1] += 1

    def close(self) -> None:
        """Closes the environments."""
        first = self._setup.first_slot
        close_all(self._setup.source.id, {first + column: slot for column, slot in self._slots.items()})


def _serve(fds: process.Descriptors, worker: _Worker) -> None:
    """Does what it is told until the driver closes the command pipe."""
    with open(fds.commands, "rb") as commands:
        while len(command := commands.read(COMMAND.size)) == COMMAND.size:
            what, lane, seed = COMMAND.unpack(command)
            if what == STEP:
                task = partial(worker.step, lane)
            elif what == RESET:
                task = partial(worker.reset, lane, seed)
            else:
                task = partial(worker.restore, lane, seed)
            process.answer(fds.answers[lane], task)
