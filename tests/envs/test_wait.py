"""Waiting for whichever lane answers first: every backend plays the same rows as with lanes in turn."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from queue import SimpleQueue

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from slipstream.envs import EnvError, EnvOptions, make_envs
from slipstream.envs.receivers import Receivers
from slipstream.envs.workers import WorkerEnvs
from slipstream.types import Envs

from .playing import assert_equal, play, play_ready


def vector() -> gymnasium.vector.VectorEnv:
    return SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 2, autoreset_mode=AutoresetMode.SAME_STEP)


BACKENDS: dict[str, Callable[[], Envs]] = {
    "in this process": lambda: make_envs("CartPole-v1", 6, 3),
    "one worker": lambda: make_envs("CartPole-v1", 6, 3, workers=1),
    "workers": lambda: make_envs("CartPole-v1", 6, 3, workers=2),
    "more workers than slots of a lane": lambda: make_envs("CartPole-v1", 6, 6, workers=4),
    "atari": lambda: make_envs("ALE/Pong-v5", 4, 4, threads=1),
    "envpool": lambda: make_envs("envpool:CartPole-v1", 6, 3, threads=2),
    "vector": lambda: make_envs(vector, 6, 3),
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_lanes_that_go_on_when_ready_play_the_same_rows(backend: str) -> None:
    assert_equal(play_ready(BACKENDS[backend](), 37), play(BACKENDS[backend](), 37))


@pytest.mark.parametrize("backend", ["atari", "envpool"])
def test_reset_drops_what_was_waited_for(backend: str) -> None:
    envs = BACKENDS[backend]()
    first = play(envs, 5, close=False)
    envs.send(np.zeros(envs.spec.lane_size, np.int64), 1)
    assert envs.wait([1]) == [1]
    assert_equal(play(envs, 5), first)


def test_a_lane_without_the_answers_of_all_workers_is_not_ready() -> None:
    """Worker 1 is stopped by a signal: of its lanes none is ready, and what was under way arrives when it goes on."""
    envs = make_envs("CartPole-v1", 4, 2, workers=3)  # lane 0: workers 0 and 1; lane 1: workers 1 and 2 as shifted
    assert isinstance(envs, WorkerEnvs)
    try:
        envs.reset(5)
        for lane in (0, 1):
            envs.recv(lane)
        lanes_of = {worker.index: {lane for lane in (0, 1) if worker.columns[lane]} for worker in envs._workers}
        stopped = next(worker for worker in envs._workers if len(lanes_of[worker.index]) == 1)
        (late,) = lanes_of[stopped.index]
        os.kill(stopped.child.pid, signal.SIGSTOP)
        for lane in (0, 1):
            envs.send(np.zeros(2, np.int64), lane)
        assert envs.wait([0, 1]) == [1 - late]
        os.kill(stopped.child.pid, signal.SIGCONT)
        assert envs.wait([late]) == [late]
    finally:
        envs.close()


def test_waiting_is_over_when_a_worker_dies() -> None:
    options = EnvOptions(kwargs={"fault": "kill", "at": 1})
    envs = make_envs("toy:chaos", 4, 2, options, workers=2)
    try:
        envs.reset(0)
        for lane in envs.wait([0, 1]):
            envs.recv(lane)
        envs.send(np.zeros(2, np.int64), 0)
        assert envs.wait([0]) == [0]
        with pytest.raises(EnvError, match="was killed by SIGKILL"):
            envs.recv(0)
    finally:
        envs.close()


def test_waiting_has_a_limit() -> None:
    envs = make_envs("toy:chaos", 2, 2, EnvOptions(kwargs={"fault": "hang", "at": 1}, timeout_seconds=0.5), workers=2)
    try:
        envs.reset(0)
        for lane in (0, 1):
            envs.recv(lane)
            envs.send(np.zeros(1, np.int64), lane)
        assert envs.wait([0, 1]) == [0, 1]
        for lane in (0, 1):
            with pytest.raises(EnvError, match=r"no answer within 0\.5 seconds"):
                envs.recv(lane)
    finally:
        envs.close()


class Told:
    """A lane whose answer comes when the test says so."""

    def __init__(self) -> None:
        self.answers: SimpleQueue[Exception | None] = SimpleQueue()
        self.due = True
        self.thread = ""

    def settle(self) -> None:
        if self.due:
            error = self.answers.get()
            self.thread, self.due = threading.current_thread().name, False
            if error is not None:
                raise error


def test_a_thread_takes_the_answer_of_the_lane_that_is_first() -> None:
    lanes = [Told(), Told()]
    receivers = Receivers(lanes)
    lanes[1].answers.put(None)
    assert receivers.wait([0, 1]) == [1]
    assert lanes[1].thread == "lane-1"
    assert receivers.wait([1]) == [1]
    lanes[0].answers.put(None)
    receivers.settle(0)
    assert not lanes[0].due
    receivers.close()


def test_without_waiting_there_is_no_thread() -> None:
    lane = Told()
    lane.answers.put(None)
    Receivers([lane]).settle(0)
    assert lane.thread == threading.current_thread().name


def test_an_error_in_a_thread_is_raised_in_its_lane() -> None:
    lanes = [Told(), Told()]
    receivers = Receivers(lanes)
    lanes[0].answers.put(EnvError("slot 3"))
    assert receivers.wait([0, 1]) == [0]
    assert receivers.wait([0]) == [0]
    with pytest.raises(EnvError, match="slot 3"):
        receivers.settle(0)
    lanes[1].answers.put(None)
    receivers.settle(1)
    receivers.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lane-")]
