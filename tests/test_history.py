"""The past of slots: in rows or all at once the same, as far back as it takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium import Space, spaces

from slipstream import history
from slipstream.history import History, Past

SLOTS = 3


def assert_same(one: History, other: History) -> None:
    for name in ("start", "count", "action"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert getattr(one, name).dtype == getattr(other, name).dtype


@pytest.mark.parametrize("every", [1, 50])
@pytest.mark.parametrize("space", [spaces.Discrete(5), spaces.Box(-1.0, 1.0, (2,), np.float32)])
def test_row_by_row_or_many_at_once(space: Space[Any], every: int) -> None:
    generator = np.random.Generator(np.random.Philox(3))
    space.seed(3)
    single, many = (Past(SLOTS, space, every) for _ in range(2))
    for rows in [1, 300, 7, 256, 600]:
        action = np.stack([[np.asarray(space.sample()) for _ in range(SLOTS)] for _ in range(rows)])
        dead = generator.random((rows, SLOTS)) < 0.05
        many.add(action, dead)
        for t in range(rows):
            single.sent(action[t])
            single.reset(dead[t])
        assert_same(single.history(), many.history())
        loaded = Past(SLOTS, space, every)
        loaded.load(many.history())
        assert_same(loaded.history(), many.history())
        many = loaded
    assert many.history().start.min() > 1


def test_it_forgets_what_is_needed_no_more() -> None:
    past = Past(SLOTS, spaces.Discrete(5), 1)
    dead = np.zeros((64, SLOTS), np.bool_)
    dead[::9] = True
    for _ in range(300):
        past.add(np.ones((64, SLOTS), np.int64), dead)
    assert len(past._action) <= 1024


def test_what_grows_without_end_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(history, "_LARGE", 8 * SLOTS * 500)
    past = Past(SLOTS, spaces.Discrete(5), 1)
    for _ in range(4000):
        past.sent(np.ones(SLOTS, np.int64))
    (told,) = caplog.messages
    assert told.startswith("after 514 steps without a new episode, 0 MB of actions")
