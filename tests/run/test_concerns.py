from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from slipstream.run.concerns import Concerns
from tests.run.reports import report
from tests.run.runs import train

MARK = "train__beyond_atoms"


def said(*shares: float | None) -> list[str]:
    concerns = Concerns()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for update, share in enumerate(shares, 1):
            concerns(report(update, update, **({} if share is None else {MARK: share})))
    return [str(each.message) for each in caught]


def test_a_share_that_stays_large_is_said_once() -> None:
    assert said(*[0.5, None] * 300) == [
        "50% of what returns are learned from lies beyond the atoms, where nothing can be told apart: widen "
        "algo.v_min and algo.v_max (train/beyond_atoms)"
    ]


def test_a_moment_is_no_concern() -> None:
    assert said(*[0.5] * 99) == []
    assert said(*[1.0] * 5, *[0.0] * 300) == []
    assert said(*[0.0] * 100, *[0.06] * 100) != [], "means are taken anew"


def test_a_run_whose_returns_are_beyond_its_atoms_warns(tmp_path: Path) -> None:
    small = {"num_envs": 2, "unroll": 4, "net__hidden": [8], "algo__batch_size": 8, "algo__replay__learning_starts": 16}
    with pytest.warns(UserWarning, match=r"lies beyond the atoms, .* widen algo\.v_min and algo\.v_max"):
        train(tmp_path, algo="c51", total_steps=1_000, algo__v_min=0.0, algo__v_max=2.0, **small)
