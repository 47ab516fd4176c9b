"""The life of one worker process: makes its environments, steps lanes on command, dies with its driver.

Commands arrive on one pipe as 12 bytes (lane, seed); answers leave on one pipe per lane, so that the driver's threads
never wait for each other. Rows and actions are in shared memory; pipes carry no data but error reports.
"""

from __future__ import annotations

import faulthandler
import fcntl
import json
import os
import select
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import cloudpickle
import gymnasium
from numpy.typing import NDArray

from slipstream.envs.rows import EnvError
from slipstream.envs.shared import map_shared, read_file
from slipstream.envs.slot import Slot, Source, make_slots

COMMAND = struct.Struct("<iQ")
"""`lane, 0` steps a lane; `RESET - lane, seed` resets it."""
RESET = -1
OK, FAILED = b"k", b"f"
_MOST_REPORT = 16_000
_F_SETSIG = 10  # Linux; Python's fcntl does not name it


@dataclass(frozen=True)
class Setup:
    """What a worker is told once.

    Attributes:
        source: What its environments are made of.
        observation_space: Space of one observation, as the driver saw it.
        action_like: An array `[*A]` with the shape and dtype of one action.
        num_envs: Slots of all workers.
        workers: Number of workers.
        index: This worker.
        slots: Its slots, by lane.
    """

    source: Source
    observation_space: gymnasium.Space[Any]
    action_like: NDArray[Any]
    num_envs: int
    workers: int
    index: int
    slots: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Descriptors:
    """File descriptors that a worker inherits.

    Attributes:
        setup: File with the pickled `Setup`.
        memory: File that `map_shared` maps.
        stack: File for stacks of crashes, and of signal SIGUSR1.
        lifeline: Read end of a pipe that the driver never writes to.
        commands: Read end.
        answers: Write ends, by lane; the first also says when the environments are made.
    """

    setup: int
    memory: int
    stack: int
    lifeline: int
    commands: int
    answers: tuple[int, ...]


def main() -> None:
    """Entry point of the process; the arguments are the numbers of `Descriptors`, in order."""
    setup, memory, stack, lifeline, commands, *answers = (int(number) for number in sys.argv[1:])
    fds = Descriptors(setup, memory, stack, lifeline, commands, tuple(answers))
    _die_with_driver(fds.lifeline)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    faulthandler.enable(fds.stack)
    faulthandler.register(signal.SIGUSR1, fds.stack)
    worker = _Worker(cloudpickle.loads(read_file(fds.setup)), fds.memory)
    if _answer(fds.answers[0], worker.make):
        _serve(fds, worker)
    worker.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the environments are closed; tearing down the interpreter only costs time


class _Worker:
    """The environments of this process, by lane."""

    def __init__(self, setup: Setup, memory: int) -> None:
        shared = map_shared(memory, setup.observation_space, setup.action_like, setup.num_envs, setup.workers)
        self._setup, self._rows, self._action = setup, shared.rows, shared.action
        self._busy = shared.busy[setup.index : setup.index + 1]
        self._slots: dict[int, Slot] = {}

    def make(self) -> None:
        """Makes the environments."""
        source, indices = self._setup.source, [slot for lane in self._setup.slots for slot in lane]
        envs: list[gymnasium.Env[Any, Any]] = []
        for index in indices:
            self._busy[0] = index
            envs.append(source.make(index))
        if envs[0].observation_space != self._setup.observation_space:
            raise EnvError(
                f"{source.id}: slot {indices[0]} has observation space {envs[0].observation_space}, but the driver's "
                f"environment has {self._setup.observation_space}"
            )
        self._slots = {slot.index: slot for slot in make_slots(source, indices, self._rows, envs)}

    def reset(self, lane: int, seed: int) -> None:
        """Resets this worker's slots of `lane`."""
        for index in self._setup.slots[lane]:
            self._busy[0] = index
            self._slots[index].reset(seed)

    def step(self, lane: int) -> None:
        """Steps this worker's slots of `lane`."""
        for index in self._setup.slots[lane]:
            self._busy[0] = index
            self._slots[index].step(self._action[index])

    def close(self) -> None:
        """Closes the environments."""
        for slot in self._slots.values():
            slot.close()


def _die_with_driver(lifeline: int) -> None:
    """Has the kernel kill this process group, grandchildren included, as soon as the driver is gone.

    The driver holds the pipe's only write end. Its closing raises a signal for the owner of the read end, here SIGKILL
    for the group: it also ends an environment that hangs in C, and unlike PR_SET_PDEATHSIG it does not fire when merely
    the driver's *thread* that started the worker ends.
    """
    if sys.platform != "linux":
        return
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgid(0))
    fcntl.fcntl(lifeline, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:  # the driver died before the signal was set
        os._exit(1)


def _serve(fds: Descriptors, worker: _Worker) -> None:
    """Does what it is told until the driver closes the command pipe."""
    pending = b""
    while True:
        while len(pending) < COMMAND.size:
            data = os.read(fds.commands, 4096)
            if not data:
                return
            pending += data
        lane, seed = COMMAND.unpack_from(pending)
        pending = pending[COMMAND.size :]
        if lane >= 0:
            _answer(fds.answers[lane], partial(worker.step, lane))
        else:
            _answer(fds.answers[RESET - lane], partial(worker.reset, RESET - lane, seed))


def _answer(fd: int, task: Callable[[], None]) -> bool:
    """Runs the task and tells how it went; a report is kept short enough for a pipe that nobody reads."""
    try:
        task()
    except Exception as error:  # noqa: BLE001 (it is raised again in the driver)
        text = "".join(traceback.format_exception(error))
        report = json.dumps({"message": str(error)[:_MOST_REPORT], "traceback": text[-_MOST_REPORT:]}).encode()
        os.write(fd, FAILED + len(report).to_bytes(4, "little") + report)
        return False
    os.write(fd, OK)
    return True
