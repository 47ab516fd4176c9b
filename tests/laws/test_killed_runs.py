"""A run that is killed at any moment and resumed ends with the files of one that was not."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from slipstream.run import checkpoint
from slipstream.run.directory import RunDirectory
from slipstream.run.progress import Progress
from slipstream.run.remains import differences
from slipstream.run.settings import ConfigError
from slipstream.types import Report
from tests.laws.forge import Forge
from tests.run.runs import resume, train

SMALL = {"num_envs": 4, "lanes": 2, "unroll": 8, "net__hidden": [8], "seed": 3}
REPLAY = {
    "algo__replay__capacity": 128,
    "algo__replay__learning_starts": 64,
    "algo__batch_size": 8,
    "log__keep_last": 1,
}
CASES: dict[str, dict[str, Any]] = {
    "ppo": {"algo": "ppo", "algo__batch_size": 16, "schedule": "concurrent", "net__normalize_obs": True},
    "ppo, evaluated": {"algo": "ppo", "algo__batch_size": 16, "log__eval_every": 70, "log__eval_episodes": 2},
    "a2c": {"algo": "a2c", "schedule": "concurrent"},
    "dqn": {"algo": "dqn", **REPLAY},
    "rainbow": {"algo": "rainbow", "schedule": "concurrent", **REPLAY},
    "sac": {"algo": "sac", "env": "Pendulum-v1", "algo__replay__ratio": 0.25, **REPLAY},
}


class Killed(BaseException):
    """Nothing in a run knows of it, as of SIGKILL."""


@pytest.mark.parametrize("moment", [7, 12])
@pytest.mark.parametrize("case", CASES)
def test_it_ends_as_if_it_had_not_been_killed(
    case: str, moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {**SMALL, "log__checkpoint_every": 96, "log__metrics_every": 40, "total_steps": 600, **CASES[case]}
    whole = train(tmp_path / "whole", **changes).run.path
    original = Progress.__call__

    def killed(self: Progress, report: Report) -> None:
        if report.update == moment:
            raise Killed
        original(self, report)

    monkeypatch.setattr(Progress, "__call__", killed)
    with pytest.raises(Killed):
        train(tmp_path / "killed", **changes)
    monkeypatch.setattr(Progress, "__call__", original)
    for thread in threading.enumerate():
        if thread.name == "slipstream-checkpoint":
            thread.join()  # it would have died as well, and holds the lock
    (path,) = (tmp_path / "killed").iterdir()
    assert 0 < checkpoint.newest(RunDirectory(path).checkpoints).steps < moment * 32
    assert list(differences(whole, resume(path).run.path)) == []


def test_what_differs_is_named(tmp_path: Path) -> None:
    changes = {**SMALL, "env": "Pendulum-v1", "algo__batch_size": 16, "total_steps": 200, "log__metrics_every": 40}
    one, other = (train(tmp_path / name, **{**changes, "seed": seed}).run.path for name, seed in (("a", 3), ("b", 4)))
    found = list(differences(one, other))
    assert any(line.startswith("metrics at step") and "train/value_loss" in line for line in found)
    assert any(line.startswith("tensor policy.") for line in found)
    assert "fact training.env_seed" in found


WORDS = (
    "--num-envs 4 --lanes 2 --schedule concurrent --placement.env-workers 1 --log.checkpoint-every 512 "
    "--log.metrics-every 1000 --log.no-tensorboard"
)


def test_sigkill(tmp_path: Path) -> None:
    """With worker processes, between two checkpoints; `make chaos` does it for every algorithm."""
    words = f"ppo --env CartPole-v1 --total-steps 2500 {WORDS}".split()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert _slipstream("train", *words, "--log.dir", str(whole)).wait() == 0
    driver = _slipstream("train", *words, "--log.dir", str(killed))
    while driver.poll() is None and _newest(killed) < 0:
        time.sleep(0.002)  # nothing tells of a new directory
    children = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    assert children
    assert not psutil.wait_procs(children, timeout=2.0)[1]
    assert _newest(killed) < _newest(whole)
    assert _slipstream("resume", str(next(killed.iterdir()))).wait() == 0
    assert list(differences(next(whole.iterdir()), next(killed.iterdir()))) == []


POINTS = {
    "ppo": "ppo --algo.batch-size 16 --algo.epochs 1",
    "dqn": "dqn --algo.replay.capacity 128 --algo.replay.learning-starts 64 --algo.batch-size 8",
}
OFTEN = "--num-envs 4 --lanes 2 --unroll 8 --net.hidden 8 --total-steps 200 --log.checkpoint-every 60 --log.keep-last 1"


@pytest.mark.parametrize("stride", [17, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", POINTS)
def test_sigkill_at_any_touch_of_a_file(made: Forge, tmp_path: Path, case: str, stride: int) -> None:
    """Before a file is opened, half flushed, renamed or removed."""
    words = ["train", *f"{POINTS[case]} --env CartPole-v1 {OFTEN} --log.metrics-every 50 --log.no-tensorboard".split()]
    root = tmp_path / "whole"
    everything = made.run([*words, "--log.dir", str(root)], tmp_path, folder=str(root))
    assert everything.code == 0
    whole, resumed = next(root.iterdir()), 0
    assert everything.counted > 60
    for point in range(4, everything.counted + 1, stride):
        root = tmp_path / f"killed at {point}"
        killed = made.run([*words, "--log.dir", str(root)], tmp_path, signal.SIGKILL, (point,), str(root))
        if killed.code == 0:  # a run's threads take turns in another way, and touch files once more or less
            assert point > everything.counted - 5
            continue
        assert killed.code == -signal.SIGKILL
        (run,) = root.iterdir()
        if _newest(root) < 0:
            again = made.run(["resume", str(run)], tmp_path)
            assert again.code != 0
            assert "slipstream: error:" in again.said.splitlines()[-1], again.said
            continue
        if checkpoint.newest(run / "checkpoints").steps < 200:
            again = made.run(["resume", str(run)], tmp_path)
            assert again.code == 0, again.said
            resumed += 1
        assert list(differences(whole, run)) == []
    assert resumed


def _slipstream(*words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "slipstream", *words], stdout=subprocess.DEVNULL)


def _newest(folder: Path) -> int:
    return max((int(path.name) for path in folder.glob("*/checkpoints/[0-9]*")), default=-1)


def test_an_edited_configuration_is_refused(tmp_path: Path) -> None:
    run = train(tmp_path, **{**SMALL, "algo__batch_size": 16, "total_steps": 200}).run
    config = run.path / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("  gamma: ", "  gamma: 0.5  # ").replace("workers: 1", "workers: 2"))
    with pytest.raises(ConfigError, match=r"can't go on with .* its result: algo.gamma was 0\.9\d*, not 0\.5\. Leave"):
        resume(run.path, 400)
    config.write_text(text.replace("workers: 1", "workers: 2"))
    assert resume(run.path, 400).progress.steps >= 400
