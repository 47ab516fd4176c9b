"""Slots are brought back to where they were by playing their actions again."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from numpy.typing import NDArray

from slipstream import patience, tree
from slipstream.envs import EnvError, EnvOptions, atari, make_envs
from slipstream.envs.options import AtariOptions
from slipstream.envs.recorded import RecordedEnvs, bring_back
from slipstream.envs.rows import EnvFailure
from slipstream.envs.slot import Source, random_start
from slipstream.envs.toy import Chaos
from slipstream.envs.workers import WorkerEnvs
from slipstream.standing import UNKNOWN
from slipstream.types import EnvStep
from tests.faulty import Once

from .test_worker_failures import refuse_processes

SEED = 7


class Play:
    """Random actions for two sets of environments, which must show the same rows."""

    def __init__(self, make: Callable[[], RecordedEnvs]) -> None:
        self.envs = make()
        self.envs.reset(SEED)
        self.space = self.envs.spec.action_space
        self.space.seed(3)
        self.ended = 0
        for lane in range(self.envs.spec.lanes):
            self.envs.recv(lane)

    def step(self, other: RecordedEnvs | None = None) -> None:
        spec = self.envs.spec
        for lane in range(spec.lanes):
            action = self._draw()
            for envs in (self.envs, other):
                if envs is not None:
                    envs.send(action, lane)
        for lane in range(spec.lanes):
            step = self.envs.recv(lane)
            self.ended += int(step.ended.sum())
            if other is not None:
                assert_same(other.recv(lane), step)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def _draw(self) -> NDArray[Any]:
        return np.stack([np.asarray(self.space.sample()) for _ in range(self.envs.spec.lane_size)])


def assert_same(one: EnvStep, other: EnvStep) -> None:
    for left, right in zip(tree.leaves(tuple(one[:5])), tree.leaves(tuple(other[:5])), strict=True):
        np.testing.assert_array_equal(left, right)
        assert left.dtype == right.dtype


def assert_comes_back(make: Callable[[], RecordedEnvs], before: int, after: int, ends: int) -> RecordedEnvs:
    played = Play(make)
    for _ in range(before):
        played.step()
    history, other = played.envs.history(), make()
    assert bring_back(other, SEED, history, played.envs.seen()) == []
    for lane in range(played.envs.spec.lanes):
        assert_same(other.recv(lane), played.envs.recv(lane))
    for _ in range(after):
        played.step(other)
    assert played.ended >= ends
    for name in ("start", "count", "action"):
        np.testing.assert_array_equal(getattr(other.history(), name), getattr(played.envs.history(), name))
    other.close()
    played.envs.close()
    return played.envs


def maker(id: str, num_envs: int, lanes: int, options: EnvOptions | None = None, workers: int = 0) -> Any:
    return lambda: RecordedEnvs(make_envs(id, num_envs, lanes, options, workers=workers))


@pytest.mark.parametrize("before", [0, 1, 13, 90, 333])
def test_gymnasium(before: int) -> None:
    assert_comes_back(maker("CartPole-v1", 4, 2), before, 100, ends=10)


@pytest.mark.parametrize(
    ("id", "options", "workers"),
    [
        ("CartPole-v1", None, 3),
        ("Pendulum-v1", EnvOptions(decorrelate_steps=30, max_episode_steps=40), 0),
        ("CartPole-v1", EnvOptions(decorrelate_steps=90, frame_stack=3), 1),
        ("toy:step_time", EnvOptions(kwargs={"mean_ms": 0.01, "length": 20}), 0),
    ],
)
def test_more_of_gymnasium(id: str, options: EnvOptions | None, workers: int) -> None:
    assert_comes_back(maker(id, 4, 2, options, workers), 77, 60, ends=4)


@pytest.mark.parametrize(
    ("options", "before"),
    [
        (EnvOptions(max_episode_steps=20, decorrelate_steps=25), 70),
        (EnvOptions(max_episode_steps=60), 10),
        (EnvOptions(max_episode_steps=40, atari=AtariOptions(life_loss=True, sticky_actions=0.25)), 60),
    ],
)
def test_atari(options: EnvOptions, before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atari, "SEED_EVERY", 50)
    envs = assert_comes_back(maker("ALE/Breakout-v5", 2, 2, options), before, 90, ends=2)
    assert envs.history().start.min() >= 1


@pytest.mark.parametrize("before", [0, 5, 40])
def test_atari_games_that_end_with_their_last_random_move(before: int) -> None:
    assert [random_start(SEED, slot, 20)[0] for slot in range(4)] == [14, 9, 0, 3]
    options = EnvOptions(max_episode_steps=14, decorrelate_steps=20)
    assert_comes_back(maker("ALE/Breakout-v5", 4, 1, options), before, 30, ends=4)


def test_a_history_longer_than_its_first_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    options = EnvOptions(kwargs={"mean_ms": 0.01, "length": 1000})
    assert_comes_back(maker("toy:step_time", 2, 1, options), 700, 900, ends=2)


FAULTS = [("raise", 0), ("raise", 2), ("kill", 2), ("exit", 2), ("segfault", 1), ("hang", 2)]


@pytest.mark.parametrize(("fault", "workers"), FAULTS)
def test_a_failure_changes_no_row(
    fault: str, workers: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(patience, "_FIRST_PAUSE", 0.0)

    def options(fault: str) -> EnvOptions:
        return EnvOptions(kwargs={"fault": fault, "at": 13, "length": 5}, timeout_seconds=1.0)

    played = Play(maker("toy:chaos", 4, 2, options("none")))
    failing = RecordedEnvs(make_envs("toy:chaos", 4, 2, options(fault), workers=workers), restarts=99)
    failing.reset(SEED)
    for lane in (0, 1):
        assert_same(failing.recv(lane), played.envs.recv(lane))
    for _ in range(40):
        played.step(failing)
    assert failing.restarted >= 4
    assert not [message for message in caplog.messages if "something else" in message]
    assert failing.history().start.tolist() == played.envs.history().start.tolist()
    failing.close()


class FailingReset(Chaos):
    """Its third reset raises, of every environment that is made."""

    def __init__(self) -> None:
        super().__init__("none")
        self._resets = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self._resets += 1
        if self._resets == 3:
            raise RuntimeError("the door is stuck")
        return super().reset(seed=seed, options=options)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failure_in_reset_changes_no_row(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_FIRST_PAUSE", 0.0)
    played = Play(lambda: RecordedEnvs(make_envs(lambda: Chaos("none"), 1)))
    failing = RecordedEnvs(make_envs(FailingReset, 1, workers=workers), restarts=99)
    failing.reset(SEED)
    assert_same(failing.recv(0), played.envs.recv(0))
    for _ in range(30):
        played.step(failing)
    assert failing.restarted >= 2
    failing.close()


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize(("fault", "workers"), [("raise", 0), ("raise", 1), ("kill", 1)])
def test_a_failure_while_slots_begin_or_are_brought_back_changes_no_row(
    fault: str,
    workers: int,
    at: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(patience, "_FIRST_PAUSE", 0.0)
    played = Play(maker("toy:chaos", 4, 2, EnvOptions(kwargs={"fault": "none"})))
    failing = RecordedEnvs(make_envs(lambda: Once(str(tmp_path), fault, at), 4, 2, workers=workers), restarts=2)
    if at == 0:
        failing.reset(SEED)
    else:
        played.steps(15)  # of its third episode, three
        assert bring_back(failing, SEED, played.envs.history(), played.envs.seen()) == []
    for lane in range(2):
        assert_same(failing.recv(lane), played.envs.recv(lane))
    for _ in range(20):
        played.step(failing)
    assert failing.restarted >= 1
    assert not [message for message in caplog.messages if "something else" in message]
    assert failing.history().count.tolist() == played.envs.history().count.tolist()
    failing.close()


@pytest.mark.parametrize("refusals", [3, 99])
def test_a_system_that_refuses_to_start_workers_is_asked_again(
    refusals: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "_FIRST_PAUSE", 0.0)
    failing = RecordedEnvs(make_envs(lambda: Once(str(tmp_path), "kill", 3), 2, workers=1), restarts=4)
    played = Play(lambda: failing)
    refuse_processes(refusals, monkeypatch)
    if refusals == 3:
        played.steps(8)
    else:
        with pytest.raises(EnvFailure, match="was killed by SIGKILL while busy with slot 0, step 3"):
            played.steps(8)
    assert failing.restarted == 4
    failing.close()


@pytest.mark.parametrize("fault", ["exit", "hang"])
def test_a_worker_that_is_lost_the_same_way_at_the_same_place_is_raised_at_once(fault: str) -> None:
    options = EnvOptions(kwargs={"fault": fault, "at": 3}, timeout_seconds=1.0)
    failing = RecordedEnvs(make_envs("toy:chaos", 4, 2, options, workers=2), restarts=5)
    played = Play(lambda: failing)
    with pytest.raises(EnvFailure, match=r"busy with slot \d, step 3, episode 0"):
        played.steps(5)
    assert failing.restarted <= 2  # once for every lane
    failing.close()


def test_a_worker_that_is_killed_at_the_same_place_is_tried_again_since_its_memory_may_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patience, "_FIRST_PAUSE", 0.0)
    options = EnvOptions(kwargs={"fault": "kill", "at": 3})
    failing = RecordedEnvs(make_envs("toy:chaos", 2, 1, options, workers=1), restarts=2)
    played = Play(lambda: failing)
    with pytest.raises(EnvFailure, match=r"busy with slot \d, step 3, episode 0"):
        played.steps(5)
    assert failing.restarted == 2
    failing.close()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_that_is_killed_while_it_has_nothing_to_do_costs_no_row(
    victim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "_FIRST_PAUSE", 0.0)
    played = Play(maker("CartPole-v1", 4, 2))
    workers = WorkerEnvs(Source(lambda: gymnasium.make("CartPole-v1"), "CartPole-v1"), 4, 2, 2, timeout_seconds=5.0)
    failing = RecordedEnvs(workers, restarts=2)
    failing.reset(SEED)
    for lane in range(2):
        failing.recv(lane)
    child = workers._workers[victim].child
    os.kill(child.pid, signal.SIGKILL)
    assert child.ended(5.0)
    for _ in range(20):
        played.step(failing)
    assert failing.restarted == 2  # both lanes
    failing.close()


class Wide(Chaos):
    """Actions of 40 kB; hangs in the third step if there is a certain file, which it removes."""

    action_space: Any

    def __init__(self, stuck: Path) -> None:
        super().__init__("none", length=1000)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (10_000,), np.float32)
        self._stuck = stuck

    def step(self, action: Any) -> Any:
        if self._t == 2 and self._stuck.exists():
            self._stuck.unlink()
            threading.Event().wait()
        return super().step(action)


def test_a_worker_that_hangs_while_it_is_told_of_more_than_a_pipe_holds_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "_FIRST_PAUSE", 0.0)
    stuck, options = tmp_path / "stuck", EnvOptions(timeout_seconds=0.7)
    envs = RecordedEnvs(make_envs(lambda: Wide(stuck), 2, 2, options, workers=1), restarts=2)
    played = Play(lambda: envs)
    played.steps(8)
    history, seen = envs.history(), envs.seen()
    stuck.touch()
    assert bring_back(envs, SEED, history, seen) == []
    assert not stuck.exists()
    assert envs.restarted >= 1
    envs.close()


def test_the_same_error_at_the_same_place_is_raised_at_once() -> None:
    options = EnvOptions(kwargs={"fault": "raise", "at": 3})
    failing = RecordedEnvs(make_envs("toy:chaos", 2, 2, options), restarts=99)
    played = Play(lambda: failing)
    with pytest.raises(EnvFailure, match=r"slot 0, step 3, episode 0: step\(\d\) raised RuntimeError: Chaos was told"):
        played.steps(5)
    assert failing.restarted == 1
    failing.close()


class Frail(Chaos):
    """Kills its process in the third step, when that is tried again in the fourth, and so on."""

    def __init__(self, path: Path) -> None:
        super().__init__("none")
        self._path = path

    def step(self, action: Any) -> Any:
        deaths = len(list(self._path.iterdir()))
        if self._steps + 1 == 3 + deaths:
            (self._path / str(deaths)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


@pytest.mark.parametrize("restarts", [0, 2])
def test_no_more_restarts_than_are_allowed(restarts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_FIRST_PAUSE", 0.0)
    failing = RecordedEnvs(make_envs(lambda: Frail(tmp_path), 1, workers=1), restarts=restarts)
    played = Play(lambda: failing)
    with pytest.raises(EnvFailure, match="was killed by SIGKILL while busy with slot 0, step 3"):
        played.steps(5)
    assert failing.restarted == restarts
    failing.close()


def test_what_is_wrong_rather_than_broken_is_not_tried_again() -> None:
    failing = RecordedEnvs(make_envs("toy:chaos", 2, 1, EnvOptions(kwargs={"fault": "nan", "at": 3})), restarts=3)
    played = Play(lambda: failing)
    with pytest.raises(EnvError, match="expected finite numbers"):
        played.steps(5)
    assert failing.restarted == 0
    failing.close()


class Later(Once):
    """Shows NaN in the fourth step of an episode, whatever has come before."""

    def step(self, action: Any) -> Any:
        obs, *answer = super().step(action)
        return (obs * np.float32(np.nan) if self._t == 4 else obs, *answer)


@pytest.mark.parametrize("workers", [0, 1])
def test_steps_are_named_as_if_nothing_had_failed(workers: int, tmp_path: Path) -> None:
    def make() -> RecordedEnvs:
        fault = "kill" if workers else "raise"
        return RecordedEnvs(make_envs(lambda: Later(str(tmp_path), fault, 2), 2, workers=workers), restarts=1)

    played = Play(make)
    with pytest.raises(EnvError, match="slot 0, step 4, episode 0: expected finite numbers"):
        played.steps(5)
    assert played.envs.restarted == 1
    played.envs.close()


class Slow(Chaos):
    """Steps that take 0.1 seconds, and never end if there is a certain file."""

    def __init__(self, stuck: Path) -> None:
        super().__init__("none", length=1000)
        self._stuck = stuck

    def step(self, action: Any) -> Any:
        time.sleep(1000.0 if self._stuck.exists() else 0.1)
        return super().step(action)


def test_playing_back_may_take_longer_than_the_time_limit_but_not_for_ever(tmp_path: Path) -> None:
    stuck, options = tmp_path / "stuck", EnvOptions(timeout_seconds=0.7)
    played = Play(lambda: RecordedEnvs(make_envs(lambda: Slow(stuck), 2, 1, options, workers=1)))
    played.steps(10)
    history, seen = played.envs.history(), played.envs.seen()
    assert bring_back(played.envs, SEED, history, seen) == []
    stuck.touch()
    begun = time.monotonic()
    with pytest.raises(EnvFailure, match=r"no answer within 0\.7 seconds"):
        bring_back(played.envs, SEED, history, seen)
    assert time.monotonic() - begun < 5.0
    played.envs.close()


def test_what_does_not_come_back_is_named() -> None:
    played = Play(maker("CartPole-v1", 4, 2))
    for _ in range(20):
        played.step()
    seen = played.envs.seen()
    seen[2] += 1
    other = maker("CartPole-v1", 4, 2)()
    assert bring_back(other, SEED, played.envs.history(), seen) == [2]


class Remembering(Chaos):
    """Pays for the steps that it has ever taken; raises at one of them, once in all its lives."""

    failed = False

    def step(self, action: Any) -> Any:
        obs, _, *more = super().step(action)
        if self._steps == 8 and not Remembering.failed:
            Remembering.failed = True
            raise RuntimeError("once")
        return obs, float(self._steps), *more


def test_what_rewards_depend_on_beyond_the_reset_is_noticed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(patience, "_FIRST_PAUSE", 0.0)
    Remembering.failed = False
    played = Play(lambda: RecordedEnvs(make_envs(lambda: Remembering("none"), 2), restarts=1))
    played.steps(15)
    assert played.envs.restarted == 1
    assert "slots 0 to 1 are back, but show something else than before" in caplog.messages[-1]
    other = RecordedEnvs(make_envs(lambda: Remembering("none"), 2))
    assert bring_back(other, SEED, played.envs.history(), played.envs.seen()) == [0, 1]
    unknown = np.full(2, UNKNOWN, np.int64)
    assert bring_back(other, SEED, played.envs.history(), unknown) == []


def test_histories_travel() -> None:
    played = Play(maker("Pendulum-v1", 4, 2))
    for _ in range(5):
        played.step()
    history = played.envs.history()
    parsed = type(history).parse(history.dump())
    joined = type(history).join([parsed.part(slice(0, 1)), parsed.part(slice(1, 4))])
    for name in ("start", "count", "action"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(history, name))
        assert getattr(joined, name).dtype == getattr(history, name).dtype
    np.testing.assert_array_equal(joined.of(3), history.action[15:])
