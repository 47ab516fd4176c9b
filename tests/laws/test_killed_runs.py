"""A run that is killed at any moment and resumed ends with the files of one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream.run import checkpoint, metrics
from slipstream.run.directory import RunDirectory
from slipstream.run.progress import Progress
from slipstream.types import Report
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
    "sac": {"algo": "sac", "env": "Pendulum-v1", **REPLAY},
}


class Killed(BaseException):
    """Nothing in a run knows of it, as of SIGKILL."""


def contents(run: RunDirectory) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor], Any, list[str]]:
    """What a run leaves, but for the clock."""
    saved = checkpoint.newest(run.checkpoints, replay=True)
    rows = [
        {key: value for key, value in row.items() if key in COUNTERS or not key.startswith(metrics.CLOCK)}
        for row in metrics.read(run.metrics)
    ]
    facts = saved.facts()
    facts["progress"].pop("seconds")
    for told in facts["training"].get("ahead", ()):
        told.pop("env_seconds")
        told.pop("infer_seconds")
    sums = {name: value for name, value in facts["metrics"]["sums"].items() if not name.startswith(metrics.CLOCK)}
    facts["metrics"]["sums"] = sums
    return rows, saved.tensors(), facts, sorted(path.name for path in run.checkpoints.glob("replay/*"))


COUNTERS = ("time/steps", "time/frames", "time/updates", "time/episodes")


@pytest.mark.parametrize("moment", [7, 12])
@pytest.mark.parametrize("case", CASES)
def test_it_ends_as_if_it_had_not_been_killed(
    case: str, moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {**SMALL, "log__checkpoint_every": 96, "log__metrics_every": 40, "total_steps": 600, **CASES[case]}
    whole = contents(train(tmp_path / "whole", **changes).run)
    original = Progress.__call__

    def killed(self: Progress, report: Report) -> None:
        if report.update == moment:
            raise Killed
        original(self, report)

    monkeypatch.setattr(Progress, "__call__", killed)
    with pytest.raises(Killed):
        train(tmp_path / "killed", **changes)
    monkeypatch.setattr(Progress, "__call__", original)
    (path,) = (tmp_path / "killed").iterdir()
    assert 0 < checkpoint.newest(RunDirectory(path).checkpoints).steps < moment * 32
    rows, tensors, facts, segments = contents(resume(path).run)
    assert rows == whole[0]
    assert facts == whole[2]
    assert tensors.keys() == whole[1].keys()
    for name, value in tensors.items():
        assert torch.equal(value, whole[1][name]), name
    assert segments == whole[3]
