"""Faults of environments and workers: the driver knows at once and says where, and nothing survives it."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import psutil
import pytest

from slipstream import dice
from slipstream.envs import EnvError, EnvOptions, make_envs
from slipstream.envs.toy import Chaos
from slipstream.envs.workers import WorkerEnvs
from slipstream.process import NotPortable
from tests.faulty import Rude

from .playing import assert_equal, play

LIMIT = 5.0


def gone(pids: list[int], seconds: float = LIMIT) -> bool:
    """Whether the processes end within the limit (an orphan may stay a zombie where nobody reaps)."""
    deadline = time.monotonic() + seconds
    left = list(pids)
    while left and time.monotonic() < deadline:
        left = [pid for pid in left if _lives(pid)]
        time.sleep(0.01)
    return not left


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def refuse_processes(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the system refuse to start the next few processes."""
    left, start = list(range(times)), subprocess.Popen

    def popen(*args: Any, **kwargs: Any) -> Any:
        if left:
            left.pop()
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return start(*args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", popen)


def fail(options: EnvOptions, env: str | Callable[[], gymnasium.Env[Any, Any]] = "toy:chaos") -> tuple[str, float]:
    """Steps until the fault; returns the message and the seconds from the faulty `send` to the error."""
    shm = set(os.listdir("/dev/shm"))
    envs = make_envs(env, 4, 2, options, workers=2)
    assert isinstance(envs, WorkerEnvs)
    pids = [worker.child.pid for worker in envs._workers]
    try:
        envs.reset(0)
        sent: list[float] = []
        with pytest.raises(EnvError) as caught:
            _step(envs, sent)
        seconds = time.monotonic() - sent[-1]
    finally:
        envs.close()
    assert gone(pids)
    assert set(os.listdir("/dev/shm")) == shm
    return str(caught.value), seconds


def _step(envs: WorkerEnvs, sent: list[float]) -> None:
    for _ in range(5):
        sent.append(time.monotonic())
        for lane in (0, 1):
            envs.send(np.zeros(2, np.int64), lane)
        for lane in (0, 1):
            envs.recv(lane)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raise", ["step 3", "step(0) raised RuntimeError: Chaos was told to raise", "toy.py", "in _raise"]),
        ("shape", ["step 3", "expected float32 [4], got float32 [3]"]),
        ("nan", ["step 3", "expected finite numbers as observation"]),
        ("exit", ["ended with exit code 0 while busy with slot", "step 3"]),
        ("kill", ["was killed by SIGKILL while busy with slot", "step 3"]),
        ("segfault", ["was killed by SIGSEGV while busy with slot", "step 3", "Segmentation fault", "in string_at"]),
    ],
)
def test_faults_are_reported_at_once(fault: str, words: list[str]) -> None:
    message, seconds = fail(EnvOptions(kwargs={"fault": fault, "at": 3}))
    for word in words:
        assert word in message
    assert seconds < LIMIT


@pytest.fixture
def no_pidfd(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> int:
        raise PermissionError(errno.EPERM, "pidfd_open")

    monkeypatch.setattr(os, "pidfd_open", refuse)


@pytest.mark.usefixtures("no_pidfd")
@pytest.mark.parametrize(("fault", "words"), [("raise", "Chaos was told to raise"), ("kill", "was killed by SIGKILL")])
def test_faults_are_reported_where_the_kernel_refuses_pidfds(fault: str, words: str) -> None:
    message, seconds = fail(EnvOptions(kwargs={"fault": fault, "at": 3}))
    assert words in message
    assert seconds < LIMIT


@pytest.mark.usefixtures("no_pidfd")
def test_workers_play_and_end_where_the_kernel_refuses_pidfds() -> None:
    envs = make_envs("CartPole-v1", 4, 2, workers=2)
    assert isinstance(envs, WorkerEnvs)
    pids = [worker.child.pid for worker in envs._workers]
    assert_equal(play(envs, 13), play(make_envs("CartPole-v1", 4, 2), 13))
    assert gone(pids)


def test_a_hang_ends_with_the_stack_of_the_worker() -> None:
    message, seconds = fail(EnvOptions(kwargs={"fault": "hang", "at": 3}, timeout_seconds=0.5))
    assert "no answer within 0.5 seconds" in message
    assert "busy with slot 0, step 3" in message
    assert "toy.py" in message
    assert "in step" in message
    assert seconds < LIMIT


def test_a_hang_in_c_that_keeps_the_interpreters_lock_ends_as_well() -> None:
    class Stuck(Chaos):
        def step(self, action: Any) -> Any:
            return sum(repeat(0)) if self._steps == 2 else super().step(action)

    message, seconds = fail(EnvOptions(timeout_seconds=0.5), lambda: Stuck("none"))
    assert "no answer within 0.5 seconds" in message
    assert "test_worker_failures.py" in message
    assert "in step" in message
    assert seconds < LIMIT


def test_the_death_of_all_workers_is_one_error() -> None:
    envs = make_envs("toy:chaos", 4, 2, EnvOptions(kwargs={"fault": "hang", "at": 1}), workers=2)
    assert isinstance(envs, WorkerEnvs)
    pids = [worker.child.pid for worker in envs._workers]
    envs.reset(0)
    for lane in (0, 1):
        envs.recv(lane)
        envs.send(np.zeros(2, np.int64), lane)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    start = time.monotonic()
    for lane in (0, 1):
        with pytest.raises(EnvError, match=r"was killed by SIGKILL while busy with slot \d, step [01], episode 0"):
            envs.recv(lane)
    envs.close()
    assert time.monotonic() - start < 3.0
    assert gone(pids)


def test_a_death_is_seen_while_waiting_for_another_worker() -> None:
    def factory() -> gymnasium.Env[Any, Any]:
        return OneOfUs()

    message, seconds = fail(EnvOptions(timeout_seconds=600), factory)
    assert "was killed by SIGKILL" in message
    assert seconds < LIMIT


class OneOfUs(Chaos):
    """Slot 1 (told by its seed) kills its process, while slot 0 hangs in another that is waited for first."""

    def __init__(self) -> None:
        super().__init__("hang", 2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        if seed == dice.env_seed(0, "env", 1, 0):
            self._fault = "kill"
        return super().reset(seed=seed)


class TornReport(Chaos):
    """Dies while it writes a report: the pipe holds the announcement of 1000 bytes and 9 of them."""

    def step(self, action: Any) -> Any:
        answer = int(sys.argv[7])  # of lane 0, see Descriptors, after the module
        os.write(answer, b"f" + (1000).to_bytes(4, "little") + b'{"message')
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_death_in_the_middle_of_a_report_is_a_death() -> None:
    message, seconds = fail(EnvOptions(timeout_seconds=600), TornReport)
    assert "was killed by SIGKILL while busy with slot" in message
    assert "step 1" in message
    assert seconds < LIMIT


def test_construction_that_fails_here_fails_early() -> None:
    with pytest.raises(EnvError, match="making the environment of slot 0 failed: ZeroDivisionError"):
        make_envs(lambda: 1 / 0, 2, workers=2)  # type: ignore[arg-type, return-value]


def test_what_cannot_travel_is_refused() -> None:
    lock = threading.Lock()

    def factory() -> gymnasium.Env[Any, Any]:
        with lock:
            return gymnasium.make("CartPole-v1")

    message = r"need an environment that cloudpickle can carry; TypeError: cannot pickle .* --placement.env-workers 0"
    with pytest.raises(NotPortable, match=message):
        make_envs(factory, 4, workers=2)


def test_construction_that_fails_in_a_worker() -> None:
    driver = os.getpid()

    def factory() -> gymnasium.Env[Any, Any]:
        if os.getpid() != driver:
            raise OSError("no display in worker")
        return Chaos()

    with pytest.raises(EnvError, match=r"slot \d failed: OSError: no display in worker") as caught:
        make_envs(factory, 2, workers=2)
    assert "Traceback" in str(caught.value)
    assert not [child for child in psutil.Process().children() if "worker_process" in " ".join(child.cmdline())]


def test_other_spaces_in_a_worker_are_noticed() -> None:
    driver = os.getpid()

    def factory() -> gymnasium.Env[Any, Any]:
        env = Chaos()
        if os.getpid() != driver:
            env.observation_space = gymnasium.spaces.Box(-1.0, 1.0, (5,), np.float32)
        return env

    with pytest.raises(EnvError, match="the driver's environment has"):
        make_envs(factory, 2, workers=1)


def test_close_kills_what_does_not_end() -> None:
    class Stubborn(Chaos):
        def close(self) -> None:
            if multiprocessing.current_process().name == "MainProcess" and os.getpid() != driver:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                signal.pause()

    driver = os.getpid()
    envs = make_envs(Stubborn, 2, workers=2)
    assert isinstance(envs, WorkerEnvs)
    pids = [worker.child.pid for worker in envs._workers]
    start = time.monotonic()
    envs.close()
    assert time.monotonic() - start < LIMIT
    assert gone(pids)


def test_close_ends_the_processes_that_environments_started() -> None:
    class Parent(Chaos):
        def __init__(self) -> None:
            super().__init__("none")
            if os.getpid() != driver:
                self.child = subprocess.Popen(["sleep", "600"])

    driver = os.getpid()
    envs = make_envs(Parent, 2, workers=1)
    assert isinstance(envs, WorkerEnvs)
    worker = psutil.Process(envs._workers[0].child.pid)
    pids = [worker.pid, *(child.pid for child in worker.children())]
    assert len(pids) == 3
    envs.close()
    assert gone(pids)


def test_what_an_environment_changes_in_its_process_is_not_changed_here(tmp_path: Path) -> None:
    def kept() -> tuple[Any, ...]:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return os.getcwd(), dict(os.environ), handlers, np.random.get_state()[1].tolist(), random.getstate()

    envs = make_envs(lambda: Rude(str(tmp_path / "started"), megabytes=0), 2, workers=1)
    before = kept()
    envs.reset(0)
    for _ in range(3):
        envs.send(np.zeros(2, np.int64), 0)
        envs.recv(0)
    envs.close()
    assert kept() == before
    pids = [int(line) for line in (tmp_path / "started").read_text().split()]
    assert len(pids) == 2
    assert gone(pids)


def test_using_closed_environments_is_an_error() -> None:
    envs = make_envs("CartPole-v1", 2, workers=1)
    envs.reset(0)
    envs.close()
    with pytest.raises(EnvError, match="the environments are closed"):
        envs.send(np.zeros(2, np.int64), 0)


DRIVER = """
import signal, sys, threading, numpy as np
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
from slipstream.envs import EnvOptions, make_envs
envs = []
def make():
    envs.append(make_envs("toy:chaos", 2, 1, EnvOptions(kwargs={"fault": "hang", "at": 1}), workers=2))
thread = threading.Thread(target=make)  # workers outlive the thread that made them
thread.start()
thread.join()
envs[0].reset(0)
envs[0].recv(0)
envs[0].send(np.zeros(2, np.int64), 0)
print(*(worker.child.pid for worker in envs[0]._workers), flush=True)
if sys.argv[1] == "exit":
    sys.exit(3)
envs[0].recv(0)
"""


@pytest.mark.parametrize("end", ["kill", "exit", "interrupt"])
def test_nothing_survives_the_driver(end: str) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, end], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    assert driver.stderr is not None
    pids = [int(word) for word in driver.stdout.readline().split()]
    assert len(pids) == 2
    if end == "exit":
        assert driver.wait(60) == 3
    else:
        assert all(_lives(pid) for pid in pids)
        driver.send_signal(signal.SIGKILL if end == "kill" else signal.SIGINT)
        driver.wait(60)
    assert gone(pids)
    driver.stdout.close()
    driver.stderr.close()
