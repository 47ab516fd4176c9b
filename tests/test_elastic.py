"""Under `async` collectors join a run when the cluster has room for them, and the others go on when they are lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from slipstream import remote_collector
from slipstream.run.presets import configure
from slipstream.run.training import Training
from slipstream.types import Report

ray: Any = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

CONFIG: dict[str, Any] = {
    "schedule": "async",
    "num_envs": 6,
    "lanes": 6,
    "unroll": 8,
    "net.hidden": (8,),
    "total_steps": 10**7,
    "placement.collectors": "ray",
    "placement.address": "auto",
}
UPDATES = 20_000  # no cluster takes as long to notice


def until(reports: Iterator[Report], actors: int) -> Report:
    """Trains until so many actors are in place."""
    for _ in range(UPDATES):
        report = next(reports)
        if report.metrics["cluster/actors"] == actors:
            return report
    raise AssertionError(f"there were never {actors} actors: {report.metrics}")


def test_actors_join_when_nodes_do_and_are_done_without_when_they_leave(
    nodes: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Six actors in a cluster of four cores, then of six, then of five."""
    monkeypatch.setattr(remote_collector, "_AWAY_SECONDS", 1.0)
    config = configure("impala", "CartPole-v1", CONFIG)
    with closing(Training(config)) as training:
        reports = iter(training)
        until(reports, 4)
        two = [nodes.add_node(num_cpus=1) for _ in range(2)]
        until(reports, 6)
        nodes.remove_node(two[0])
        before = until(reports, 5)
        for _ in range(20):
            report = next(reports)
        assert report.metrics["faults/restarts"] == 1
        assert report.metrics["lag/max"] <= config.max_lag
        assert report.steps > before.steps
        assert "its places are free for others" in caplog.text
        two[0] = nodes.add_node(num_cpus=1)
        until(reports, 6)
    for node in two:
        nodes.remove_node(node)
