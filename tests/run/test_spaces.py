from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from gymnasium import Space, spaces

from slipstream.run.spaces import describe, restore

SPACES: list[Space[Any]] = [
    spaces.Box(0, 255, (4, 84, 84), np.uint8),
    spaces.Box(-np.inf, np.inf, (3,), np.float64),
    spaces.Box(np.array([-1.0, -np.inf], np.float32), np.array([1.0, 2.5], np.float32)),
    spaces.Discrete(5),
    spaces.Discrete(3, start=-1),
    spaces.MultiDiscrete([2, 3]),
    spaces.MultiDiscrete([2, 3], start=[1, -5]),
    spaces.MultiDiscrete(np.array([[2, 3, 4], [5, 6, 7]]), start=np.array([[0, 1, 2], [3, 4, 5]])),
    spaces.MultiBinary(4),
    spaces.MultiBinary([2, 3]),
    spaces.Dict({"b": spaces.Discrete(2), "a": spaces.Tuple((spaces.Box(0, 1, (2, 3)), spaces.Discrete(7)))}),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_json_keeps_the_space(space: Space[Any]) -> None:
    assert restore(json.loads(json.dumps(describe(space)))) == space


def test_a_form_without_starts_starts_at_zero() -> None:
    form = {"kind": "MultiDiscrete", "nvec": [2, 3], "dtype": "int64"}
    assert restore(form) == spaces.MultiDiscrete([2, 3], start=[0, 0])


def test_forms_of_different_spaces_differ() -> None:
    forms = [json.dumps(describe(space)) for space in SPACES]
    assert len(set(forms)) == len(forms)


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(TypeError, match="unsupported space"):
        describe(spaces.Text(3))
    with pytest.raises(ValueError, match="unknown kind of space 'Pickle'"):
        restore({"kind": "Pickle"})
