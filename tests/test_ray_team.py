"""Learners in actors of a Ray cluster: the bits of one learner, whatever dies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest

from slipstream.team_group import LearnerError

from .test_team import Faulty, die, run, same

ray: Any = pytest.importorskip("ray")
pytestmark = pytest.mark.slow

PLACE: dict[str, Any] = {"placement.collectors": "ray", "placement.workers": 1}
CLUSTER: dict[str, Any] = {**PLACE, "placement.address": "auto"}


@pytest.mark.parametrize("reduction", ["ordered", "all_reduce", "asynchronous"])
def test_a_private_cluster(reduction: str) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    alone, _ = run("ppo", 1, 4)
    shared, metrics = run("ppo", 2, 4, **PLACE, reduction=reduction)
    assert same(shared, alone) == (reduction == "ordered")
    assert metrics["faults/learner_restarts"] == 0
    assert not {child.pid for child in psutil.Process().children(recursive=True)} - before
    assert not ray.is_initialized()


@pytest.mark.usefixtures("nodes")
@pytest.mark.parametrize("case", ["ppo", "dqn"])
def test_an_actor_that_dies_on_a_cluster_of_two_nodes_is_replaced(case: str, tmp_path: Path) -> None:
    torso = Faulty(tmp_path / "done", 9, die)
    alone, _ = run(case, 1, 12, Faulty(tmp_path / "never", 0, die))
    shared, metrics = run(case, 2, 12, torso, **CLUSTER)
    assert (tmp_path / "done").exists()
    assert same(shared, alone)
    assert metrics["faults/learner_restarts"] == 1


@pytest.mark.usefixtures("nodes")
def test_an_actor_that_dies_without_restarts_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(LearnerError, match=r"learner 1 \(actor, process \d+ on .*\) has died"):
        run("dqn", 2, 12, Faulty(tmp_path / "done", 9, die), **{**CLUSTER, "placement.restarts": 0})
