"""The model of a run on many machines: what it must say where the answer is known."""

from __future__ import annotations

from typing import Any

import pytest

from slipstream.run.limit import Stages
from slipstream.run.plan import Forecast, Times, forecast, plan, row_bytes
from slipstream.run.presets import configure

LANES = 6


def times(**changes: float) -> Times:
    given: dict[str, Any] = {"unroll": 1.0, "transfer": 0.0, "learn": 0.0, "broadcast": 0.0, "spread": 0.0}
    return Times(**(given | changes))


@pytest.mark.parametrize(
    ("schedule", "changes", "seconds"),
    [
        ("sync", {"learn": 0.5, "broadcast": 0.25}, 1.75),
        ("sync", {"transfer": 0.1}, 1.6),
        ("concurrent", {"learn": 0.5, "broadcast": 0.25}, 1.25),
        ("concurrent", {"learn": 1.5}, 1.5),
        ("concurrent", {"transfer": 0.1}, 1.6),
        ("async", {"learn": 0.5}, 1.0),
        ("async", {"learn": 1.5}, 1.5),
    ],
)
def test_seconds_of_an_update(schedule: str, changes: dict[str, float], seconds: float) -> None:
    assert 1.0 / forecast(schedule, LANES, times(**changes), 2).slabs_per_second == pytest.approx(seconds)


def test_barriers_wait_for_the_slowest_and_async_does_not() -> None:
    many = times(spread=0.3)
    sync, free = (forecast(schedule, 100, many, 4).slabs_per_second for schedule in ("sync", "async"))
    assert sync < 0.75
    assert 0.95 < free < 1.05


def test_a_full_network_is_the_limit_of_async() -> None:
    found = forecast("async", LANES, times(transfer=0.5, learn=0.5), 2)
    assert 1.0 / found.slabs_per_second == pytest.approx(LANES * 0.5, rel=0.05)
    assert found.bottleneck == "network"
    assert found.receiving == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("max_lag", [1, 2, 5])
def test_where_the_learner_is_slow_rows_are_as_old_as_they_may_be(max_lag: int) -> None:
    found = forecast("async", LANES, times(learn=10.0), max_lag)
    assert found.bottleneck == "learner"
    assert found.lag == pytest.approx(max_lag)
    assert found.learning == pytest.approx(1.0)


def test_where_the_learner_is_fast_rows_are_young() -> None:
    found = forecast("async", LANES, times(learn=0.01), 5)
    assert found.lag <= 1.0
    assert found.bottleneck == "collectors"


def test_lag_by_schedule() -> None:
    assert (forecast("sync", 2, times()).lag, forecast("concurrent", 2, times()).lag) == (0.0, 1.0)


def test_a_plan_has_a_line_per_number_of_nodes() -> None:
    config = configure("impala", "ALE/Pong-v5", {"num_envs": 8, "lanes": 2, "unroll": 20})
    head, names, *lines = plan(config, Stages(4e-4, 3e-4, 6e-4, 2, False), (1, 10, 1000), 10.0)
    assert head.startswith("async, a lane of 4 environments per core of a node of 2 cores, unroll 20; ")
    assert names.split()[0] == "nodes"
    assert [line.split()[2] for line in lines] == ["160", "1,600", "160,000"]
    speeds = [float(line.split()[3].replace(",", "")) for line in lines]
    assert speeds[0] == pytest.approx(2 / 7e-4, rel=0.1)
    assert speeds[1] == pytest.approx(2 / 6e-4, rel=0.05)  # its learner's
    assert lines[2].split()[-1] == "learner"


def test_bytes_of_a_row_have_each_frame_once() -> None:
    from slipstream.envs.make import env_spec

    config = configure("impala", "ALE/Pong-v5", {"num_envs": 8, "lanes": 2, "unroll": 20})
    spec = env_spec(config.env, 8, 2, config.env_options)
    size = row_bytes(config, spec, config.algo.make_policy(spec, config.net, None, 1))
    assert 84 * 84 < size < 1.1 * 84 * 84


def test_the_bottleneck_is_the_busiest() -> None:
    assert Forecast(1.0, 0.0, 0.2, 0.5, 0.4).bottleneck == "network"
