"""Collector processes: the same bits as in this process; faults are known at once, and nothing survives them."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import gymnasium
import psutil
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from slipstream import device, patience, process, slab, tree
from slipstream.collector import Assignment, Collected, Collector, Stopped
from slipstream.envs import EnvError, EnvOptions, make_envs
from slipstream.envs.make import env_spec
from slipstream.envs.toy import Chaos, Counter
from slipstream.nets.actor_critic import ActorCritic, make_actor_critic
from slipstream.nets.trunk import Network
from slipstream.outpost import Work
from slipstream.patience import Patience
from slipstream.remote import Remotes
from slipstream.remote_collector import RemoteCollector
from slipstream.run.config import ConfigError
from slipstream.run.presets import configure
from slipstream.run.training import Training
from slipstream.types import Place, Trajectory, Weights

from .envs.test_worker_failures import gone, refuse_processes

COLUMNS, LANES, ROWS, SLABS = 6, 3, 7, 2
COLUMNS_OF = [0, 2, 4], [0, 4, 2]  # of the lanes, in either slab: the last two change places
SHARES = [range(0, 2), range(2, 3)]
LIMIT = 5.0


def work(env: str | Callable[[], Any], options: EnvOptions | None = None) -> Work:
    spec = env_spec(env, COLUMNS, LANES, options)
    policy = make_actor_critic(spec, Network(hidden=(5,), core="lstm", core_size=4), None, 2)
    return Work(env, options or EnvOptions(), 0, 0, spec, policy, ROWS, SLABS, seed=3)


def weights(policy: ActorCritic, version: int) -> Weights:
    """Different ones for every version."""
    return Weights(version, {name: value + 0.1 * version for name, value in policy.state_dict().items()})


def run(collectors: Sequence[Any], lanes: Sequence[range], index: int) -> list[Collected]:
    """All collectors at once."""
    places = [[Place(index, COLUMNS_OF[index][lane]) for lane in share] for share in lanes]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda pair: pair[0].collect(pair[1]), zip(collectors, places, strict=True)))


def inline(job: Work, seed: int, row: int, versions: Sequence[int], workers: int = 0) -> list[Any]:
    """What a collector of all lanes in this process finds: columns and episodes of every slab."""
    envs = make_envs(job.env, COLUMNS, LANES, job.options, workers=workers)
    try:
        envs.reset(seed)
        slabs = [slab.allocate(job.spec, job.policy, ROWS) for _ in range(SLABS)]
        policy = make_actor_critic(job.spec, Network(hidden=(5,), core="lstm", core_size=4), None, 2)
        version = [0]
        collector = Collector(Assignment(envs, range(LANES), policy, slabs, job.seed, lambda: version[0], row=row))
        found: list[Any] = []
        for number, version[0] in enumerate(versions):
            policy.load_state_dict(weights(job.policy, version[0]).tensors)
            collected = run([collector], [range(LANES)], number % SLABS)
            found.append(contents(slabs[number % SLABS], collected))
        return found
    finally:
        envs.close()


def remote(
    remotes: Remotes,
    job: Work,
    seed: int,
    row: int,
    versions: Sequence[int],
    before: Callable[[int], object] = bool,
) -> list[Any]:
    """The same, from collector processes; `before` is called with the number of every unroll."""
    remotes.begin(seed, row)
    found: list[Any] = []
    for number, version in enumerate(versions):
        before(number)
        remotes.publish(weights(job.policy, version))
        collected = run(
            remotes.collectors, [range(c.lanes[0], c.lanes[-1] + 1) for c in remotes.collectors], number % 2
        )
        found.append(contents(remotes.slabs[number % SLABS], collected))
    return found


def contents(trajectory: Trajectory, collected: list[Collected]) -> Any:
    columns = {name: value.clone() for name, value in vars(trajectory).items() if isinstance(value, torch.Tensor)}
    trees = {name: tree.map(torch.clone, vars(trajectory)[name]) for name in ("obs", "state0", "extras")}
    episodes = sorted((e for part in collected for e in part.episodes), key=lambda e: (e.row, e.slot))
    return {**columns, **trees}, episodes, sum(part.steps for part in collected)


def assert_equal(one: list[Any], other: list[Any]) -> None:
    for (columns, *facts), (same, *others) in zip(one, other, strict=True):
        for (name, a), (_, b) in zip(tree.items(columns), tree.items(same), strict=True):
            assert torch.equal(a, b), name
        assert facts == others


@pytest.fixture(scope="module")
def played() -> Iterator[tuple[Remotes, Work]]:
    """Two processes for several tests; any callable travels."""

    def factory() -> gymnasium.Env[Any, Any]:
        return gymnasium.wrappers.TimeLimit(gymnasium.make("CartPole-v1").unwrapped, 5)

    job = work(factory, EnvOptions(decorrelate_steps=5))
    remotes = Remotes(job, SHARES)
    yield remotes, job
    remotes.close()


def test_processes_give_the_bits_of_this_process(played: tuple[Remotes, Work]) -> None:
    remotes, job = played
    versions = [0, 1, 2, 5]
    found = remote(remotes, job, 11, 0, versions)
    assert_equal(found, inline(job, 11, 0, versions))
    assert [int(columns["version"].unique()) for columns, _, _ in found] == versions
    assert found[1][0]["slot"].tolist() == [0, 1, 4, 5, 2, 3]
    assert {episode.slot for _, episodes, _ in found for episode in episodes} == set(range(COLUMNS))


def test_they_start_afresh_at_any_row(played: tuple[Remotes, Work]) -> None:
    remotes, job = played
    assert_equal(remote(remotes, job, 12, 35, [5, 6]), inline(job, 12, 35, [5, 6]))


def test_stopped_collectors_start_again(played: tuple[Remotes, Work]) -> None:
    remotes, job = played
    remote(remotes, job, 13, 0, [1])
    remotes.collectors[1].stop()
    with pytest.raises(Stopped):
        remotes.collectors[1].collect([Place(0, 4)])
    assert_equal(remote(remotes, job, 12, 0, [5, 6]), inline(job, 12, 0, [5, 6]))


def test_what_befell_one_run_is_not_said_of_the_next() -> None:
    driver, failing = os.getpid(), 12

    class Choosy(Counter):
        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            from slipstream import dice

            if os.getpid() != driver and seed == dice.env_seed(failing, "env", 4, 0):
                raise ValueError("not this seed")
            return super().reset(seed=seed)

    job = work(lambda: Choosy())
    remotes = Remotes(job, SHARES)
    try:
        remotes.begin(failing, 0)
        remotes.publish(weights(job.policy, 1))
        with pytest.raises(EnvError, match="not this seed"):
            remotes.collectors[1].collect([Place(0, 4)])
        remotes.begin(11, 0)
        remotes.collectors[0].stop()
        with pytest.raises(Stopped):
            remotes.collectors[0].collect([Place(0, 0), Place(0, 2)])
    finally:
        remotes.close()


def test_vector_environments_one_per_lane() -> None:
    def factory() -> SyncVectorEnv:
        return SyncVectorEnv([lambda: Counter("2t 3c")] * 2, autoreset_mode=AutoresetMode.SAME_STEP)

    job = work(factory)
    remotes = Remotes(replace(job, every_row=True, delay=1e-3), [range(0, 3)])
    try:
        assert_equal(remote(remotes, job, 11, 0, [1, 2]), inline(job, 11, 0, [1, 2]))
    finally:
        remotes.close()


def test_environments_in_processes_of_the_collectors_own() -> None:
    job = work("toy:counter")
    remotes = Remotes(replace(job, workers=3), SHARES)
    try:
        pids = [child.pid for part in remotes.collectors for child in psutil.Process(part.pid).children()]
        assert len(pids) == 2
        assert_equal(remote(remotes, job, 11, 0, [1, 2]), inline(job, 11, 0, [1, 2], workers=1))
        step, start, mend = remotes.collectors[0]._limits  # longer than what its own workers are given
        assert step > job.options.timeout_seconds + process.CLOSE_SECONDS
        assert start >= 2 * process.START_SECONDS
        assert mend > step + start
    finally:
        remotes.close()
    assert gone(pids)


class Faulty(Chaos):
    """Slot 4 alone has the fault, told by its seed."""

    slot = 4

    def __init__(self, fault: Any, at: int) -> None:
        super().__init__("none", at)
        self._later = fault

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        from slipstream import dice

        if seed == dice.env_seed(11, "env", self.slot, 0):
            self._fault = self._later
        return super().reset(seed=seed)


def fail(fault: str, timeout: float = 300.0) -> tuple[str, float, list[int]]:
    """What both collectors raise after the fault, the seconds it took, and their processes."""
    gc.collect()  # what earlier tests left must not be closed in between
    names, fds = set(os.listdir("/dev/shm")), psutil.Process().num_fds()
    job = work(lambda: Faulty(fault, 4), EnvOptions(timeout_seconds=timeout))
    remotes = Remotes(job, SHARES)
    pids = [collector.pid for collector in remotes.collectors]
    assert set(os.listdir("/dev/shm")) == names
    try:
        message, seconds = common_error(remotes, job)
    finally:
        remotes.close()
    del remotes
    gc.collect()
    assert gone(pids)
    assert set(os.listdir("/dev/shm")) == names
    assert psutil.Process().num_fds() == fds
    return message, seconds, pids


def common_error(remotes: Remotes, job: Work) -> tuple[str, float]:
    """The one error that both collectors raise, and the seconds until then."""
    remotes.begin(11, 0)
    remotes.publish(weights(job.policy, 0))
    begun = time.monotonic()
    with ThreadPoolExecutor() as pool:
        tasks = [pool.submit(_forever, collector) for collector in remotes.collectors]
        one, other = (task.exception() for task in tasks)
    seconds = time.monotonic() - begun
    assert isinstance(one, EnvError)
    assert one is other
    return str(one), seconds


def _forever(collector: RemoteCollector) -> None:
    while True:
        collector.collect([Place(0, 2 * lane) for lane in collector.lanes])


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raise", ["slot 4, step 4, episode 0: step(", "raised RuntimeError: Chaos was told to raise", "in _raise"]),
        ("kill", ["(slots 4 to 5) was killed by SIGKILL while busy with slots 4 to 5, row 4"]),
        ("exit", ["(slots 4 to 5) ended with exit code 0 while busy with slots 4 to 5, row 4"]),
        ("segfault", ["was killed by SIGSEGV while busy with slots 4 to 5, row 4", "in string_at"]),
    ],
)
def test_a_fault_ends_all_collectors_at_once(fault: str, words: list[str]) -> None:
    message, seconds, pids = fail(fault)
    for word in [*words, f"collector process {pids[1]}"]:
        assert word in message
    assert seconds < LIMIT


def test_a_death_is_seen_where_the_kernel_refuses_pidfds(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> int:
        raise PermissionError(errno.EPERM, "pidfd_open")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    message, seconds, _ = fail("kill")
    assert "was killed by SIGKILL while busy with slots 4 to 5, row 4" in message
    assert seconds < LIMIT


def test_a_hang_is_the_end_after_the_time_limit() -> None:
    message, seconds, pids = fail("hang", timeout=0.5)
    assert f"collector process {pids[1]} (slots 4 to 5) has done nothing for 0.5 seconds" in message
    assert "toy.py" in message
    assert seconds < LIMIT


def test_who_waits_for_a_process_can_say_what_it_is_doing() -> None:
    job = work(lambda: Faulty("hang", 4))
    remotes = Remotes(job, SHARES)
    collector = remotes.collectors[1]
    try:
        assert collector.awaited() == []
        remotes.begin(11, 0)
        remotes.publish(weights(job.policy, 0))
        with ThreadPoolExecutor() as pool:
            player = pool.submit(_forever, collector)
            deadline = time.monotonic() + 60
            while "row 4" not in "".join(collector.awaited()) and time.monotonic() < deadline:
                time.sleep(0.01)
            told = f"collector process {collector.pid} (slots 4 to 5), busy with slots 4 to 5, row 4"
            found = remotes.awaited()
            os.kill(collector.pid, signal.SIGKILL)  # first: the pool waits for the player
            assert told in found
            assert isinstance(player.exception(), EnvError)
    finally:
        remotes.close()


def test_what_cannot_be_brought_back_ends_at_once() -> None:
    def factory() -> SyncVectorEnv:
        return SyncVectorEnv([lambda: Chaos("kill", 4)] * 2, autoreset_mode=AutoresetMode.SAME_STEP)

    remotes = Remotes(replace(work(factory), restarts=3), SHARES)
    try:
        remotes.begin(11, 0)
        remotes.publish(weights(work(factory).policy, 0))
        with pytest.raises(EnvError, match="was killed by SIGKILL while busy with slots 4 to 5, row 4"):
            remotes.collectors[1].collect([Place(0, 4)])
        assert remotes.restarted == 0
    finally:
        remotes.close()


def test_stop_ends_the_pause_before_a_process_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    pausing = threading.Event()

    def pause(*failure: Any) -> float:
        pausing.set()
        return 1000.0

    monkeypatch.setattr(Patience, "pause", pause)
    job = replace(work(lambda: Faulty("kill", 2)), restarts=3)
    remotes = Remotes(job, SHARES)
    pids = [collector.pid for collector in remotes.collectors]
    try:
        remotes.begin(11, 0)
        remotes.publish(weights(job.policy, 0))
        with ThreadPoolExecutor() as pool:
            task = pool.submit(remotes.collectors[1].collect, [Place(0, 4)])
            assert pausing.wait(LIMIT)
            remotes.collectors[1].stop()
            assert isinstance(task.exception(LIMIT), Stopped)
        assert remotes.collectors[1].pid == pids[1]
        assert remotes.restarted == 0
    finally:
        remotes.close()
    assert gone(pids)


def test_a_lost_process_is_noticed_at_once_and_leaves_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    noticed: list[float] = []
    ask = Patience.pause

    def pause(*failure: Any) -> float:
        noticed.append(time.monotonic())
        return ask(*failure)

    monkeypatch.setattr(Patience, "pause", pause)
    gc.collect()
    fds, job = psutil.Process().num_fds(), work("toy:counter")
    remotes = Remotes(replace(job, workers=1, restarts=1), [range(0, 3)])
    (collector,) = remotes.collectors
    pids = [collector.pid, *(child.pid for child in psutil.Process(collector.pid).children())]
    try:
        before = inline(job, 11, 0, [1, 2], workers=1)
        os.kill(pids[0], signal.SIGKILL)
        killed = time.monotonic()
        assert_equal(remote(remotes, job, 11, 0, [1, 2]), before)
        pids.append(collector.pid)
    finally:
        remotes.close()
    assert noticed[0] - killed < 1.0
    (said,) = caplog.messages
    assert said.startswith(
        f"toy:counter: collector process {pids[0]} (slots 0 to 5) was killed by SIGKILL while making"
    )
    assert said.endswith("resetting its environments; it is brought back to where it was (1 of 1)")
    assert len(set(pids)) == 3
    assert gone(pids)
    del remotes, collector
    gc.collect()
    assert psutil.Process().num_fds() == fds


@pytest.mark.parametrize("refusals", [3, 99])
def test_a_system_that_refuses_to_start_processes_is_asked_again(
    refusals: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "_FIRST_PAUSE", 0.0)
    gc.collect()
    fds, job = psutil.Process().num_fds(), work("toy:counter")
    remotes = Remotes(replace(job, restarts=4), [range(0, 3)])
    pid = remotes.collectors[0].pid
    refuse_processes(refusals, monkeypatch)
    before = inline(job, 11, 0, [1, 2])
    os.kill(pid, signal.SIGKILL)
    try:
        if refusals == 3:
            assert_equal(remote(remotes, job, 11, 0, [1, 2]), before)
        else:
            with pytest.raises(EnvError, match=f"collector process {pid} .* was killed by SIGKILL"):
                remote(remotes, job, 11, 0, [1, 2])
    finally:
        remotes.close()
    said = [message.partition("(slots 0 to 5) ")[2] for message in caplog.messages]
    assert said[0].startswith("was killed by SIGKILL")
    assert len(said) == 4
    for message in said[1:]:
        assert message.startswith(f"can't be started: [Errno {errno.EAGAIN}]")
    del remotes
    gc.collect()
    assert psutil.Process().num_fds() == fds


def test_playing_back_may_take_longer_than_the_time_limit() -> None:
    class Slow(Counter):
        def step(self, action: Any) -> Any:
            time.sleep(0.05)
            return super().step(action)

    job = replace(work(lambda: Slow(), EnvOptions(timeout_seconds=0.5)), restarts=1)
    remotes = Remotes(job, [range(0, 3)])
    (collector,) = remotes.collectors
    places = [Place(0, 0), Place(0, 2), Place(0, 4)]
    try:
        remotes.begin(11, 0)
        remotes.publish(weights(job.policy, 0))
        collector.collect(places)
        os.kill(collector.pid, signal.SIGKILL)
        collector.collect(places)
        assert remotes.restarted == 1
    finally:
        remotes.close()


def test_stop_does_not_wait_for_a_process_that_hangs() -> None:
    job = work(lambda: Faulty("hang", 2))
    remotes = Remotes(job, SHARES)
    pids = [collector.pid for collector in remotes.collectors]
    try:
        remotes.begin(11, 0)
        remotes.publish(weights(job.policy, 0))
        with ThreadPoolExecutor() as pool:
            task = pool.submit(remotes.collectors[1].collect, [Place(0, 4)])
            while remotes.collectors[1]._link.status.place != (0, 2):
                assert not task.done()
            begun = time.monotonic()
            remotes.collectors[1].stop()
            assert isinstance(task.exception(), Stopped)
            assert time.monotonic() - begun < LIMIT
    finally:
        begun = time.monotonic()
        remotes.close()
    assert time.monotonic() - begun < LIMIT
    assert gone(pids)
    with pytest.raises(EnvError, match="the collector processes are closed"):
        remotes.collectors[0].collect([Place(0, 0), Place(0, 2)])


def test_close_while_another_thread_collects() -> None:
    job = work("toy:counter")
    remotes = Remotes(job, [range(0, 3)])
    remotes.begin(11, 0)
    remotes.publish(weights(job.policy, 0))
    raised: list[BaseException] = []

    def collect() -> None:
        try:
            _forever(remotes.collectors[0])
        except (Stopped, EnvError) as error:
            raised.append(error)

    thread = threading.Thread(target=collect)
    thread.start()
    while not remotes.collectors[0]._link.status.beats:
        assert thread.is_alive()
    remotes.close()
    remotes.close()
    thread.join(LIMIT)
    assert len(raised) == 1


def test_what_fails_in_the_process_only_is_told_at_the_start() -> None:
    driver, before = os.getpid(), set(psutil.Process().children())

    def factory() -> gymnasium.Env[Any, Any]:
        if os.getpid() != driver:
            raise OSError("no display in this process")
        return Chaos()

    job = work(factory)
    with pytest.raises(EnvError, match=r"slot 0 failed: OSError: no display in this process") as caught:
        Remotes(job, [range(0, 3)])
    assert "Traceback" in str(caught.value)
    assert set(psutil.Process().children()) == before


def test_a_death_while_environments_are_made_says_so() -> None:
    driver = os.getpid()

    def deadly() -> gymnasium.Env[Any, Any]:
        if os.getpid() != driver:
            os.kill(os.getpid(), signal.SIGKILL)
        return Counter()

    with pytest.raises(EnvError, match="was killed by SIGKILL while making or resetting its environments"):
        Remotes(work(deadly), SHARES)


def test_other_spaces_in_the_process_are_noticed() -> None:
    driver = os.getpid()
    job = work(lambda: gymnasium.make("CartPole-v1" if os.getpid() == driver else "Acrobot-v1"))
    with pytest.raises(EnvError, match="in a collector process the environments are"):
        Remotes(job, [range(0, 3)])


def test_what_cannot_travel_is_refused() -> None:
    lock = threading.Lock()

    def factory() -> gymnasium.Env[Any, Any]:
        with lock:
            return Chaos()

    job = work(factory)
    with pytest.raises(ValueError, match="that cloudpickle can carry; TypeError: cannot pickle"):
        Remotes(job, SHARES)


@pytest.mark.parametrize(("algo", "schedule"), [("a2c", "sync"), ("a2c", "concurrent"), ("impala", "async")])
def test_a_dead_collector_ends_the_run_without_restarts(algo: str, schedule: str) -> None:
    settings = {
        "num_envs": 4,
        "lanes": 2,
        "unroll": 5,
        "total_steps": 10**9,
        "schedule": schedule,
        "placement.collectors": "process",
        "placement.workers": 2,
        "placement.restarts": 0,
    }
    run = Training(configure(algo, "toy:catch", settings))
    try:
        assert run.envs is None
        assert run._remotes is not None
        pids = [collector.pid for collector in run._remotes.collectors]
        reports = iter(run)
        assert next(reports).update == 1
        os.kill(pids[1], signal.SIGKILL)
        begun = time.monotonic()
        with pytest.raises(EnvError, match=f"collector process {pids[1]} .*was killed by SIGKILL"):
            for _ in reports:
                pass
    finally:
        run.close()
    assert time.monotonic() - begun < LIMIT
    assert gone(pids)


@pytest.mark.parametrize("schedule", ["sync", "concurrent"])
def test_a_gpu_is_refused_where_bits_are_promised(monkeypatch: pytest.MonkeyPatch, schedule: str) -> None:
    monkeypatch.setattr(device, "chosen", lambda name: torch.device("cuda"))
    config = configure("ppo", "CartPole-v1", {"placement.collectors": "process", "schedule": schedule})
    with pytest.raises(ConfigError, match=r"placement\.collectors=process acts on the CPU"):
        Training(config)


DRIVER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
from slipstream.types import Place
from tests.test_remote import SHARES, EnvOptions, Remotes, weights, work
job = work("toy:chaos", EnvOptions(kwargs={"fault": "hang", "at": 2}))
remotes = Remotes(job, SHARES)
remotes.begin(11, 0)
remotes.publish(weights(job.policy, 0))
print(*(collector.pid for collector in remotes.collectors), flush=True)
if sys.argv[1] == "exit":
    sys.exit(3)
remotes.collectors[1].collect([Place(0, 4)])
"""


@pytest.mark.parametrize("end", ["kill", "exit", "interrupt"])
def test_nothing_survives_the_driver(end: str) -> None:
    names = set(os.listdir("/dev/shm"))
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, end], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert driver.stdout is not None
    assert driver.stderr is not None
    pids = [int(word) for word in driver.stdout.readline().split()]
    assert len(pids) == 2
    if end == "exit":
        assert driver.wait(60) == 3
    else:
        assert all(psutil.pid_exists(pid) for pid in pids)
        driver.send_signal(signal.SIGKILL if end == "kill" else signal.SIGINT)
        driver.wait(60)
    assert gone(pids)
    assert set(os.listdir("/dev/shm")) == names
    driver.stdout.close()
    driver.stderr.close()
