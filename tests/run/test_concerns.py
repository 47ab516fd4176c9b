from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slipstream.envs.options import NonFinite
from slipstream.envs.toy import Chaos
from slipstream.run.concerns import Concerns
from slipstream.run.loop import Own
from slipstream.types import Report
from tests.run.reports import report
from tests.run.runs import train

MARK = "train__beyond_atoms"


def said(*shares: float | None) -> list[str]:
    return said_of(
        Concerns(), [report(at, at, **({} if share is None else {MARK: share})) for at, share in enumerate(shares, 1)]
    )


def said_of(concerns: Concerns, reports: Iterable[Report]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for each in reports:
            concerns(each)
    return [str(each.message) for each in caught]


def mended(rule: NonFinite, episodes: int, rows: float, updates: int = 300, steps: int = 10) -> list[str]:
    """What is said where every update has so many steps, episodes and mended rows."""
    ends = (1.0,) * episodes
    reports = (report(at, 70 + steps * at, ends, faults__mended_rows=rows) for at in range(1, updates + 1))
    return said_of(Concerns(rule, 70), reports)


def test_a_share_that_stays_large_is_said_once() -> None:
    assert said(*[0.5, None] * 300) == [
        "50% of what returns are learned from lies beyond the atoms, where nothing can be told apart: widen "
        "algo.v_min and algo.v_max (train/beyond_atoms)"
    ]


def test_a_moment_is_no_concern() -> None:
    assert said(*[0.5] * 99) == []
    assert said(*[1.0] * 5, *[0.0] * 300) == []
    assert said(*[0.0] * 100, *[0.06] * 100) != [], "means are taken anew"


def test_episodes_that_are_cut_again_and_again_are_said_once() -> None:
    (told,) = mended("skip", episodes=4, rows=3.0)
    assert told.startswith("75% of the last episodes were cut where the environment had numbers that are not finite")
    assert mended("skip", episodes=4, rows=3.0, updates=24) == [], "fewer than 100 episodes"
    assert mended("skip", episodes=4, rows=0.2) == []
    assert mended("skip", episodes=0, rows=1.0) == []


def test_steps_that_are_clamped_again_and_again_are_said_once() -> None:
    (told,) = mended("clamp", episodes=0, rows=2.0)
    assert told.startswith("20% of the last steps had numbers that are not finite")
    assert mended("clamp", episodes=4, rows=2.0, updates=99) == [], "fewer than 1,000 steps"
    assert mended("clamp", episodes=4, rows=0.1) == []


class Failing(Chaos):
    """From its 20th step on it has nothing but NaN to show, whatever is reset."""

    def step(self, action: Any) -> Any:
        obs, *rest = super().step(action)
        return np.full_like(obs, np.nan) if self._steps >= 20 else obs, *rest


@pytest.mark.parametrize(("rule", "what"), [("skip", "episodes were cut"), ("clamp", "steps had numbers")])
def test_a_run_whose_environment_is_broken_says_so_again(tmp_path: Path, rule: str, what: str) -> None:
    with pytest.warns(UserWarning, match=rf"\d\d% of the last {what}.* mend the environment"):
        train(tmp_path, Own(env=partial(Failing, "none")), total_steps=2_000, env_options__non_finite=rule)


def test_a_run_whose_returns_are_beyond_its_atoms_warns(tmp_path: Path) -> None:
    small = {"num_envs": 2, "unroll": 4, "net__hidden": [8], "algo__batch_size": 8, "algo__replay__learning_starts": 16}
    with pytest.warns(UserWarning, match=r"lies beyond the atoms, .* widen algo\.v_min and algo\.v_max"):
        train(tmp_path, algo="c51", total_steps=1_000, algo__v_min=0.0, algo__v_max=2.0, **small)
