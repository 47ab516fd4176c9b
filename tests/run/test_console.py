from __future__ import annotations

import io

from rich.console import Console

from slipstream.run.console import Display, clock, plain_line, stages_text
from slipstream.run.progress import Mark, Progress
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
    assert [line.split(" steps")[0] for line in lines[1:]] == ["5/100", "31/100", "61/100", "99/100", "101/100"]


def test_by_default_a_run_has_fifty_lines() -> None:
    assert len(_lines(100_000, 0, list(range(100, 100_001, 100)))) == 1 + 1 + 50


def test_a_line_is_not_broken_and_says_steps_and_frames() -> None:
    line = _lines(100, 30, [5])[1]
    assert "5/100 steps (5%)" in line
    assert "return 1 ± 0 (1 episodes, 7 steps long)" in line
    assert "steps/s" in line
    assert "frames/s" in line
    assert "left" in line


def test_without_an_episode() -> None:
    progress = Progress(100, 1)
    progress(report(1, 5))
    assert "no episode has ended yet" in plain_line(progress)
    assert "frames/s" not in plain_line(progress)


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
    for text in ("title", "100 of 100 steps", "3 ± 1", "entropy 0.25", "7.5 ± 1 at 100 steps", "frames/s", "0:00 left"):
        assert text in shown


def test_clock() -> None:
    assert [clock(seconds) for seconds in (None, 0, 59.6, 3_725)] == ["?", "0:00", "1:00", "1:02:05"]
