"""Child processes of a run: how they start, report, die and are ended. Both ends, for everyone who needs processes.

    driver                                  child (a fresh interpreter, in a process group of its own)
    child = start(module, setup, memory) -> enter(): ties its life to the driver's, and only then imports the module
                                            module.main(descriptors): reads its setup, maps the memory
    writes commands                      -> does what it is told
    waits for answers and for its death  <- answer(fd, task): OK, or the error's message and traceback

No child outlives its driver: the kernel kills it as soon as the driver is gone, however that went. Nothing has a name
in the file system. Nothing here imports torch: processes that step environments start without it.
"""

from __future__ import annotations

import faulthandler
import fcntl
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Lock

import cloudpickle

CLOSE_SECONDS = 1.5
"""For children to end by themselves, and again after SIGTERM."""
START_SECONDS = 120.0
"""At least this long for starting interpreters and making environments."""
KILLED = "was killed by SIGKILL"
"""How a child ended whom nothing of its own ends so: there was no memory left, or somebody did it."""
_CHILD = "from slipstream.process import enter; enter()"
_OK, _FAILED = b"k", b"f"
_MOST_REPORT = 30_000  # bytes of a message, and of a traceback
_MOST_KIND = 100  # characters
_F_SETSIG = 10  # Linux; Python's fcntl does not name it
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class NotPortable(ValueError):  # noqa: N818 - what it says
    """What a child is to work with can't be sent to it."""


class ChildDied(Exception):  # noqa: N818 - what it says
    """The child ended before it had answered."""


class ChildFailed(Exception):  # noqa: N818 - what it says
    """A task raised in the child; the text is what it raised, in words.

    Attributes:
        kind: Name of the exception's class.
        traceback: The child's.
    """

    def __init__(self, kind: str, message: str, traceback: str) -> None:
        super().__init__(message)
        self.kind, self.traceback = kind, traceback


@dataclass(frozen=True)
class Child:
    """The driver's end of a child.

    Attributes:
        process: The process.
        pidfd: Readable when the process has ended; None where the kernel has no such thing, and pipes tell it.
        commands: Write end.
        answers: Read ends.
        lifeline: Write end that is never written to; its closing kills the child.
        stack: File in which the child leaves stacks of crashes, and of signal SIGUSR1.
    """

    process: subprocess.Popen[bytes]
    pidfd: int | None
    commands: int
    answers: tuple[int, ...]
    lifeline: int
    stack: int

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self.process.pid

    def tell(self, command: bytes) -> None:
        """Writes a command.

        Raises:
            ChildDied: Nobody is there to read it.
        """
        try:
            _write(self.commands, command)
        except BrokenPipeError:
            raise ChildDied from None

    def read(self, fd: int) -> bytes:
        """Reads one answer; call when it has begun to come.

        Raises:
            ChildDied: It breaks off.
            ChildFailed: It is the report of an error.
        """
        head = self._bytes(fd, 5)
        content = self._bytes(fd, int.from_bytes(head[1:], "little"))
        if head[:1] == _FAILED:
            raise ChildFailed(**json.loads(content))
        return content

    def ended(self, seconds: float) -> bool:
        """Whether the process ends within `seconds`; where the system allows it, its number stays taken."""
        if self.pidfd is None:
            try:
                self.process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                return False
            return True
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000.0))

    def obituary(self) -> tuple[str, str]:
        """How a child ended that was not told to (`was killed by SIGKILL`), and the stack that it left, if any."""
        if not self.ended(CLOSE_SECONDS):
            return "closed its pipes but lives on", ""
        self.kill_group()  # while its number is still taken by what is left of it
        code = self.process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return how, read_file(self.stack).decode(errors="replace")

    def stack_now(self) -> str:
        """The Python stack of a child that lives, or nothing if it does not even answer to a signal."""
        before = len(read_file(self.stack))
        self.process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + CLOSE_SECONDS
        while len(read_file(self.stack)) == before and time.monotonic() < deadline:
            time.sleep(0.01)  # a signal handler writes the stack; nothing tells when it is done
        return read_file(self.stack)[before:].decode(errors="replace")

    def kill_group(self) -> None:
        """Kills every process of the child's group that is left; nobody's once the child has been waited for."""
        if self.process.returncode is not None:
            return  # its number may be another's by now
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return  # nobody left (macOS says the latter of zombies)

    def _bytes(self, fd: int, count: int) -> bytes:
        found = b""
        while len(found) < count:
            part = os.read(fd, count - len(found))
            if not part:
                raise ChildDied
            found += part
        return found


def start(module: str, setup: bytes, memory: int, answers: int = 1, files: Sequence[int] = ()) -> Child:
    """Starts a fresh interpreter (no fork: threads, locks and CUDA stay out of it) in its own process group.

    Args:
        module: Its `main` is run, with the child's `Descriptors`.
        setup: What the child is told once; a pickle of the caller's.
        memory: A file that both sides map; stays the caller's to close.
        answers: Pipes for answers.
        files: What else the child inherits, under the same numbers; stays the caller's.
    """
    environment = {**os.environ, **dict.fromkeys(_ONE_THREAD, "1"), "PYTHONPATH": os.pathsep.join(sys.path)}
    with ExitStack() as ours, ExitStack() as theirs:
        setup_file, stack = _kept(anonymous_file(setup), theirs), _kept(anonymous_file(), ours)
        commands, lifeline = (_pipe(theirs, ours) for _ in range(2))
        pipes = [_pipe(ours, theirs) for _ in range(answers)]
        numbers = [setup_file, memory, stack, lifeline[0], commands[0], *(write for _, write in pipes)]
        process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, module, *map(str, numbers)],
            stdin=subprocess.DEVNULL,
            env=environment,
            pass_fds=[*numbers, *files],
            process_group=0,
        )
        ours.pop_all()  # the child's from now on
    reads = tuple(read for read, _ in pipes)
    return Child(process, _pidfd(process.pid), commands[1], reads, lifeline[1], stack)


def stop(children: Sequence[Child]) -> None:
    """Ends children and what they started, within a bounded time: asks, then SIGTERM, then SIGKILL; call once."""
    for child in children:
        os.close(child.commands)
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + CLOSE_SECONDS
        for child in children:
            if not child.ended(max(0.0, deadline - time.monotonic())):
                os.killpg(child.pid, number)
    for child in children:
        child.kill_group()  # processes that an environment started and forgot
        child.process.wait()
        for fd in (child.lifeline, child.stack, *child.answers):
            os.close(fd)
        if child.pidfd is not None:
            os.close(child.pidfd)


class Children:
    """Children that share memory and end together, each of which may be replaced; to be used by any thread.

    Args:
        module: As for `start`.
        memory: File that all map; closed with them.
    """

    def __init__(self, module: str, memory: int) -> None:
        self._module, self._memory = module, memory
        self._living: list[Child] = []
        self._open = True
        self._changing = Lock()

    def start(self, setup: bytes, instead: Child | None = None) -> Child:
        """Starts a child, with what it is told once, in place of one that is killed with its group if it lives yet.

        Raises:
            ChildDied: They have been closed.
            OSError: The system can't start another; `instead` has been killed, but still takes its place.
        """
        with self._changing:
            if not self._open:
                raise ChildDied
            if instead is not None:
                instead.kill_group()
            child = start(self._module, setup, self._memory)
            self._living.append(child)
            if instead is not None:
                self._living.remove(instead)
                stop([instead])
            return child

    def close(self) -> None:
        """Ends them within a bounded time; the second call does nothing."""
        with self._changing:
            if self._open:
                self._open = False
                stop(self._living)
                os.close(self._memory)


@dataclass(frozen=True)
class Descriptors:
    """File descriptors that a child inherits.

    Attributes:
        setup: File with what it is told once.
        memory: File to map.
        stack: File for stacks of crashes, and of signal SIGUSR1.
        lifeline: Read end of a pipe that the driver never writes to.
        commands: Read end.
        answers: Write ends.
    """

    setup: int
    memory: int
    stack: int
    lifeline: int
    commands: int
    answers: tuple[int, ...]


def enter() -> None:
    """The life of a child: ties it to the driver's, its stacks to a file, and goes on with the module it is told.

    That module is imported last, for it may import torch, which takes many seconds where the machine is busy.
    """
    module, *numbers = sys.argv[1:]
    setup, memory, stack, lifeline, commands, *answers = map(int, numbers)
    _die_with_driver(lifeline)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    faulthandler.enable(stack)
    faulthandler.register(signal.SIGUSR1, stack)
    importlib.import_module(module).main(Descriptors(setup, memory, stack, lifeline, commands, tuple(answers)))


def answer(fd: int, task: Callable[[], bytes | None]) -> bool:
    """Runs a task and tells its result, or the error that it raised; returns whether it went well."""
    try:
        content = task() or b""
    except Exception as error:  # noqa: BLE001 - it is raised again in the driver
        told = _json(report(error))
        _write(fd, _FAILED + len(told).to_bytes(4, "little") + told)
        return False
    _write(fd, _OK + len(content).to_bytes(4, "little") + content)
    return True


def report(error: Exception) -> dict[str, str]:
    """What `ChildFailed` is made of in the driver; with what `answer` adds below 64 kB, which a pipe holds unread."""
    traced = "".join(traceback.format_exception(error))
    return {
        "kind": type(error).__name__[:_MOST_KIND],
        "message": _beginning(str(error)),
        "traceback": _beginning(traced[::-1])[::-1],
    }


def leave() -> None:
    """Last thing in a child: ends it here, since tearing down the interpreter only costs time."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def pickled(setup: object, need: str, instead: str) -> bytes:
    """What a child is told at its start.

    Args:
        setup: Holds callables of the user's, which may be lambdas or live in `__main__`.
        need: Who needs what, for the message.
        instead: What to type where that can't be had.

    Raises:
        NotPortable: It can't be sent.
    """
    try:
        return cloudpickle.dumps(setup)
    except Exception as error:
        raise NotPortable(
            f"{need} that cloudpickle can carry; {type(error).__name__}: {error}. Pass functions that make what can't "
            f"be carried, or use {instead}"
        ) from error


def anonymous_file(content: bytes = b"") -> int:
    """A file descriptor of a file without a name, holding `content`, its position at the end.

    The kernel frees it with the last process that has it open or mapped, whoever dies how; and the size of `/dev/shm`
    does not limit it.
    """
    if sys.platform == "linux":
        fd = os.memfd_create("slipstream", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    return fd


def read_file(fd: int) -> bytes:
    """Everything that is in the file, from its start."""
    return os.pread(fd, os.fstat(fd).st_size, 0)


def write_file(fd: int, content: bytes) -> None:
    """Writes `content` in place of everything that is in the file."""
    os.ftruncate(fd, 0)
    written = 0
    while written < len(content):
        written += os.pwrite(fd, content[written:], written)


def _beginning(text: str) -> str:
    """A text as far as it takes no more than `_MOST_REPORT` bytes in JSON."""
    text = text[:_MOST_REPORT]
    while (size := len(_json(text))) > _MOST_REPORT:
        text = text[: len(text) * _MOST_REPORT // size]
    return text


def _json(content: object) -> bytes:
    """JSON in which only what can't be written otherwise is escaped, halves of surrogates among it."""
    return json.dumps(content, ensure_ascii=False).encode(errors="backslashreplace")


def _write(fd: int, content: bytes) -> None:
    while content:
        content = content[os.write(fd, content) :]


def _pipe(reader: ExitStack, writer: ExitStack) -> tuple[int, int]:
    """A pipe whose two ends are closed with the stacks."""
    read, write = os.pipe()
    return _kept(read, reader), _kept(write, writer)


def _kept(fd: int, stack: ExitStack) -> int:
    """A descriptor that is closed with the stack."""
    stack.callback(os.close, fd)
    return fd


def _pidfd(pid: int) -> int | None:
    """A descriptor that tells of the death of a process, where there is such a thing; pipes tell it otherwise."""
    if sys.platform != "linux":
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:  # older kernels and strict containers (ENOSYS, EPERM)
        return None


def _die_with_driver(lifeline: int) -> None:
    """Has the kernel kill this process group, grandchildren included, as soon as the driver is gone.

    The driver holds the pipe's only write end. Its closing raises a signal for the owner of the read end, here SIGKILL
    for the group: it also ends an environment that hangs in C, and unlike PR_SET_PDEATHSIG it does not fire when merely
    the driver's *thread* that started the child ends.
    """
    if sys.platform != "linux":
        return
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgid(0))
    fcntl.fcntl(lifeline, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:  # the driver died before the signal was set
        os._exit(1)
