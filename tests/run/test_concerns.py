from __future__ import annotations

from slipstream.run.concerns import Concerns
from tests.run.reports import report

MARK = "train__beyond_atoms"


def said(*shares: float | None) -> list[str]:
    lines: list[str] = []
    concerns = Concerns(lines.append)
    for update, share in enumerate(shares, 1):
        concerns(report(update, update, **({} if share is None else {MARK: share})))
    return lines


def test_a_share_that_stays_large_is_said_once() -> None:
    assert said(*[0.5, None] * 300) == [
        "warning: 50% of what returns are learned from lies beyond the atoms, where nothing can be told apart: widen "
        "algo.v_min and algo.v_max (train/beyond_atoms)"
    ]


def test_a_moment_is_no_concern() -> None:
    assert said(*[0.5] * 99) == []
    assert said(*[1.0] * 5, *[0.0] * 300) == []
    assert said(*[0.0] * 100, *[0.06] * 100) != [], "means are taken anew"
