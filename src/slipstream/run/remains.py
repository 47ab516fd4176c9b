"""Whether two runs are the same: what they leave behind, but for the clock."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from slipstream.run import checkpoint, metrics
from slipstream.run.directory import RunDirectory

COUNTERS = ("time/steps", "time/frames", "time/updates", "time/episodes")
"""What `metrics.CLOCK` covers but does not depend on the clock."""


def differences(one: Path, other: Path) -> Iterator[str]:
    """Where two finished runs differ: rows of metrics, tensors and facts of the newest checkpoint, segments of replays.

    Wall-clock times, and how often environments were brought back after a failure, don't count.

    Raises:
        CheckpointError: If one has no whole checkpoint.
        ConfigError: If one is no run.
    """
    runs = RunDirectory(one), RunDirectory(other)
    yield from _unequal_rows(*([timeless(row) for row in metrics.read(run.metrics)] for run in runs))
    saved = [checkpoint.newest(run.checkpoints, replay=True) for run in runs]
    if saved[0].steps != saved[1].steps:
        yield f"the newest checkpoints are of steps {saved[0].steps} and {saved[1].steps}"
        return
    tensors = [of.tensors() for of in saved]
    for name in sorted(tensors[0].keys() | tensors[1].keys()):
        left, right = tensors[0].get(name), tensors[1].get(name)
        if left is None or right is None or left.dtype != right.dtype or not torch.equal(left, right):
            yield f"tensor {name}"
    facts = [_timeless_facts(of.facts()) for of in saved]
    yield from (
        f"fact {name}" for name in facts[0].keys() | facts[1].keys() if facts[0].get(name) != facts[1].get(name)
    )
    if [part["sha256"] for part in saved[0].segments] != [part["sha256"] for part in saved[1].segments]:
        yield "segments of the replay"


def _unequal_rows(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> Iterator[str]:
    if len(one) != len(other):
        yield f"metrics have {len(one)} and {len(other)} rows"
    for left, right in zip(one, other, strict=False):
        names = sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))
        if names:
            yield f"metrics at step {left['time/steps']}: {', '.join(names)}"


def timeless(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of metrics without what depends on the clock."""
    return {name: value for name, value in row.items() if name in COUNTERS or not name.startswith(metrics.CLOCK)}


def _timeless_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts as one flat mapping, without those of the clock."""
    del facts["config"]  # it names places
    facts["progress"].pop("seconds")
    facts["metrics"]["sums"] = timeless(facts["metrics"]["sums"])
    for told in facts["training"].get("ahead", ()):
        told.pop("env_seconds")
        told.pop("infer_seconds")
    return {f"{part}.{name}": value for part, content in facts.items() for name, value in content.items()}
