"""Several learners: the bits of one, or its sum but for rounding; faults of theirs cost nothing but time."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from slipstream.algos import PPO
from slipstream.descent import Descent, Gradient
from slipstream.learner import Learner
from slipstream.run import learners
from slipstream.run.config import ConfigError
from slipstream.run.presets import configure
from slipstream.run.training import Training
from slipstream.team_group import Group, LearnerError
from slipstream.teammate import Meeting, MeetingPlace

SIZE = {"num_envs": 8, "lanes": 4, "shards": 4, "placement.workers": 2, "net.hidden": (7,)}
SLAB = {**SIZE, "unroll": 6}
REPLAY = {**SIZE, "unroll": 4, "algo.replay.learning_starts": 40, "algo.batch_size": 16, "algo.replay.capacity": 2000}
SLABS = ("ppo", "a2c, delayed")
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ppo": ("ppo", "CartPole-v1", {**SLAB, "algo.epochs": 2, "algo.batch_size": 16, "net.normalize_obs": True}),
    "a2c, delayed": ("a2c", "CartPole-v1", {**SLAB, "schedule": "concurrent"}),
    "a2c, reused": ("a2c", "CartPole-v1", {**SLAB, "schedule": "concurrent", "algo.reuse_forward": True}),
    "ppo, recurrent": ("ppo", "CartPole-v1", {**SLAB, "net.core": "lstm", "algo.epochs": 2, "algo.batch_size": 24}),
    "a2c, columns": ("a2c", "CartPole-v1", {**SLAB, "shards": 8}),
    "impala": ("impala", "CartPole-v1", {**SLAB, "schedule": "concurrent"}),
    "appo, replay": (
        "appo",
        "CartPole-v1",
        {**SLAB, "schedule": "concurrent", "algo.batch_size": 48, "algo.replay.proportion": 1.0}
        | {"algo.replay.capacity": 1000, "algo.replay.clone_policy": 0.1},
    ),
    "auto-encoder": (
        "ppo",
        "ALE/Pong-v5",
        {**SLAB, "algo.batch_size": 24, "autoencoder.weight": 1.0, "autoencoder.variational": True, "net.latent": 5}
        | {"net.torso": "nips_cnn"},
    ),
    "dqn": ("dqn", "CartPole-v1", {**REPLAY, "algo.dueling": True, "algo.replay.alpha": 0.6}),
    "rainbow": ("rainbow", "CartPole-v1", REPLAY),
    "r2d2": ("r2d2", "CartPole-v1", {**REPLAY, "unroll": 10, "algo.burn_in": 10, "algo.length": 20}),
    "sac": ("sac", "Pendulum-v1", {**REPLAY, "unroll": 2}),
    "td3": ("td3", "Pendulum-v1", {**REPLAY, "unroll": 2, "schedule": "concurrent"}),
}


def run(
    case: str, count: int, updates: int, torso: nn.Module | None = None, **changes: Any
) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """State of the learner after so many updates, and the metrics of the last."""
    algo, env, settings = CASES[case]
    config = configure(algo, env, {**settings, "placement.learners": count, **changes})
    with closing(Training(config, torso=torso)) as training:
        for report in training:
            if training.learner.version == updates:
                return training.learner.state()[0], report.metrics
    raise AssertionError("the run ended too soon")


def teammates() -> list[int]:
    return [child.pid for child in psutil.Process().children() if "teammate" in " ".join(child.cmdline())]


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("case", "count"),
    [("ppo", 2), ("a2c, delayed", 2)]
    + [pytest.param(case, 2, marks=pytest.mark.slow) for case in CASES if case not in ("ppo", "a2c, delayed")]
    + [pytest.param(case, 4, marks=pytest.mark.slow) for case in ("ppo", "dqn")],
)
def test_number_of_learners_changes_no_bit(case: str, count: int) -> None:
    alone, _ = run(case, 1, 20)
    shared, metrics = run(case, count, 20)
    assert metrics["faults/learner_restarts"] == 0
    assert same(shared, alone)
    assert not teammates()


@pytest.mark.parametrize("case", ["ppo", pytest.param("rainbow", marks=pytest.mark.slow)])
def test_all_reduce_is_the_same_sum_but_for_rounding(case: str) -> None:
    alone, _ = run(case, 1, 3)
    shared, _ = run(case, 3, 3, reduction="all_reduce")
    assert not same(shared, alone)
    for name, value in alone.items():
        if value.is_floating_point() and not name.startswith("optimizer"):
            torch.testing.assert_close(shared[name], value, rtol=1e-5, atol=1e-6)


class Faulty(nn.Module):
    """A torso that does something at the n-th forward of a gradient in another process than its first, and once."""

    def __init__(self, marker: Path, forward: int, fault: Callable[[], None]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 7, generator=generator))
        self._home, self._marker, self._left, self._fault = os.getpid(), marker, forward, fault

    def forward(self, obs: Tensor) -> Tensor:
        if os.getpid() != self._home and torch.is_grad_enabled():
            self._left -= 1
            if self._left == 0 and not self._marker.exists():
                self._marker.touch()
                self._fault()
        return torch.tanh(obs @ self.weight)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fail() -> None:
    raise ArithmeticError("planted")


@pytest.mark.parametrize(
    ("fault", "reduction"),
    [
        pytest.param(die, "ordered", id="dies"),
        pytest.param(hang, "ordered", id="hangs", marks=pytest.mark.slow),
        pytest.param(die, "all_reduce", id="dies, all_reduce", marks=pytest.mark.slow),
        pytest.param(hang, "all_reduce", id="hangs, all_reduce", marks=pytest.mark.slow),
    ],
)
def test_a_learner_that_dies_or_hangs_is_replaced_and_costs_no_bit(
    fault: Callable[[], None], reduction: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault is hang:
        monkeypatch.setattr(learners, "_SECONDS", 20.0)
    marker = tmp_path / "done"
    alone, _ = run("ppo", 2, 4, Faulty(tmp_path / "never", 0, fault), reduction=reduction)
    shared, metrics = run("ppo", 2, 4, Faulty(marker, 9, fault), reduction=reduction)
    assert marker.exists()
    assert metrics["faults/learner_restarts"] == 1
    assert same(shared, alone)
    assert not teammates()


@pytest.mark.parametrize(
    ("case", "count"),
    [
        ("ppo", 2),
        *(pytest.param(case, 3, marks=pytest.mark.slow) for case in ("a2c, delayed", "dqn", "rainbow", "td3")),
    ],
)
def test_asynchronous_learners_take_every_gradient_once(
    case: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that one was asked for when it died; and some are of parameters that lack another one."""
    steps: list[int] = []

    def noted(
        descent: Descent, gradient: Gradient, lr: float, update: int, apply: Callable[..., Tensor] = Descent.apply
    ) -> Tensor:
        steps.append(update)
        return apply(descent, gradient, lr, update)

    monkeypatch.setattr(Descent, "apply", noted)
    torso = Faulty(tmp_path / "done", 7, die) if case == "ppo" else None
    alone, expected = run(case, 1, 6)
    wanted = len(steps)
    shared, metrics = run(case, count, 6, torso, reduction="asynchronous")
    late = 2 * wanted - len(steps)  # not there yet
    assert 0 <= late < count if case in SLABS else late == 0
    assert metrics.get("train/gradient_steps") == expected.get("train/gradient_steps")
    assert metrics["faults/learner_restarts"] == (torso is not None)
    assert torso is not None or not same(shared, alone)
    # The last slab may have brought none: each of A2C's has one, which may come with the next.
    mean, most = (metrics.get(f"lag/gradients_{name}", 0.0) for name in ("mean", "max"))
    assert mean <= most < wanted
    assert most > 0 or case == "a2c, delayed"
    assert not teammates()


def test_without_restarts_a_learner_that_dies_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(LearnerError, match=r"learner 1 \(process \d+\) was killed by SIGKILL"):
        run("ppo", 2, 4, Faulty(tmp_path / "done", 3, die), **{"placement.restarts": 0})
    assert not teammates()


def test_an_error_of_a_learner_reaches_the_user_with_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)planted.*in learner 1 \(process \d+\):.*ArithmeticError") as caught:
        run("ppo", 2, 4, Faulty(tmp_path / "done", 3, fail))
    assert "in fail" in str(caught.value)
    assert not teammates()


def test_more_learners_than_shards_are_refused() -> None:
    config = configure("ppo", "CartPole-v1", {**SLAB, "algo.batch_size": 16, "placement.learners": 5})
    with pytest.raises(ConfigError, match=r"placement\.learners=5: .* there are 4: use --shards 5.*--learners 4"):
        Training(config)
    assert not teammates()


def test_learners_inline_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"placement\.learners: with --placement\.collectors inline"):
        configure("ppo", "CartPole-v1", {"placement.learners": 2, "placement.collectors": "inline"})


def test_the_programs_own_process_group_is_left_alone(tmp_path: Path) -> None:
    dist.init_process_group("gloo", (tmp_path / "store").as_uri(), rank=0, world_size=1)
    try:
        hook = sys.excepthook
        run("ppo", 2, 1)
        assert dist.get_world_size() == 1
        assert sys.excepthook is hook
    finally:
        dist.destroy_process_group()


def test_learners_of_one_machine_listen_on_the_loopback_only() -> None:
    algo, env, settings = CASES["ppo"]
    with closing(Training(configure(algo, env, {**settings, "placement.learners": 2}))) as training:
        next(iter(training))
        own = [os.getpid(), *teammates()]
        found = [each for pid in own for each in psutil.Process(pid).net_connections("tcp")]
    listening = {each.laddr.ip for each in found if each.status == psutil.CONN_LISTEN}
    assert len(own) == 2
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert any(each.laddr.ip in ("127.0.0.1", "::1", "::ffff:127.0.0.1") for each in found)


def test_one_that_dies_while_all_meet_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, _ = run("ppo", 1, 2)
    meeting, met = MeetingPlace.meeting, list[int]()

    def disturbed(place: MeetingPlace, size: int) -> Meeting:
        if not met:
            os.kill(teammates()[0], signal.SIGSTOP)  # so that it can't answer before it is killed
            met.extend(teammates())
            os.kill(met[0], signal.SIGKILL)
        return replace(meeting(place, size), seconds=5.0)

    monkeypatch.setattr(MeetingPlace, "meeting", disturbed)
    shared, metrics = run("ppo", 2, 2)
    assert metrics["faults/learner_restarts"] == 1
    assert same(shared, alone)
    assert not teammates()


def test_an_answer_may_wait_longer_than_a_message_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first learner collects, say."""
    meeting = MeetingPlace.meeting
    monkeypatch.setattr(MeetingPlace, "meeting", lambda place, size: replace(meeting(place, size), seconds=1.0))
    algo, env, settings = CASES["a2c, delayed"]
    config = configure(algo, env, {**settings, "placement.learners": 2, "reduction": "asynchronous"})
    with closing(Training(config)) as training:
        reports = iter(training)
        for _ in range(3):
            next(reports)
        event = threading.Event()
        event.wait(2.0)
        metrics = [next(reports).metrics for _ in range(3)]
        assert metrics[-1]["faults/learner_restarts"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["ordered", "all_reduce"])
def test_of_four_learners_the_last_dies_before_news_have_come(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come by way of another one, who sees it first."""
    alone, _ = run("ppo", 4, 2, reduction=reduction)
    broadcast, killed = Group.broadcast, list[int]()

    def disturbed(group: Group, numbers: Tensor) -> None:
        if not killed:
            killed.append(max(teammates()))
            os.kill(killed[0], signal.SIGKILL)
        broadcast(group, numbers)

    monkeypatch.setattr(Group, "broadcast", disturbed)
    shared, metrics = run("ppo", 4, 2, reduction=reduction)
    assert metrics["faults/learner_restarts"] == 1
    assert same(shared, alone)


def test_an_interrupt_while_a_gradient_is_taken_leaves_a_team_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    algo, env, settings = CASES["a2c, delayed"]
    config = configure(algo, env, {**settings, "schedule": "sync", "placement.learners": 2})
    with closing(Training(config)) as training:
        report = list(islice(training, 3))[-1]
        told = training.learner.state()[0]
        differentiate, calls = Learner._differentiate, list[int]()

        def interrupted(*given: Any) -> Any:
            calls.append(1)
            if len(calls) == 1:
                raise KeyboardInterrupt
            return differentiate(*given)

        monkeypatch.setattr(Learner, "_differentiate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            training.learner.step(report.trajectory)
        assert same(training.learner.state()[0], told)
        training.learner.step(report.trajectory)
        metrics = training.learner.step(report.trajectory)
        found = training.learner.state()[0]
    assert metrics["faults/learner_restarts"] == 0
    monkeypatch.setattr(Learner, "_differentiate", differentiate)
    with closing(Training(replace(config, placement=replace(config.placement, learners=1)))) as training:
        report = list(islice(training, 3))[-1]
        for _ in range(2):
            training.learner.step(report.trajectory)
        expected = training.learner.state()[0]
    assert all(torch.equal(found[name], value) for name, value in expected.items() if name.startswith("policy"))


@pytest.mark.slow
def test_an_asynchronous_learner_that_hangs_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learners, "_SECONDS", 8.0)
    algo, env, settings = CASES["a2c, delayed"]
    changes = {"placement.learners": 2, "reduction": "asynchronous", "total_steps": 10**9}
    config = configure(algo, env, {**settings, **changes})
    with closing(Training(config, torso=Faulty(tmp_path / "done", 3, hang))) as training:
        for report in training:
            if report.metrics["faults/learner_restarts"]:
                break
    assert (tmp_path / "done").exists()
    assert not teammates()


@pytest.mark.slow
def test_a_run_can_be_closed_while_a_learner_hangs(tmp_path: Path) -> None:
    algo, env, settings = CASES["a2c, delayed"]
    config = configure(algo, env, {**settings, "placement.learners": 2, "reduction": "asynchronous"})
    training = Training(config, torso=Faulty(tmp_path / "done", 3, hang))
    for _ in training:
        if (tmp_path / "done").exists():
            break
    begun = time.monotonic()
    training.close()
    assert time.monotonic() - begun < 10.0
    assert not teammates()


@pytest.mark.parametrize("reduction", ["ordered", "asynchronous"])
def test_an_update_that_ends_early_gives_the_rest_up(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a target of the divergence; what is late of the update before ends nothing."""
    seen: list[float] = []

    def second(algorithm: PPO, metrics: dict[str, Tensor]) -> bool:
        seen.append(float(metrics["approx_kl"]))
        return len(seen) % 2 == 0

    monkeypatch.setattr(PPO, "stop", second)
    _, metrics = run("ppo", 2, 4, reduction=reduction)
    assert metrics["train/minibatches"] >= 1
    assert len(seen) == 8
    assert not teammates()


class Turned(nn.Module):
    """A torso whose weights lie in memory in an order of their own, and one that does not learn."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(7, 4, generator=generator).t())
        self.cube = nn.Parameter(torch.randn(7, 2, 7, generator=generator).permute(2, 0, 1))
        self.frozen = nn.Parameter(torch.ones(7), requires_grad=False)

    def forward(self, obs: Tensor) -> Tensor:
        return torch.tanh(obs @ self.weight) * self.cube.sum((0, 2)) * self.frozen


@pytest.mark.parametrize("case", ["ppo", pytest.param("dqn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("reduction", ["ordered", "all_reduce", pytest.param("asynchronous", marks=pytest.mark.slow)])
def test_any_order_of_memory_and_weights_that_do_not_learn(case: str, reduction: str) -> None:
    changes = {"algo.epochs": 1, "algo.batch_size": 48} if case == "ppo" else {}
    alone, _ = run(case, 1, 2, Turned(), **changes)
    shared, _ = run(case, 2, 3 if reduction == "asynchronous" else 2, Turned(), reduction=reduction, **changes)
    if reduction == "ordered":
        assert same(shared, alone)
    for name in ("policy.trunk.torso.weight", "policy.trunk.torso.cube"):
        assert not torch.equal(shared[name], dict(Turned().named_parameters())[name.rpartition(".")[2]])
        if reduction == "all_reduce":
            torch.testing.assert_close(shared[name], alone[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(shared["policy.trunk.torso.frozen"], torch.ones(7))
