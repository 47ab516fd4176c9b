"""Runs that earlier versions wrote (`tests/fixtures`) are looked at, evaluated and trained on."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

import slipstream
from slipstream.run import checkpoint, metrics
from slipstream.run.files import CheckpointError, digest
from tests.run.runs import resume

RUNS = sorted(path for path in (Path(__file__).parents[1] / "fixtures").iterdir() if path.is_dir())


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_an_old_run_is_loaded_and_trained_on(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / run.name
    shutil.copytree(run, copy)
    agent = slipstream.load(copy)
    assert agent.steps == int(max(copy.glob("checkpoints/[0-9]*")).name)
    action, _ = agent.predict(np.zeros(4, np.float32), deterministic=True)
    assert action in (0, 1)
    before = metrics.read(copy / "metrics.jsonl")
    with warnings.catch_warnings(action="error"):
        trained = resume(copy, agent.steps + 200)
    assert trained.progress.steps >= agent.steps + 200
    rows = metrics.read(copy / "metrics.jsonl")
    assert rows[: len(before)] == before
    assert len(rows) > len(before)
    assert checkpoint.newest(copy / "checkpoints").steps == trained.progress.steps


def test_a_format_of_the_future_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(RUNS[-1], run)
    (path,) = run.glob("checkpoints/[0-9]*/MANIFEST.json")
    content = {name: value for name, value in json.loads(path.read_text()).items() if name != "sha256"} | {"format": 2}
    sealed = digest(json.dumps(content, sort_keys=True).encode())
    path.write_text(json.dumps(content | {"sha256": sealed}, indent=1))
    for use in (slipstream.load, resume):
        with pytest.raises(CheckpointError, match="has format 2, this version of Slipstream reads format 1"):
            use(run)
