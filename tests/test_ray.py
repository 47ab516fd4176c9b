"""Collectors in Ray actors: the same bits as in this process, on any node; faults are seen, and leave nothing."""

from __future__ import annotations

import os
import platform
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import psutil
import pytest

from slipstream import process, ray_link
from slipstream.collector import Stopped
from slipstream.envs import EnvError, EnvOptions
from slipstream.outpost import Work
from slipstream.ray_cluster import ClusterError
from slipstream.ray_link import Actors
from slipstream.remote import Remotes
from slipstream.run.presets import configure
from slipstream.run.training import Training
from slipstream.run.verify import verify
from slipstream.types import Place

from .envs.test_worker_failures import gone
from .test_remote import COLUMNS_OF, SHARES, Faulty, assert_equal, common_error, contents, inline, remote, weights, work

ray: Any = pytest.importorskip("ray")

LIMIT = 10.0


def actors(job: Work, address: str = "", shares: Sequence[range] = SHARES) -> Remotes:
    return Remotes(job, shares, partial(_medium, address))


def _medium(address: str, job: Work, parts: Sequence[Work]) -> Actors:
    return Actors(job, parts, address, 2)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    psutil.Process(pid).wait() if psutil.pid_exists(pid) else None


def family() -> set[int]:
    """Processes of this test, which may be of earlier tests."""
    return {child.pid for child in psutil.Process().children(recursive=True)}


def listening() -> set[str]:
    """Addresses on which they listen, and this one does."""
    found = [each for pid in {os.getpid(), *family()} for each in psutil.Process(pid).net_connections("tcp")]
    return {each.laddr.ip for each in found if each.status == psutil.CONN_LISTEN}


def test_a_private_cluster_gives_the_bits_of_this_process_and_leaves_nothing() -> None:
    before, environment, others = listening(), dict(os.environ), family()
    job = replace(work("CartPole-v1", EnvOptions(decorrelate_steps=5)), restarts=3)
    remotes = actors(job)
    try:
        started = family() - others
        assert listening() - before <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
        versions = [0, 1, 2, 5]
        assert_equal(remote(remotes, job, 11, 0, versions), inline(job, 11, 0, versions))

        def another_dies(unroll: int) -> None:
            if unroll:
                kill(remotes.collectors[unroll - 1].pid)

        found = remote(remotes, job, 12, 35, [5, 6, 7], another_dies)
        assert_equal(found, inline(job, 12, 35, [5, 6, 7]))
        assert remotes.restarted == 2
    finally:
        remotes.close()
    assert gone(list(started))
    remotes.close()
    with pytest.raises(EnvError, match="are closed"):
        remotes.collectors[0].collect([Place(0, 0), Place(0, 2)])
    assert dict(os.environ) == environment
    assert not ray.is_initialized()


def test_unrolls_that_are_told_of_ahead_have_the_same_bits_also_after_a_death() -> None:
    job = replace(work("CartPole-v1"), restarts=3, ahead=2)
    versions = [0] * 6
    remotes = actors(job, shares=[range(0, 3)])
    try:
        (collector,) = remotes.collectors
        remotes.begin(11, 0)
        remotes.publish(weights(job.policy, 0))
        unrolls = [[Place(number % 2, column) for column in COLUMNS_OF[number % 2]] for number in range(6)]
        found: list[Any] = []
        for number, places in enumerate(unrolls):
            if number in (2, 5):  # with two unrolls to go that it was told of, and with none
                kill(collector.pid)
            collected = [collector.collect(places, unrolls[number + 1 : number + 3])]
            found.append(contents(remotes.slabs[number % 2], collected))
        assert_equal(found, inline(job, 11, 0, versions))
        assert remotes.restarted == 2
        remotes.begin(12, 0)
        collector.collect(unrolls[0], unrolls[1:3])
        again = remote(remotes, job, 13, 0, versions[:2])  # two answers are due that nobody wants any more
        assert_equal(again, inline(job, 13, 0, versions[:2]))
    finally:
        remotes.close()


DRIVER = """
import psutil
from tests.test_ray import Place, actors, weights, work
from slipstream.envs import EnvOptions
job = work("toy:chaos", EnvOptions(kwargs={"fault": "hang", "at": 2}))
remotes = actors(job)
remotes.begin(11, 0)
remotes.publish(weights(job.policy, 0))
print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
remotes.collectors[1].collect([Place(0, 4)])
"""


def test_nothing_survives_the_driver() -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE)
    assert driver.stdout is not None
    pids = [int(word) for word in driver.stdout.readline().split()]
    assert len(pids) > 4
    driver.kill()
    driver.wait()
    driver.stdout.close()
    assert gone(pids)


def test_no_cluster_at_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether nobody answers, which is seen before Ray tries for minutes, or somebody who is no cluster."""
    monkeypatch.setattr(ray, "init", _refuse)
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        place = {"placement.collectors": "ray", "placement.address": f"127.0.0.1:{port}"}
        config = configure("ppo", "CartPole-v1", place)
        with pytest.raises(
            ClusterError, match=rf"at 127\.0\.0\.1:{port} can't be joined: no cluster\. The command has"
        ):
            Training(config)
    with pytest.raises(ClusterError, match=rf"can't be joined: nobody answers at .*:{port}, Connection refused\. The"):
        Training(config)


def _refuse(**options: Any) -> None:
    raise ConnectionError("no cluster")


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_lost_node_is_done_without(nodes: Any) -> None:
    job = replace(work("CartPole-v1"), restarts=3)
    other = nodes.add_node(num_cpus=2)
    nodes.wait_for_nodes()
    remotes = actors(job, shares=[range(0, 1), range(1, 2), range(2, 3)])
    try:

        def node_dies(unroll: int) -> None:
            if unroll == 1:
                nodes.remove_node(other)

        found = remote(remotes, job, 12, 0, [0, 1, 2, 3], node_dies)
        assert_equal(found, inline(job, 12, 0, [0, 1, 2, 3]))
        assert remotes.restarted == 1
    finally:
        remotes.close()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_an_error_stops_all_and_says_where(nodes: Any) -> None:
    job = work(lambda: Faulty("raise", 4))
    remotes = actors(job)
    try:
        message, seconds = common_error(remotes, job)
        assert seconds < LIMIT
        for words in ("slot 4, step 4, episode 0: step(", "raised RuntimeError: Chaos was told to raise", "in _raise"):
            assert words in message
        assert f"in collector actor (process {remotes.collectors[1].pid} on " in message
    finally:
        remotes.close()


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("hang", "has done nothing for 1 seconds, while busy with slots 4 to 5, row 4"),
        ("kill", "has died (ActorDiedError: its worker process has died"),
    ],
)
def test_a_fault_that_comes_again_is_the_end(nodes: Any, fault: Any, words: str) -> None:
    job = replace(work(lambda: Faulty(fault, 4), EnvOptions(timeout_seconds=1.0)), restarts=3)
    remotes = actors(job)
    try:
        remotes.begin(11, 0)
        remotes.publish(weights(job.policy, 0))
        with pytest.raises(EnvError) as raised:
            remotes.collectors[1].collect([Place(0, 4)])
        assert words in str(raised.value)
        assert "slots 4 to 5" in str(raised.value)
        assert remotes.restarted == 1
    finally:
        remotes.close()


class Once(Faulty):
    """The fault comes once: a file says that it has been there."""

    def __init__(self, fault: Any, at: int, mark: Path) -> None:
        super().__init__(fault, at)
        self._mark = mark

    def step(self, action: Any) -> Any:
        if self._fault != "none" and self._steps + 1 == self._at:
            if self._mark.exists():
                self._fault = "none"
            self._mark.touch()
        return super().step(action)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("fault", ["kill", "raise"])
def test_a_fault_in_the_middle_of_an_unroll_changes_no_bit(nodes: Any, fault: Any, tmp_path: Path) -> None:
    job = replace(work(lambda: Once(fault, 10, tmp_path / "mark")), restarts=3)
    remotes = actors(job)
    try:
        found = remote(remotes, job, 11, 0, [0, 1, 2])
        assert (tmp_path / "mark").exists()
        assert remotes.restarted == 1
        assert_equal(found, inline(job, 11, 0, [0, 1, 2]))
    finally:
        remotes.close()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_cluster_that_is_too_small_is_said(nodes: Any, caplog: pytest.LogCaptureFixture) -> None:
    job = work("CartPole-v1")
    parts = [replace(job, spec=replace(job.spec, num_envs=2, lanes=1, first_slot=2 * lane)) for lane in range(3)]
    for others, said in ((1, []), (2, ["this run takes 5 cores, and the Ray cluster has 4 in all: it waits until"])):
        caplog.clear()
        Actors(job, parts, "", 2, others).close()
        assert [record.message.rpartition(" more nodes")[0] for record in caplog.records] == said


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_actors_wait_for_room(nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Blocker:
        def ready(self) -> None:
            pass

    blockers = [ray.remote(num_cpus=2)(Blocker).remote() for _ in range(2)]
    ray.get([blocker.ready.remote() for blocker in blockers])
    said = Event()
    words: list[str] = []

    def warn(text: str, *values: Any) -> None:
        words.append(text % values)
        if len(words) == 2:  # more than the limit for starting has passed
            said.set()

    monkeypatch.setattr(ray_link, "_PATIENCE_SECONDS", 3.0)
    monkeypatch.setattr(process, "START_SECONDS", 1.0)
    monkeypatch.setattr(ray_link._log, "warning", warn)
    job = work("CartPole-v1", EnvOptions(timeout_seconds=1.0))
    with ThreadPoolExecutor() as pool:
        tasks = [pool.submit(actors, job), pool.submit(actors, job)]
        assert said.wait(60)
        for blocker in blockers:
            ray.kill(blocker)
        for task in tasks:
            task.result(60).close()
    assert "an actor has not started yet: it needs 1 cores of one node" in words[0]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_stopped_actors_start_again(nodes: Any) -> None:
    job = work("CartPole-v1")
    remotes = actors(job)
    try:
        remote(remotes, job, 13, 0, [1])
        remotes.collectors[1].stop()
        with pytest.raises(Stopped):
            remotes.collectors[1].collect([Place(0, 4)])
        assert_equal(remote(remotes, job, 12, 0, [5, 6]), inline(job, 12, 0, [5, 6]))
    finally:
        remotes.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("schedule", ["sync", "concurrent"])
@pytest.mark.parametrize(("algo", "env"), [("ppo", "CartPole-v1"), ("impala", "CartPole-v1"), ("ppo", "ALE/Pong-v5")])
def test_the_same_bits_as_inline(nodes: Any, algo: str, env: str, schedule: str) -> None:
    settings = {"schedule": schedule, "num_envs": 8, "lanes": 4, "unroll": 16, "total_steps": 10_000}
    config = configure(algo, env, settings)
    outcomes = list(verify(config, 5, ["ray:1", "ray:2", "ray:4"], 1e-3))
    assert [(outcome.difference, outcome.refused, outcome.updates) for outcome in outcomes] == [(None, None, 5)] * 4


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_async_goes_on_without_an_actor_that_dies(nodes: Any) -> None:
    settings = {"schedule": "async", "num_envs": 8, "lanes": 4, "unroll": 16, "placement.collectors": "ray"}
    config = configure("appo", "CartPole-v1", settings | {"placement.workers": 4, "total_steps": 8_000})
    training = Training(config)
    try:
        assert training._remotes is not None
        for report in training:
            if report.update == 5:
                kill(training._remotes.collectors[2].pid)
        assert report.steps >= 8_000
        assert report.metrics["faults/restarts"] == 1.0
        assert float(report.metrics["lag/max"]) <= config.max_lag
        assert report.metrics["cluster/nodes"] == 2.0
        assert report.metrics["cluster/megabytes"] > 0.0
        assert 0.0 < report.metrics["cluster/store_used_megabytes"] < report.metrics["cluster/store_size_megabytes"]
        assert report.metrics["cluster/store_spilled_megabytes"] == 0.0
        prefix = f"cluster/steps_{platform.node()}_"
        steps = [float(value) for name, value in report.metrics.items() if name.startswith(prefix)]
        assert len(steps) == 2
        assert report.steps <= sum(steps)
    finally:
        training.close()
