from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import pytest

from slipstream.ranges import crossed
from slipstream.run import metrics
from slipstream.run import progress as progress_module
from slipstream.run.metrics import Metrics, Table
from slipstream.run.progress import WINDOW, Meter, Progress
from tests.run.reports import report


def _feed(progress: Progress, rows: Metrics, updates: list[tuple[int, int, tuple[float, ...], float]]) -> None:
    for update, steps, returns, loss in updates:
        made = report(update, steps, returns, train__value_loss=loss, lag__max=loss)
        progress(made)
        rows(made)


def test_rows_come_by_step_and_hold_means_over_their_updates(tmp_path: Path) -> None:
    progress = Progress(total_steps=70, frames_per_step=4)
    rows = Metrics(tmp_path / "metrics.jsonl", None, progress, every=20)
    _feed(
        progress,
        rows,
        [(1, 11, (1.0, 3.0), 1.0), (2, 22, (), 2.0), (3, 33, (), 6.0), (4, 44, (8.0,), 4.0), (5, 71, (), 3.0)],
    )
    rows.close()
    found = metrics.read(tmp_path / "metrics.jsonl")
    assert [row["time/steps"] for row in found] == [22, 44, 71]
    assert [row["time/frames"] for row in found] == [88, 176, 284]
    assert [row["time/updates"] for row in found] == [2, 4, 5]
    assert [row["time/episodes"] for row in found] == [2, 3, 3]
    assert [row["train/value_loss"] for row in found] == [1.5, 5.0, 3.0]
    assert [row["lag/max"] for row in found] == [2.0, 6.0, 3.0]
    assert [row["rollout/ep_rew_mean"] for row in found] == [2.0, 4.0, 4.0]
    assert found[0]["rollout/ep_rew_std"] == 1.0
    assert found[0]["rollout/ep_len_mean"] == 7.0
    assert found[1]["time/collect_seconds"] == pytest.approx(1.0)
    assert found[0]["time/frames_per_second"] == pytest.approx(4 * found[0]["time/steps_per_second"])


def test_a_metric_that_an_update_did_not_have_is_the_mean_of_the_others(tmp_path: Path) -> None:
    """An update whose first minibatch is past the target KL applies none, and has no loss."""
    progress = Progress(100, 1)
    rows = Metrics(tmp_path / "metrics.jsonl", None, progress, every=100)
    for update, found in [(1, {"train__approx_kl": 2.0}), (2, {}), (3, {"train__approx_kl": 4.0})]:
        made = report(update, 11 * update, (), lag__dropped_steps=100.0 * update, **found)
        progress(made)
        rows(made)
    made = report(4, 120, ())
    progress(made)
    rows(made)
    rows.close()
    (row,) = metrics.read(tmp_path / "metrics.jsonl")
    assert (row["train/approx_kl"], row["lag/dropped_steps"]) == (3.0, 300.0)


def test_a_row_has_the_last_value_of_a_counter_and_the_greatest_of_what_is_a_maximum(tmp_path: Path) -> None:
    progress = Progress(100, 1)
    rows = Metrics(tmp_path / "metrics.jsonl", None, progress, every=30)
    for update, (taken, age) in enumerate([(0, 3.0), (16, 7.0), (32, 5.0), (48, 2.0)], 1):
        counts = {"train__gradient_steps": taken, "faults__lost_shards": update, "faults__replaced_windows": 2 * update}
        made = report(update, 15 * update, (), **counts, lag__replayed_max=age, train__loss=age)
        progress(made)
        rows(made)
    rows.close()
    found = metrics.read(tmp_path / "metrics.jsonl")
    assert [row["train/gradient_steps"] for row in found] == [16.0, 48.0]
    assert [row["faults/lost_shards"] for row in found] == [2.0, 4.0]
    assert [row["faults/replaced_windows"] for row in found] == [4.0, 8.0]
    assert [row["lag/replayed_max"] for row in found] == [7.0, 5.0]
    assert [row["train/loss"] for row in found] == [5.0, 3.5]


def test_before_the_first_episode_there_is_no_return(tmp_path: Path) -> None:
    progress = Progress(100, 1)
    rows = Metrics(tmp_path / "metrics.jsonl", None, progress, every=5)
    _feed(progress, rows, [(1, 11, (), 1.0)])
    rows.close()
    assert not any(name.startswith("rollout/") for name in metrics.read(tmp_path / "metrics.jsonl")[0])


def test_an_interrupted_row_goes_on(tmp_path: Path) -> None:
    updates = [(1, 11, (1.0,), 0.1), (2, 13, (2.0,), 0.7), (3, 17, (), 0.3), (4, 23, (5.0,), 0.9)]

    def run(path: Path, cut: int) -> list[dict[str, float]]:
        progress = Progress(100, 1)
        rows = Metrics(path, None, progress, every=20)
        _feed(progress, rows, updates[:cut])
        facts = json.loads(json.dumps({"progress": progress.state(), "metrics": rows.state()}))
        rows.close()
        progress = Progress(100, 1)
        progress.load(facts["progress"])
        rows = Metrics(path, None, progress, every=20)
        rows.load(facts["metrics"])
        _feed(progress, rows, updates[cut:])
        rows.close()
        found = metrics.read(path)
        return [
            {name: value for name, value in row.items() if "second" not in name and "limit/" not in name}
            for row in found
        ]

    whole = run(tmp_path / "whole.jsonl", 0)
    assert len(whole) == 1
    for cut in (1, 2, 3):
        assert run(tmp_path / f"{cut}.jsonl", cut) == whole


def test_truncate_drops_what_a_resumed_run_writes_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    table = Table(path)
    for steps in (10, 20, 30):
        table.append({"time/steps": steps, "x": 0.1})
    table.close()
    with path.open("a") as file:
        file.write('{"time/steps": 40, "x"')  # a power cut
    metrics.truncate(path, 20)
    assert metrics.read(path) == [{"time/steps": 10, "x": 0.1}, {"time/steps": 20, "x": 0.1}]
    metrics.truncate(tmp_path / "absent.jsonl", 20)


@pytest.mark.parametrize(
    "damage",
    [b'{"time/st\0\0\0\0', b"\0" * 20, b"\xff{}", b"[" * 100_000, b"17", b"{}", b'{"time/stepz": 20}'],
    ids=["zeros in it", "zeros", "no text", "depth", "a number", "no steps", "another name"],
)
def test_a_damaged_line_in_the_middle_is_passed_over_with_a_warning(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"time/steps": 10}\n' + damage + b'\n{"time/steps": 30}\n{"time/steps": 40}\n')
    with pytest.warns(UserWarning, match=r"metrics\.jsonl, line 2 is damaged, and passed over"):
        metrics.truncate(path, 30)
    assert metrics.read(path) == [{"time/steps": 10}, {"time/steps": 30}]


def test_the_first_row_is_measured_from_the_start_of_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    progress = Progress(1000, 1)
    progress.load({**progress.state(), "steps": 50, "seconds": 30.0})
    now[0] += 1000.0  # setting up
    rows = Metrics(tmp_path / "metrics.jsonl", None, progress, every=10)
    progress.start()
    now[0] += 4.0
    _feed(progress, rows, [(1, 62, (), 1.0)])
    rows.close()
    (row,) = metrics.read(tmp_path / "metrics.jsonl")
    assert row["time/seconds"] == pytest.approx(34.0)
    assert row["time/steps_per_second"] == pytest.approx(3.0)


def test_what_json_cannot_say_is_null(tmp_path: Path) -> None:
    table = Table(tmp_path / "metrics.jsonl")
    table.append({"time/steps": 1, "nan": float("nan"), "inf": float("inf")})
    table.close()
    assert metrics.read(tmp_path / "metrics.jsonl") == [{"time/steps": 1, "nan": None, "inf": None}]


def _append(table: Table, steps: tuple[int, ...]) -> None:
    for each in steps:
        table.append({"time/steps": each})


def test_a_full_disk_tears_no_row_and_loses_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    table = Table(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60, hard))
    try:
        table.append({"time/steps": 1})
        with pytest.warns(UserWarning, match=r"metrics\.jsonl: .*rows wait in memory"):
            _append(table, (2, 3, 4, 5))
        assert [row["time/steps"] for row in metrics.read(path)] == [1, 2, 3]
        assert path.read_bytes().endswith(b"}\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    table.append({"time/steps": 6})
    table.close()
    table.close()
    assert [row["time/steps"] for row in metrics.read(path)] == [1, 2, 3, 4, 5, 6]


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    progress = Progress(100, 4)
    rows = Metrics(tmp_path / "metrics.jsonl", tmp_path / "events", progress, every=10)
    _feed(progress, rows, [(1, 11, (1.0,), 0.5), (2, 23, (2.0,), 0.25)])
    rows.close()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [(item.step, item.value) for item in events.Scalars("train/value_loss")] == [(11, 0.5), (23, 0.25)]
    assert [item.value for item in events.Scalars("time/frames")] == [44.0, 92.0]


def test_crossed() -> None:
    assert [crossed(before, now, 10) for before, now in [(0, 9), (0, 10), (10, 19), (19, 20), (11, 45)]] == [
        False,
        True,
        False,
        True,
        True,
    ]
    assert not crossed(0, 10**9, 0)


def test_the_score_needs_a_full_window() -> None:
    progress = Progress(1000, 1)
    progress(report(1, 10, (5.0,) * (WINDOW - 1)))
    assert progress.score is None
    progress(report(2, 20, (5.0,)))
    assert progress.score == 5.0
    progress(report(3, 30, (105.0,)))
    assert progress.score == 6.0


def test_with_evaluations_only_evaluated_weights_have_a_score() -> None:
    progress = Progress(1000, 1, evaluates=True)
    progress(report(1, 10, (5.0,) * WINDOW))
    assert progress.score is None
    progress.evaluation, progress.evaluated_at = {"eval/mean_reward": 2.0}, 10
    assert progress.score == 2.0
    progress(report(2, 20))
    assert progress.score is None


def test_the_budget_is_that_since_it_was_last_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, now = [10.0], [100.0]
    monkeypatch.setattr(progress_module, "cpu_seconds", lambda: cpu[0])
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    progress = Progress(1_000, 1)
    meter = Meter(progress, cores=4)
    assert meter.read() is None  # no step was taken
    for update, (steps, busy, passed) in enumerate([(100, 6.0, 2.0), (150, 1.0, 1.0)], 1):
        progress(report(update, steps, ()))
        cpu[0] += busy
        now[0] += passed
        budget = meter.read()
        taken = progress.steps - progress.before
        assert budget == (busy / taken, 4 * taken / busy, busy / (4 * passed))
        assert budget.limit * budget.efficiency == pytest.approx(taken / passed)


def test_counters_are_exact(tmp_path: Path) -> None:
    progress = Progress(1, 1)
    rows = Metrics(tmp_path / "metrics.jsonl", None, progress, 1)
    told = report(1, 1, train__gradient_steps=25_000_001.0, train__learning_rate=2.5e-4)
    progress(told)
    rows(told)
    rows.close()
    (row,) = metrics.read(tmp_path / "metrics.jsonl")
    assert (row["train/gradient_steps"], row["train/learning_rate"]) == (25_000_001, 2.5e-4)
