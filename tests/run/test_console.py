from __future__ import annotations

import io
import os
import time
from dataclasses import replace

import pytest
from rich.console import Console

from slipstream.run.console import Display, Lasting, clock, plain_line, stages_text
from slipstream.run.progress import Budget, Mark, Progress
from tests.run.reports import report


def _lines(total_steps: int, every: int, steps: list[int]) -> list[str]:
    progress, out = Progress(total_steps, 4), io.StringIO()
    display = Display(progress, "ppo on made-up-v1", every, Console(file=out, width=20))
    for update, now in enumerate(steps, 1):
        made = report(update, now, (float(update),))
        progress(made)
        display(made)
    display.close()
    return out.getvalue().splitlines()


def test_plain_lines_come_by_step_with_first_and_last() -> None:
    lines = _lines(100, 30, [5, 10, 29, 31, 40, 59, 61, 99, 101])
    assert lines[0] == "ppo on made-up-v1"
    assert [line.split(" | ")[1].strip() for line in lines[1:]] == [f"{n} steps" for n in (5, 31, 61, 99, 101)]


@pytest.mark.parametrize(("total", "lines"), [(1_000, 20), (2_000_000, 20), (10_000_000, 100)])
def test_a_run_has_twenty_lines_or_one_every_100_000_steps(total: int, lines: int) -> None:
    every = total // 200
    assert len(_lines(total, 0, list(range(every, total + 1, every)))) == 1 + 1 + lines


def test_lines_of_a_cluster_end_with_its_store_and_what_each_node_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    progress, out = Progress(100, 4), io.StringIO()
    display = Display(progress, "title", 10, Console(file=out, width=20))
    for update, (steps, here, there) in enumerate([(10, 8, 2), (40, 28, 12), (100, 88, 12)], 1):
        now[0] += 10.0
        nodes = {"cluster/actors": 3.0 - (update == 3), "cluster/nodes": 2.0}
        store = {} if update < 3 else {"used": 12.4, "size": 2_000.0, "spilled": 3.0}
        nodes |= {f"cluster/store_{name}_megabytes": megabytes for name, megabytes in store.items()}
        metrics = {**nodes, "cluster/steps_a_1": float(here), "cluster/steps_b_2": float(there)}
        made = replace(report(update, steps, ()), metrics=metrics)
        progress(made)
        display(made)
    ends = [line.rpartition(" | ")[2] for line in out.getvalue().splitlines()[1:]]
    assert ends[1:] == [
        "actors 3 on 2 nodes, steps/s: a_1 2, b_2 1",
        "actors 2 on 2 nodes, store 12 of 2,000 MB (3 MB went to the disk), steps/s: a_1 6, b_2 0",
    ]


def test_all_lines_have_the_same_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    progress = Progress(1_200_000, 4, evaluates=True)
    returns = [(), (-20.25, -20.75), (1234.5,) * 7]
    lines: list[str] = []
    for update, steps in enumerate([700, 168_790, 1_200_100]):
        now[0] += (1.0, 300.0, 2_000.0)[update]
        progress(report(update + 1, steps, returns[update]))
        if update == 2:
            progress.evaluation, progress.evaluated_at = {"eval/mean_reward": 17.25, "eval/std_reward": 1.0}, steps
        lines.append(plain_line(progress))
    cells = [line.split(" | ") for line in lines]
    assert [[len(cell) for cell in row] for row in cells] == [[len(cell) for cell in cells[0]]] * 3
    assert cells[0][:6] == [
        "  0%",
        "      700 steps",
        "      0 episodes",
        "return        - ± -     ",
        "length       -",
        "eval        -",
    ]
    assert cells[1][3:5] == ["return    -20.5 ± 0.25  ", "length       7"]
    assert cells[2][5] == "eval    17.25"
    assert all(row[6].endswith(" steps/s") and row[7].endswith(" left") for row in cells)
    assert {row[9] for row in cells} == {"cores    - busy"}
    assert len(plain_line(progress, Budget(0.002, 1000.0, 0.934)).split(" | ")[9]) == len(cells[0][9])
    assert all(row[8].startswith("env ") and ", infer " in row[8] and ", learn " in row[8] for row in cells)


def test_shares_of_time() -> None:
    first = Mark(10.0, 0, {"collect": 1.0, "learn": 1.0, "env": 1.0, "infer": 0.0})
    last = Mark(20.0, 100, {"collect": 7.0, "learn": 4.0, "env": 4.0, "infer": 1.0})
    assert stages_text(first, last) == "collect 60% (env 45%, infer 15%), learn 30%, other 10%"


def test_the_panel_on_a_terminal() -> None:
    progress, out = Progress(100, 4), io.StringIO()
    display = Display(progress, "title", 0, Console(file=out, force_terminal=True, width=100))
    for update in (1, 2):
        made = report(update, 50 * update, (2.0, 4.0), train__entropy=0.25)
        progress(made)
        display(made)
    progress.evaluation, progress.evaluated_at = {"eval/mean_reward": 7.5, "eval/std_reward": 1.0}, 100
    display(report(3, 100))
    display.close()
    display.close()
    shown = out.getvalue()
    for text in (
        "title",
        "100 of 100 steps",
        "3 ± 1",
        "entropy 0.25",
        "7.5 ± 1 at 100 steps",
        "frames/s",
        "0:00 left",
        "% busy; ",
    ):
        assert text in shown


def test_clock() -> None:
    assert [clock(seconds) for seconds in (None, 0, 59.6, 3_725)] == ["?", "0:00", "1:00", "1:02:05"]


def test_a_console_whose_reader_has_gone_is_silent_and_says_so_once(capfd: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as file:
        console = Lasting(file=file)
        console.print("lost")
        console.print("lost as well")
    assert capfd.readouterr().err == "slipstream: nobody reads the output any more; going on without it\n"
