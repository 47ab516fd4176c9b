from __future__ import annotations

import errno
import io
import json
import os
import re
import resource
import shutil
import signal
import stat
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control import CartPoleEnv
from rich.console import Console
from safetensors.torch import load_file

from slipstream.envs import EnvError
from slipstream.envs.recorded import RecordedEnvs
from slipstream.loader import Loader
from slipstream.run import checkpoint, directory, evaluate, loop, metrics
from slipstream.run.checkpoint import Checkpoint
from slipstream.run.config import CALLABLE
from slipstream.run.directory import RunDirectory
from slipstream.run.evaluate import Evaluation
from slipstream.run.files import CheckpointError
from slipstream.run.loop import Own
from slipstream.run.presets import preset
from slipstream.run.progress import Progress
from slipstream.run.remains import differences, timeless
from slipstream.run.settings import ConfigError
from slipstream.run.signals import Interrupted
from slipstream.run.training import Training
from tests.run.runs import configuration, resume, stop_after, train


def _steps(run: RunDirectory) -> list[int]:
    return sorted(int(path.name) for path in run.checkpoints.iterdir())


def test_a_run_leaves_everything_behind(tmp_path: Path) -> None:
    trained = train(
        tmp_path, log__tensorboard=True, log__checkpoint_every=50, log__eval_every=100, log__eval_episodes=3
    )
    run, progress = trained.run, trained.progress
    assert run.path.parent == tmp_path
    assert run.path.name.startswith("CartPole-v1__ppo__1__")
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o700
    assert run.config() == configuration(
        tmp_path, log__tensorboard=True, log__checkpoint_every=50, log__eval_every=100, log__eval_episodes=3
    )
    assert (run.path / "command.txt").read_text() == "a 'test it'\n"
    surroundings = json.loads((run.path / "env.json").read_text())
    assert {"started", "python", "versions", "cpu", "cores", "gpus", "git"} <= set(surroundings)
    assert surroundings["versions"]["torch"] == torch.__version__
    rows = metrics.read(run.metrics)
    assert rows[-1]["time/steps"] == progress.steps >= 200
    assert rows[-1]["time/episodes"] == progress.episodes > 0
    assert {"train/value_loss", "train/approx_kl", "rollout/ep_rew_mean", "time/steps_per_second"} <= set(rows[-1])
    for row in rows:
        assert (row["lag/mean"], row["lag/max"]) == (0.0, 0.0)
        busy = row["time/env_seconds"] + row["time/infer_seconds"]
        assert 0.0 < row["wait/env"] < 1.0
        assert row["limit/steps_per_second"] * row["limit/efficiency"] > 0.0
        assert row["time/updates"] != 1 or row["wait/env"] == pytest.approx(row["time/env_seconds"] / busy)
    assert [row["eval/episodes"] for row in rows if "eval/mean_reward" in row] == [3.0, 3.0]
    assert list(run.tensorboard.iterdir())
    assert len(_steps(run)) <= 3
    assert max(_steps(run)) == progress.steps
    assert not (run.path / "error.txt").exists()


def test_the_best_checkpoint_holds_the_weights_of_the_best_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([3.0, 9.0, 9.0, 4.0, 1.0, 2.0])

    def scripted(*arguments: Any, **settings: Any) -> Evaluation:
        return Evaluation((next(scores),), (7,))

    monkeypatch.setattr(evaluate, "evaluate", scripted)
    run = train(tmp_path, total_steps=300, log__eval_every=50, log__checkpoint_every=20, log__keep_last=1).run
    rows = [row for row in metrics.read(run.metrics) if "eval/mean_reward" in row]
    assert [row["eval/mean_reward"] for row in rows] == [3.0, 9.0, 9.0, 4.0, 1.0, 2.0]
    best = checkpoint.best(run.checkpoints)
    assert (best.score, best.steps) == (9.0, rows[2]["time/steps"])
    assert _steps(run) == [best.steps, rows[-1]["time/steps"]]


def test_every_evaluation_has_its_checkpoint(tmp_path: Path) -> None:
    changes = {"log__eval_every": 60, "log__eval_episodes": 2, "log__checkpoint_every": 10**6, "log__keep_last": 9}
    run = train(tmp_path, **changes).run
    rows = {
        row["time/steps"]: row["eval/mean_reward"] for row in metrics.read(run.metrics) if "eval/mean_reward" in row
    }
    assert len(rows) == 4
    assert {steps: checkpoint.read(run.checkpoints / str(steps)).score for steps in _steps(run)} == rows


def test_the_same_seed_gives_the_same_rows_but_for_the_clock(tmp_path: Path) -> None:
    def rows(name: str, **changes: Any) -> list[dict[str, Any]]:
        settings = {"log__eval_every": 80, "log__eval_episodes": 2, "net__normalize_obs": True, **changes}
        found = metrics.read(train(tmp_path / name, num_envs=4, lanes=2, algo__batch_size=14, **settings).run.metrics)
        return [timeless(row) for row in found]

    first = rows("first")
    assert {key.partition("/")[0] for row in first for key in row} == {"time", "rollout", "train", "lag", "eval"}
    assert rows("second") == first
    assert rows("placed otherwise", placement__workers=2, placement__env_workers=1) == first
    assert rows("another seed", seed=2) != first


def test_two_runs_never_share_a_directory(tmp_path: Path) -> None:
    first, second = train(tmp_path, total_steps=20), train(tmp_path, total_steps=20)
    assert first.run.path != second.run.path
    assert len(list(tmp_path.iterdir())) == 2


def test_bad_input_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown environment"):
        train(tmp_path, env="CartPol-v1")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        message = f"log.dir: no run can be written in {root}: {tmp_path / 'file'} is a file; choose another place"
        with pytest.raises(ConfigError, match=re.escape(message)):
            train(root, total_steps=21)
    original = directory.write_flushed

    def full(path: Path, content: bytes) -> None:
        if path.name == "command.txt":
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path, content)

    monkeypatch.setattr(directory, "write_flushed", full)
    with pytest.raises(ConfigError, match=r"no run can be written in .*: No space left on device; choose"):
        train(tmp_path / "runs", total_steps=21)
    assert list((tmp_path / "runs").iterdir()) == []


def _note_flushes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is flushed to the disk from now on, and of files that others are put in the place of."""
    fsync, replace, noted = os.fsync, Path.replace, list[str]()

    def flushed(descriptor: int) -> None:
        noted.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def replaced(path: Path, target: Path) -> Path:
        noted.append(f"-> {target.name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", replaced)
    return noted


def test_a_new_run_is_on_the_disk_before_its_first_checkpoint_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = _note_flushes(monkeypatch)
    run = train(tmp_path / "new" / "runs", total_steps=20).run
    (steps,) = _steps(run)
    name, own = run.path.name, ["config.yaml", "command.txt", "env.json"]
    saved = ["tensors.safetensors", "facts.json", "MANIFEST.json", f".writing-{steps}", "checkpoints"]
    assert noted == [tmp_path.name, "new", *own, name, "runs", "metrics.jsonl", name, *saved]


def test_the_rows_before_a_checkpoint_are_on_the_disk_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, rename, on_disk, ahead = os.fsync, Path.rename, [0], dict[int, int]()

    def flushed(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)
        if path.name == "metrics.jsonl":
            on_disk.append(metrics.read(path)[-1]["time/steps"])

    def renamed(path: Path, target: Path) -> Path:
        if target.name.isdecimal():
            ahead[int(target.name)] = on_disk[-1]
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", renamed)
    run = train(tmp_path, log__checkpoint_every=40, log__metrics_every=1).run
    assert len(ahead) > 3
    assert all(last >= steps for steps, last in ahead.items()), ahead
    assert len(on_disk) - 1 == len(ahead), "once for each"
    assert max(ahead) == metrics.read(run.metrics)[-1]["time/steps"]


def test_what_a_resume_replaces_is_on_the_disk_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(tmp_path, total_steps=20).run
    noted = _note_flushes(monkeypatch)
    resume(run.path, 40)
    one, other = ([f"{name}.tmp", f"-> {name}", run.path.name] for name in ("metrics.jsonl", "config.yaml"))
    assert noted[:6] == one + other


def test_resume_continues_counters_anneal_and_metrics(tmp_path: Path) -> None:
    run = train(tmp_path, total_steps=400, log__checkpoint_every=100).run
    before = metrics.read(run.metrics)
    first, *later = _steps(run)
    half = checkpoint.read(run.checkpoints / str(first))
    for steps in later:
        (run.checkpoints / str(steps) / "MANIFEST.json").unlink()
    with pytest.warns(UserWarning, match=f"falling back to the checkpoint at step {first}"):
        again = resume(run.path)
    rows = metrics.read(run.metrics)
    kept = [row for row in before if row["time/steps"] <= first]
    assert 0 < len(kept) < len(before)
    assert rows[: len(kept)] == kept
    steps = [row["time/steps"] for row in rows]
    assert steps == sorted(set(steps))
    assert steps[-1] == again.progress.steps >= 400
    rates = [row["train/learning_rate"] for row in rows]
    assert rates == sorted(rates, reverse=True)
    facts = half.facts()
    assert facts["progress"]["updates"] == facts["training"]["version"] < again.progress.updates
    assert facts["progress"]["episodes"] <= again.progress.episodes
    assert rows[-1]["time/seconds"] > facts["progress"]["seconds"]
    assert checkpoint.newest(run.checkpoints).steps == again.progress.steps


def test_resume_starts_from_the_very_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slipstream.run.training import Training

    run = train(tmp_path, total_steps=100).run
    saved = checkpoint.newest(run.checkpoints)
    seen: list[dict[str, Any]] = []
    original = Training.__iter__

    def spy(self: Training) -> Any:
        tensors, facts = self.state()
        seen.append({name: value.clone() for name, value in tensors.items()} | facts)
        return original(self)

    monkeypatch.setattr(Training, "__iter__", spy)
    resume(run.path, total_steps=200)
    tensors = {name: value for name, value in saved.tensors().items() if not name.startswith("standing.")}
    assert any(name.startswith("optimizer.") for name in tensors)
    assert all(torch.equal(seen[0][name], value) for name, value in tensors.items())
    facts = saved.facts()["training"]
    assert facts.pop("env_seed") == run.config().seed
    assert facts.pop("resumes").startswith("exact")
    assert {name: seen[0][name] for name in facts} == facts
    assert run.config().total_steps == 200


def test_a_finished_run_says_so(tmp_path: Path) -> None:
    run = train(tmp_path, total_steps=20).run
    with pytest.raises(ConfigError, match=r"is finished: it has taken 2\d of 20 steps.*--total-steps 4\d"):
        resume(run.path)
    with pytest.raises(ConfigError, match=r"has taken 2\d steps already: give a higher total than 10, such as.* 4\d"):
        resume(run.path, total_steps=10)


def test_other_versions_than_at_the_start_are_named(tmp_path: Path) -> None:
    run = train(tmp_path, total_steps=20).run
    started = json.loads((run.path / "env.json").read_text())
    with warnings.catch_warnings(action="error"):
        resume(run.path, 40)
    started["versions"] |= {"torch": "1.0", "numpy": "0.9"}
    (run.path / "env.json").write_text(json.dumps(started))
    with pytest.warns(
        UserWarning, match=r"since this run was started, numpy 0.9 is .* now, torch 1.0 is .*bits may differ"
    ):
        resume(run.path, 60)
    (run.path / "env.json").write_text("[]")
    with warnings.catch_warnings(action="error"):
        resume(run.path, 80)


def test_resume_needs_a_whole_checkpoint(tmp_path: Path) -> None:
    run = train(tmp_path, total_steps=20).run
    for path in run.checkpoints.rglob("tensors.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no whole checkpoint") as caught:
        resume(run.path, total_steps=40)
    assert str(caught.value).endswith(f"To train anew with the same settings: slipstream train --config {run.path}")


def test_a_stray_copy_of_a_checkpoint_costs_no_progress(tmp_path: Path) -> None:
    run = train(tmp_path, total_steps=42, log__checkpoint_every=21).run
    older, newest = _steps(run)
    shutil.copytree(run.checkpoints / str(older), run.checkpoints / "9999")
    with pytest.warns(
        UserWarning, match=rf"9999 was copied or renamed.*falling back to the checkpoint at step {newest}"
    ):
        resume(run.path, total_steps=newest + 21, log__keep_last=9)
    left = {path.name for path in run.checkpoints.iterdir()}
    assert {str(older), str(newest), "damaged-9999"} < left


def test_a_run_goes_on_with_damaged_metrics(tmp_path: Path) -> None:
    run = train(tmp_path, total_steps=300).run
    steps = [row["time/steps"] for row in metrics.read(run.metrics)]
    lines = run.metrics.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1][:5] + bytes(20) + lines[1][25:]  # a hole, as a power cut leaves
    run.metrics.write_bytes(b"".join(lines))
    with pytest.warns(UserWarning, match=r"metrics\.jsonl, line 2 is damaged"):
        resume(run.path, 400)
    assert [row["time/steps"] for row in metrics.read(run.metrics)][: len(steps) - 1] == [steps[0], *steps[2:]]


def test_a_resume_that_cannot_cut_the_metrics_leaves_the_run_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(tmp_path, total_steps=100).run
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}

    def fail(path: Path) -> list[dict[str, Any]]:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "read", fail)
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl: Input/output error"):
            resume(run.path, 200)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
    resume(run.path, 200)


def test_resume_refuses_another_environment(tmp_path: Path) -> None:
    run = train(tmp_path, total_steps=20).run
    file = run.path / "config.yaml"
    file.write_text(file.read_text().replace("CartPole-v1", "Acrobot-v1"))
    with pytest.raises(CheckpointError, match=r"belongs to another environment.*CartPole-v1.*Acrobot-v1"):
        resume(run.path, total_steps=40)


def test_only_one_process_trains_in_a_directory(tmp_path: Path) -> None:
    run = train(tmp_path, total_steps=20).run
    with run.lock(), pytest.raises(ConfigError, match="another process is training in"):
        resume(run.path, total_steps=40)
    resume(run.path, total_steps=40)


def test_a_run_is_locked_until_its_training_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, closed = Training.close, 0

    def close(self: Training) -> None:
        nonlocal closed
        (path,) = tmp_path.iterdir()
        with pytest.raises(ConfigError, match="another process is training in"), RunDirectory(path).lock():
            pass
        original(self)
        closed += 1

    monkeypatch.setattr(Training, "close", close)
    run = train(tmp_path, total_steps=20).run
    resume(run.path, total_steps=40)
    assert closed == 2
    with run.lock():
        pass


def test_a_run_that_ended_at_once_is_locked_until_its_checkpoint_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another that wrote there at the same time would take away what is half written."""
    original, free, writers = checkpoint.save, threading.Event(), list[threading.Thread]()

    def held(*given: Any) -> object:
        writers.append(threading.current_thread())
        assert free.wait(60.0)
        return original(*given)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", held)
        patch.setattr(loop, "_PATIENCE", 0.0)
        patch.setattr(Progress, "__call__", stop_after(3, KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, log__checkpoint_every=42)
    (path,) = tmp_path.iterdir()
    with pytest.raises(ConfigError, match="the last checkpoint of a run that was stopped is still being written"):
        resume(path)
    free.set()
    (writer,) = writers
    writer.join()
    assert checkpoint.newest(path / "checkpoints").steps > 0
    assert resume(path).progress.finished


def test_an_error_keeps_its_traceback_in_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def boom() -> BaseException:
        return FloatingPointError("the loss is not finite")

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "__call__", stop_after(5, boom))
        with pytest.raises(FloatingPointError, match="not finite") as caught:
            train(tmp_path, log__checkpoint_every=50)
    (path,) = tmp_path.iterdir()
    assert "FloatingPointError: the loss is not finite" in (path / "error.txt").read_text()
    assert caught.value.__notes__ == [f"traceback:  {path / 'error.txt'}", f"resume:     slipstream resume {path}"]
    assert checkpoint.newest(path / "checkpoints").steps < 5 * 21
    resume(path)
    assert not (path / "error.txt").exists()


def test_the_note_of_an_error_waits_for_the_checkpoint_that_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The traceback does not: the disk may be what is slow."""
    original, raised = checkpoint.save, threading.Event()

    def slow(root: Path, *given: Any) -> object:
        assert raised.wait(60.0)
        while not (root.parent / "error.txt").exists():
            time.sleep(0.002)  # nothing tells of a new file
        return original(root, *given)

    def boom() -> BaseException:
        raised.set()
        return FloatingPointError("the loss is not finite")

    monkeypatch.setattr(checkpoint, "save", slow)
    monkeypatch.setattr(Progress, "__call__", stop_after(3, boom))
    with pytest.raises(FloatingPointError) as caught:
        train(tmp_path, log__checkpoint_every=42)
    (path,) = tmp_path.iterdir()
    assert caught.value.__notes__ == [f"traceback:  {path / 'error.txt'}", f"resume:     slipstream resume {path}"]


class Overflowing(CartPoleEnv):
    """The seventh step of some episodes pays more than a loss can hold."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, Any]:
        obs, info = super().reset(seed=seed)
        self._pays = 7 if obs[0] > 0.0 else 0
        return obs, info

    def step(self, action: Any) -> Any:
        self._pays -= 1
        obs, _, *rest = super().step(action)
        return obs, 1e30 if self._pays == 0 else 1.0, *rest


def test_what_a_gradient_that_is_not_finite_came_from_is_in_the_run(tmp_path: Path) -> None:
    own = Own(env=Overflowing)
    settings: dict[str, Any] = {"env": f"{CALLABLE}Overflowing", "log__checkpoint_every": 21}
    with pytest.raises(FloatingPointError, match="not finite") as caught:
        train(tmp_path, own, **settings)
    (path,) = tmp_path.iterdir()
    (kept,) = (path / "faults").iterdir()
    assert caught.value.__notes__[0] == f"what the gradient came from: {kept}"
    assert {"batch.0.obs", "at.policy_head.weight"} <= load_file(kept).keys()
    # The setting may be changed in the middle of a run.
    text = (path / "config.yaml").read_text()
    (path / "config.yaml").write_text(text.replace("skip_gradients: 0", "skip_gradients: 9"))
    trained = resume(path, own=own)
    assert trained.progress.finished
    assert metrics.read(trained.run.metrics)[-1]["faults/skipped_gradients"] > 0
    assert 1 < len(list((path / "faults").iterdir())) <= 10


def test_a_network_of_any_layout_in_memory_is_kept(tmp_path: Path) -> None:
    """Those of convolutions have their channels last."""
    run = train(tmp_path, total_steps=20).run
    weight = torch.rand(4, 3, 2, 2).to(memory_format=torch.channels_last)
    told = run.keep("update-1", {"at.weight": weight, "batch.tied": weight})
    (kept,) = (run.path / "faults").iterdir()
    assert told == f"what the gradient came from: {kept}"
    assert torch.equal(load_file(kept)["at.weight"], weight)


@pytest.mark.parametrize("rule", ["skip", "clamp"])
def test_numbers_of_environments_that_are_not_finite_are_mended_and_counted(tmp_path: Path, rule: str) -> None:
    settings: dict[str, Any] = {"env": "toy:chaos", "env_options__kwargs": {"fault": "nan", "at": 30, "length": 9}}
    trained = train(tmp_path, env_options__non_finite=rule, log__metrics_every=1, **settings)
    counts = [row["faults/mended_rows"] for row in metrics.read(trained.run.metrics)]
    assert sum(counts) == 3, "once in each of three environments"
    assert sum(count > 0 for count in counts) == 1, "all in the same update"


def test_a_run_says_how_it_resumes_and_checkpoints_say_how_it_was(tmp_path: Path) -> None:
    replay = {"algo": "dqn", "num_envs": 2, "unroll": 4, "algo__replay__learning_starts": 50, "algo__batch_size": 8}
    told = {
        "exact; environments are played back to where they were": {},
        "with an empty replay, so that bits will differ (--log.save-replay saves it)": {
            **replay,
            "log__save_replay": False,
        },
        "environments are played back to where they were; under async no two runs are the same": {
            "schedule": "async",
            "algo": "impala",
        },
        "exact; environments start new episodes at every checkpoint, in runs that are not stopped too": {
            "env": "envpool:CartPole-v1",
            "exact_resume": True,
        },
    }
    for number, (expected, changes) in enumerate(told.items()):
        run = train(tmp_path / str(number), total_steps=60, **changes).run
        assert checkpoint.newest(run.checkpoints).manifest["resumes"] == expected
    with pytest.raises(EnvError):
        train(tmp_path / "failed", env="toy:chaos", env_options__kwargs={"at": 30}, placement__restarts=0)
    (path,) = (tmp_path / "failed").iterdir()
    saved = checkpoint.newest(path / "checkpoints").manifest["resumes"]
    assert saved == "with new episodes, so that bits will differ; environments had failed, or just begun"


def test_a_run_that_goes_on_with_other_bits_says_so_wherever_it_says_how_it_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(tmp_path, total_steps=20).run
    facts = Checkpoint.facts

    def of_two_learners(self: Checkpoint) -> dict[str, Any]:
        found = facts(self)
        return {**found, "training": {**found["training"], "learners": 2}}

    monkeypatch.setattr(Checkpoint, "facts", of_two_learners)
    said = io.StringIO()
    with pytest.warns(UserWarning, match="this run had learners=2, here it has learners=1: bits will differ"):
        loop.resume(run.path, Own(), {"total_steps": 40}, Console(file=said))
    expected = "exact, but only from here on (learners=2 until now); environments are played back to where they were"
    assert f"resume: {expected}\n" in said.getvalue()
    assert checkpoint.newest(run.checkpoints).manifest["resumes"] == expected


class FailsInEvaluations(CartPoleEnv):
    """The fourth that is made, after those of training, raises in its second step, once."""

    made, failures = 0, 0

    def __init__(self) -> None:
        super().__init__()
        self._fails, self._t = FailsInEvaluations.made >= 3, 0
        FailsInEvaluations.made += 1

    def step(self, action: Any) -> Any:
        self._t += 1
        if self._fails and self._t == 2 and FailsInEvaluations.failures == 0:
            FailsInEvaluations.failures += 1
            raise RuntimeError("once")
        return super().step(action)


def test_environments_of_an_evaluation_are_brought_back(tmp_path: Path) -> None:
    FailsInEvaluations.made = FailsInEvaluations.failures = 0
    settings: dict[str, Any] = {"env": f"{CALLABLE}Fails", "log__eval_every": 100, "log__eval_episodes": 4}
    trained = train(tmp_path, Own(env=FailsInEvaluations), **settings)
    assert FailsInEvaluations.failures == 1
    assert trained.progress.evaluation["eval/episodes"] == 4


class Sticking(CartPoleEnv):
    """Can't be closed; in one step of those of all of them it raises."""

    left = 0

    def step(self, action: Any) -> Any:
        Sticking.left -= 1
        if Sticking.left == 0:
            raise OSError("the cause")
        return super().step(action)

    def close(self) -> None:
        raise AttributeError("it sticks")


@pytest.mark.parametrize("fails_at", [0, 100])
def test_environments_that_cannot_be_closed_neither_end_a_run_nor_hide_why_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    monkeypatch.setattr(Sticking, "left", fails_at)
    changes = {"log__eval_every": 60, "log__eval_episodes": 2, "placement__restarts": 0}
    threads = torch.get_num_threads()
    if fails_at:
        with pytest.raises(EnvError, match="raised OSError: the cause"):
            train(tmp_path, Own(env=Sticking), env=f"{CALLABLE}Sticking", **changes)
    else:
        assert train(tmp_path, Own(env=Sticking), env=f"{CALLABLE}Sticking", **changes).progress.finished
    assert torch.get_num_threads() == threads


def test_every_piece_of_a_run_is_closed_though_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[RecordedEnvs] = []
    close_loader, close_envs = Loader.close, RecordedEnvs.close

    def failing(loader: Loader) -> None:
        close_loader(loader)
        raise RuntimeError("it sticks")

    def noted(envs: RecordedEnvs) -> None:
        closed.append(envs)
        close_envs(envs)

    monkeypatch.setattr(Loader, "close", failing)
    monkeypatch.setattr(RecordedEnvs, "close", noted)
    training = Training(configuration(tmp_path, placement__workers=2, num_envs=4, lanes=2, algo__batch_size=28))
    with pytest.raises(RuntimeError, match="it sticks"):
        training.close()
    assert len(closed) == 1
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("slipstream-")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    assert threading.current_thread() is threading.main_thread()
    original = Progress.__call__

    def send(self: Progress, report: Any) -> None:
        original(self, report)
        if report.update == 3:
            os.kill(os.getpid(), number)

    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "__call__", send)
        with pytest.raises(Interrupted, match=number.name) as caught:
            train(tmp_path)
    assert caught.value.signal == number
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    saved = checkpoint.newest(caught.value.run / "checkpoints")
    assert saved.facts()["progress"]["updates"] == 3
    rows = [row["time/updates"] for row in metrics.read(resume(caught.value.run).run.metrics)]
    assert rows == sorted(set(rows))


class Interrupting(io.RawIOBase):
    """An output that Ctrl-C is pressed in the midst of, in one of the writes to it."""

    def __init__(self, at: int) -> None:
        self.left, self.shown = at, b""

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self.shown += bytes(content)
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return len(content)


def test_a_signal_in_the_midst_of_a_write_ends_the_run_after_a_checkpoint_too(tmp_path: Path) -> None:
    raw = Interrupting(at=4)
    config = configuration(tmp_path, log__console_every=21)
    with (
        pytest.raises(Interrupted) as caught,
        io.TextIOWrapper(io.BufferedWriter(raw), "utf-8") as file,
    ):
        loop.train(config, Own(), ["test"], Console(file=file))
    saved = checkpoint.newest(caught.value.run / "checkpoints")
    assert 0 < saved.steps < config.total_steps
    assert raw.shown.count(b"Stopping after this update, then saving.") == 1


def test_a_checkpoint_that_cannot_be_written_is_a_warning_and_three_in_a_row_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = checkpoint.write_flushed, [0]

    def full_after_the_first(path: Path, content: bytes) -> None:
        calls[0] += 1
        if calls[0] > 3:  # the files of the first checkpoint
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(checkpoint, "write_flushed", full_after_the_first)
    with pytest.warns(UserWarning, match="training goes on") as warned, pytest.raises(CheckpointError) as caught:
        train(tmp_path, log__checkpoint_every=40, total_steps=2_000)
    assert len(warned) == 2
    (path,) = tmp_path.iterdir()
    first = checkpoint.newest(path / "checkpoints").steps
    assert "No space left on device" in str(caught.value)
    assert str(caught.value).endswith(f"the checkpoint at step {first} is kept")
    assert metrics.read(path / "metrics.jsonl")[-1]["time/steps"] > first


@pytest.mark.parametrize("full_at", [3, 10], ids=["between two checkpoints", "at the last checkpoint"])
def test_a_full_disk_is_what_the_error_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_at: int) -> None:
    original, prune, saved = Progress.__call__, checkpoint.prune, threading.Event()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def told(*arguments: Any) -> None:
        prune(*arguments)
        saved.set()

    monkeypatch.setattr(checkpoint, "prune", told)

    def fill_the_disk(self: Progress, report: Any) -> None:
        original(self, report)
        if report.update == full_at:
            assert saved.wait(10)
            resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))

    monkeypatch.setattr(Progress, "__call__", fill_the_disk)
    try:
        with (
            warnings.catch_warnings(action="ignore", category=UserWarning),
            pytest.raises(CheckpointError) as caught,
        ):
            train(tmp_path, log__checkpoint_every=42, log__metrics_every=21)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (path,) = tmp_path.iterdir()
    assert str(caught.value).startswith("cannot write the checkpoint at step")
    assert caught.value.__notes__ == [
        "traceback:  not written, File too large",
        f"resume:     slipstream resume {path}",
        "the last rows of metrics.jsonl are lost: File too large",
    ]
    assert checkpoint.newest(path / "checkpoints").steps > 0


def _make() -> gymnasium.Env[Any, Any]:
    return gymnasium.make("CartPole-v1")


def test_a_callable_must_be_given_again(tmp_path: Path) -> None:
    run = train(tmp_path, Own(env=_make), env=f"{CALLABLE}_make", total_steps=20).run
    assert run.path.name.startswith("callable-_make__ppo__1__")
    with pytest.raises(ConfigError, match=r"trained on the Python callable _make.*slipstream\.resume\("):
        resume(run.path, 40)
    assert resume(run.path, 40, Own(env=_make)).progress.steps >= 40


def test_a_run_on_a_callable_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"env": f"{CALLABLE}_make", "total_steps": 100, "log__checkpoint_every": 20}
    whole = train(tmp_path / "whole", Own(env=_make), **settings).run
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "__call__", stop_after(3, SystemExit))
        with pytest.raises(SystemExit):
            train(tmp_path / "part", Own(env=_make), **settings)
    (path,) = (tmp_path / "part").iterdir()
    assert 0 < checkpoint.newest(path / "checkpoints").steps < 100
    resume(path, own=Own(env=_make))
    assert list(differences(whole.path, path)) == []


def test_a_users_modules_stay_as_they_are(tmp_path: Path) -> None:
    torso = torch.nn.Linear(4, 8)
    before = torso.weight.detach().clone()
    given: dict[str, Any] = {"total_steps": 60, "net__hidden": preset("ppo", "CartPole-v1").get("net.hidden", (64, 64))}
    agents = [train(tmp_path / str(number), Own(torso=torso), **given).policy for number in range(2)]
    assert torch.equal(torso.weight, before)
    one, other = (agent.state_dict() for agent in agents)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_that_a_run_goes_on_from_is_not_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An environment that fails before the first update would leave an inexact one in its place."""
    run = train(tmp_path, total_steps=60).run
    saved = checkpoint.newest(run.checkpoints)

    def failing(self: Training) -> Any:
        raise EnvError("made up")

    monkeypatch.setattr(Training, "__iter__", failing)
    with pytest.raises(EnvError, match="made up"):
        resume(run.path, 120)
    assert checkpoint.newest(run.checkpoints).manifest == saved.manifest


def test_a_run_ends_when_its_return_is_reached_and_goes_on_only_when_told_to(tmp_path: Path) -> None:
    """CartPole pays 1 a step, so that any policy has a mean return of 5 after 100 episodes."""
    trained = train(tmp_path, total_steps=100_000, stop_at_return=5.0)
    assert 100 <= trained.progress.episodes < 130
    assert max(_steps(trained.run)) == trained.progress.steps
    assert metrics.read(trained.run.metrics)[-1]["time/steps"] == trained.progress.steps
    with pytest.raises(ConfigError, match=r"finished: its mean return has reached 5\.0.*--total-steps 100000"):
        resume(trained.run.path)
    total = trained.progress.steps + 50
    assert resume(trained.run.path, total_steps=total).progress.steps >= total


class _Breaking(gymnasium.Env[Any, Any]):
    """Raises in its 40th step."""

    observation_space, action_space = gymnasium.spaces.Box(0, 1, (2,)), gymnasium.spaces.Discrete(2)

    def __init__(self) -> None:
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._steps += 1
        if self._steps == 40:
            raise RuntimeError("the joint is stuck")
        return np.zeros(2, np.float32), 0.0, False, False, {}


def test_what_was_learned_before_an_environment_failed_is_kept(tmp_path: Path) -> None:
    with pytest.raises(EnvError, match="the joint is stuck") as caught:
        train(tmp_path, Own(env=_Breaking), env=CALLABLE + "breaking", total_steps=10_000)
    (path,) = tmp_path.iterdir()
    run = RunDirectory(path)
    (steps,) = _steps(run)
    assert steps == 3 * 35
    assert f'resume:     slipstream.resume("{path}", env=breaking)' in caught.value.__notes__


class _Once(CartPoleEnv):
    """Raises when all of them have taken so many steps, while a file says so."""

    steps, fails = 0, 0

    def step(self, action: Any) -> Any:
        _Once.steps += 1
        if _Once.steps == _Once.fails:
            raise RuntimeError("an outage")
        return super().step(action)


def test_a_run_goes_on_exactly_from_before_an_environment_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"env": f"{CALLABLE}_Once", "total_steps": 300, "placement__restarts": 0}
    settings["log__checkpoint_every"] = 40
    whole = train(tmp_path / "whole", Own(env=_Once), **settings).run
    for fails, told in ((150, "exact;"), (36, "exact, but only from here on (new episodes after step 21)")):
        monkeypatch.setattr(_Once, "fails", _Once.steps + fails)
        with pytest.raises(EnvError, match="an outage"):
            train(tmp_path / str(fails), Own(env=_Once), **settings)
        (path,) = (tmp_path / str(fails)).iterdir()
        resume(path, own=Own(env=_Once))
        assert checkpoint.newest(path / "checkpoints").manifest["resumes"].startswith(told)
        assert (list(differences(whole.path, path)) == []) == (fails == 150)


def test_a_run_goes_on_exactly_from_before_an_evaluation_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"total_steps": 200, "log__checkpoint_every": 40, "log__eval_every": 100}
    whole = train(tmp_path / "whole", **settings).run
    evaluated = evaluate.evaluate

    def failing(*arguments: Any, index: int, **more: Any) -> Evaluation:
        result = evaluated(*arguments, index=index, **more)
        if index > 4:
            raise EnvError("made up")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluate", failing)
        with pytest.raises(EnvError, match="made up") as caught:
            train(tmp_path / "part", **settings)
    (path,) = (tmp_path / "part").iterdir()
    assert f"resume:     slipstream resume {path}" in caught.value.__notes__
    assert checkpoint.newest(path / "checkpoints").manifest["resumes"].startswith("exact")
    resume(path)
    assert list(differences(whole.path, path)) == []
