"""Worker processes: the same bits as in this process, whatever their number."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading

import gymnasium
import numpy as np
import psutil
import pytest

from slipstream.envs import EnvOptions, make_envs
from slipstream.envs.workers import WorkerEnvs

from .playing import assert_equal, counter_rows, play, random_actions

OPTIONS = EnvOptions(kwargs={"script": "3t 5c 1t 2b"})


@pytest.mark.parametrize(("workers", "lanes"), [(1, 1), (2, 2), (3, 4), (2, 4), (3, 1)])
def test_every_cell_of_counter_is_known_in_advance(workers: int, lanes: int) -> None:
    played = play(make_envs("toy:counter", 4, lanes, OPTIONS, workers=workers), 37, seed=11, backwards=workers == 2)
    assert_equal(played, counter_rows(11, 4, 37, [(3, "t"), (5, "c"), (1, "t"), (2, "b")]))


@pytest.mark.parametrize(("env", "steps"), [("CartPole-v1", 61), ("Pendulum-v1", 31), ("Blackjack-v1", 13)])
def test_workers_equal_this_process(env: str, steps: int) -> None:
    options = EnvOptions(decorrelate_steps=13, max_episode_steps=23)
    inline = play(make_envs(env, 6, 2, options), steps)
    assert_equal(play(make_envs(env, 6, 2, options, workers=3), steps), inline)


def test_reset_starts_over_and_drops_what_was_due() -> None:
    envs = make_envs("CartPole-v1", 4, 2, workers=2)
    first = play(envs, 5, close=False)
    envs.send(np.zeros(2, np.int64), 1)
    assert_equal(play(envs, 5), first)


def test_callables_travel_even_if_they_are_local() -> None:
    limit = 3

    def factory() -> gymnasium.Env:
        return gymnasium.wrappers.TimeLimit(gymnasium.make("CartPole-v1").unwrapped, limit)

    played = play(make_envs(factory, 2, workers=1), 7)
    assert played.truncated[3].all()
    assert_equal(played, play(make_envs(lambda: factory(), 2), 7))


def test_threads_use_different_lanes_at_once() -> None:
    envs = make_envs("CartPole-v1", 6, 3, workers=2)
    expected = play(make_envs("CartPole-v1", 6, 3), 200)
    actions = random_actions(envs, 200)
    rows: dict[int, list[np.ndarray]] = {lane: [] for lane in range(3)}

    def run(lane: int) -> None:
        for action in actions:
            envs.send(action[envs.spec.columns(lane)], lane)
            rows[lane].append(envs.recv(lane).obs.copy())

    envs.reset(5)
    threads = [threading.Thread(target=run, args=(lane,)) for lane in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    envs.close()
    for lane in range(3):
        assert (np.stack(rows[lane]) == expected.obs[1:, envs.spec.columns(lane)]).all()


def test_slots_of_every_lane_are_spread_and_idle_workers_not_started() -> None:
    envs = make_envs("CartPole-v1", 8, 2, workers=2)
    assert isinstance(envs, WorkerEnvs)
    assert [worker.columns for worker in envs._workers] == [((0, 1), (6, 7)), ((2, 3), (4, 5))]
    envs.close()
    few = make_envs("CartPole-v1", 2, 1, workers=4)
    assert isinstance(few, WorkerEnvs)
    assert len(few._workers) == 2
    few.close()


def test_nothing_changes_in_the_driver() -> None:
    gc.collect()  # what earlier tests left must not be closed in between
    before = (dict(os.environ), os.getcwd(), set(os.listdir("/dev/shm")), psutil.Process().num_fds())
    envs = make_envs("CartPole-v1", 4, 2, workers=2)
    assert isinstance(envs, WorkerEnvs)
    assert set(os.listdir("/dev/shm")) == before[2]
    pids = [worker.child.pid for worker in envs._workers]
    envs.close()
    envs.close()
    del envs  # with the arrays goes the mapping, which holds a descriptor
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert (dict(os.environ), os.getcwd(), set(os.listdir("/dev/shm")), psutil.Process().num_fds()) == before


def test_garbage_collection_ends_the_workers() -> None:
    envs = make_envs("CartPole-v1", 2, workers=2)
    assert isinstance(envs, WorkerEnvs)
    pids = [worker.child.pid for worker in envs._workers]
    del envs
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_played_rows_are_views_that_wait_for_the_next_send() -> None:
    envs = make_envs("toy:counter", 2, workers=1)
    envs.reset(0)
    held = envs.recv(0)
    assert envs.recv(0).obs is held.obs
    envs.send(np.zeros(2, np.int64), 0)
    assert envs.recv(0).obs[:, 2].tolist() == [1, 1]
    envs.close()


def test_workers_do_without_torch() -> None:
    code = "import slipstream.envs.worker_process, slipstream.envs.factory, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
