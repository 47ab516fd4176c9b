from __future__ import annotations

import pytest

from slipstream import tree

NESTED = {"b": (1, {"y": 2, "x": 3}), "a": 4}


def test_items_name_the_path_of_every_leaf_in_key_order():
    assert tree.items(NESTED) == [("a", 4), ("b.0", 1), ("b.1.x", 3), ("b.1.y", 2)]
    assert tree.items(7) == [("", 7)]
    assert tree.items(()) == []
    assert tree.items(5, "root") == [("root", 5)]


def test_leaves_are_the_items_without_their_paths():
    assert tree.leaves(NESTED) == [4, 1, 3, 2]


def test_map_keeps_the_structure_and_walks_several_trees_together():
    got = tree.map(lambda a, b: (a - b) * 10, NESTED, NESTED | {"a": 1})
    assert got == {"a": 30, "b": (0, {"x": 0, "y": 0})}
    assert list(got) == ["a", "b"]


def test_map_calls_in_the_order_of_items():
    seen: list[int] = []
    tree.map(seen.append, NESTED)
    assert seen == tree.leaves(NESTED)


def test_a_list_is_a_leaf():
    assert tree.map(len, {"a": [1, 2, 3]}) == {"a": 3}


def test_trees_of_different_structure_are_refused():
    with pytest.raises(ValueError, match="zip"):
        tree.map(lambda a, b: a, (1, 2), (1,))
    with pytest.raises(KeyError, match="y"):
        tree.map(lambda a, b: a, {"x": 1, "y": 2}, {"x": 1})
