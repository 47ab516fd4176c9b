"""The model of a run on one machine: what it must say where the answer is known."""

from __future__ import annotations

from typing import Any

import pytest

from slipstream.run.limit import Stages
from slipstream.run.presets import configure
from slipstream.run.scale import predicted, table

# 1 ms to step and to act, 3 ms to learn.
STAGES = Stages(env=4e-4, infer=6e-4, learn=3e-3, cores=2, gpu=False)


def steps_per_second(cores: int, **changes: Any) -> float:
    given = {"num_envs": 16, "lanes": 4, "shards": 4, "schedule": "sync", "algo.batch_size": 256}
    return predicted(configure("ppo", "CartPole-v1", given | changes), STAGES, cores)


@pytest.mark.parametrize(
    ("cores", "changes", "milliseconds"),
    [
        (1, {}, 4.0),
        (2, {}, 2.0),
        (4, {}, 1.0),
        (16, {}, 1.0),  # four lanes and four shards, in turn
        (3, {}, 2.0),  # four parts on three cores: one has two
        (4, {"lanes": 2, "group": 1}, 1.25),
        (4, {"lanes": 4, "group": 2}, 1.25),
        (4, {"shards": 1}, 3.25),
        (1, {"schedule": "concurrent"}, 4.0),
        (2, {"schedule": "concurrent"}, 2.0),
        (4, {"schedule": "concurrent"}, 1.0),
        (8, {"schedule": "concurrent"}, 0.75),  # the gradient's four parts are all that is left
        (4, {"schedule": "concurrent", "lanes": 1, "shards": 16}, 1.0),
        (8, {"schedule": "concurrent", "lanes": 1, "shards": 16}, 1.0),  # one lane collects all the time
    ],
)
def test_a_step_takes_what_the_busiest_core_has(cores: int, changes: dict[str, Any], milliseconds: float) -> None:
    assert 1000.0 / steps_per_second(cores, **changes) == pytest.approx(milliseconds)


def test_the_table_has_this_machine_and_the_limit_of_others() -> None:
    config = configure("ppo", "CartPole-v1", {"num_envs": 8, "lanes": 2, "shards": 2, "schedule": "sync"})
    lines = [line.split() for line in list(table(config, STAGES))[1:]]
    assert [line[0] for line in lines] == ["1", "2", "4", "8", "16", "32"]
    assert [line[1:3] for line in lines[:3]] == [["250", "250"], ["500", "500"], ["500", "1,000"]]
    assert [line[0] for line in lines if line[-1] == "here"] == ["2"]
