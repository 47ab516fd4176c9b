"""The sum tree against `np.cumsum` and `np.searchsorted`, and prioritised draws against the paper's formulas."""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.replay.prioritized import Proportional, SumTree, importance_weights

# No block of sixteen over the leaves, one, two and three, each but the first with an incomplete last block.
CAPACITIES = [1, 7, 4096, 4099, 70_001, 1_100_009]

seeds = st.integers(0, 2**32 - 1)
capacities = st.sampled_from(CAPACITIES[:-1])


def integers(generator: np.random.Generator, size: int) -> np.ndarray:
    """Values whose sums are exact in any order; half of them are 0, in runs of all lengths."""
    runs = np.repeat(generator.random(size) < 0.5, generator.integers(1, 40, size))[:size]
    return np.where(runs, generator.integers(1, 1000, size), 0).astype(np.float64)


def extremes(generator: np.random.Generator, size: int) -> np.ndarray:
    """Values between 1e-12 and 1e12, and 0."""
    return np.where(generator.random(size) < 0.3, 0.0, 10.0 ** generator.integers(-12, 13, size))


def disturb(
    tree: SumTree, generator: np.random.Generator, kind: Callable[[np.random.Generator, int], np.ndarray] = integers
) -> np.ndarray:
    """Many random updates; returns what the values should be."""
    values = np.zeros(tree.capacity)
    for _ in range(generator.integers(1, 12)):
        size = int(generator.integers(0, min(3 * tree.capacity, 700)))
        items, new = generator.integers(tree.capacity, size=size), kind(generator, size)
        tree.set(items, new)
        for item, value in zip(items, new, strict=True):  # the obvious order
            values[item] = value
        start, stop = np.sort(generator.integers(tree.capacity + 1, size=2))
        if generator.random() < 0.5:
            one = float(kind(generator, 1)[0])
            tree.fill(start, stop, one)
            values[start:stop] = one
        else:
            each = kind(generator, stop - start)
            tree.fill(start, stop, each)
            values[start:stop] = each
    last = generator.integers(tree.capacity)
    tree.set(np.array([last]), np.ones(1))
    values[last] = 1.0
    return values


def filled(values: np.ndarray) -> SumTree:
    tree = SumTree(len(values))
    tree.fill(0, len(values), values)
    return tree


def assert_found_as_by_searchsorted(tree: SumTree, values: np.ndarray, generator: np.random.Generator) -> None:
    ends = values.cumsum()
    total = ends[-1]
    edges = generator.choice(np.append(ends, 0.0), 97)
    mass = np.concatenate([generator.random(301) * total, edges, np.nextafter(edges, 0.0), [np.nextafter(total, 0.0)]])
    mass = mass[mass < total]
    got = tree.find(mass)
    assert got.dtype == np.int64
    assert tree.total == total
    assert np.array_equal(got, np.searchsorted(ends, mass, side="right"))


@settings(deadline=None, max_examples=25)
@given(capacities, seeds)
def test_items_are_found_as_by_cumsum_and_searchsorted(capacity: int, seed: int):
    generator = np.random.default_rng(seed)
    tree = SumTree(capacity)
    values = disturb(tree, generator)
    assert np.array_equal(tree.leaves, values)
    items = generator.integers(capacity, size=13)
    assert np.array_equal(tree.values(items), values[items])
    assert_found_as_by_searchsorted(tree, values, generator)


def test_large_trees_find_items_too():
    generator = np.random.default_rng(1)
    values = integers(generator, CAPACITIES[-1])
    tree = filled(values)
    items = generator.permutation(CAPACITIES[-1])[:1009]
    tree.set(items, integers(generator, 1009))
    values[items] = tree.values(items)
    assert_found_as_by_searchsorted(tree, values, generator)
    tree.set(np.arange(CAPACITIES[-1]), values[::-1].copy())  # more items than there are nodes
    assert_found_as_by_searchsorted(tree, values[::-1], generator)


@settings(deadline=None, max_examples=25)
@given(capacities, seeds)
def test_nodes_do_not_remember_what_the_leaves_were(capacity: int, seed: int):
    tree = SumTree(capacity)
    values = disturb(tree, np.random.default_rng(seed), extremes)
    assert np.array_equal(tree.leaves, values)
    fresh = filled(values)
    for level, expected in zip(tree._levels, fresh._levels, strict=True):
        assert np.array_equal(level, expected)
    assert np.array_equal(tree._cumulative, fresh._cumulative)


@settings(deadline=None, max_examples=60)
@given(capacities, seeds)
def test_items_of_value_0_are_never_found_whatever_the_rounding(capacity: int, seed: int):
    generator = np.random.default_rng(seed)
    tree = SumTree(capacity)
    values = disturb(tree, generator, extremes)
    # Between the sums of nodes rounding is at its worst, and beyond the total by one bit a careless product may land.
    edges = np.concatenate(
        [generator.choice(tree._cumulative, 97), generator.choice(values.cumsum(), 97), [tree.total]]
    )
    mass = np.concatenate(
        [edges, np.nextafter(edges, 0.0), np.nextafter(edges, np.inf), generator.random(97) * edges[-1]]
    )
    found = tree.find(mass)
    assert found.min() >= 0
    assert found.max() < capacity
    assert values[found].min() > 0
    assert values[tree.sample(generator.random(97))].min() > 0


def test_a_rest_that_rounding_puts_past_its_block_stays_in_it():
    """One after the other the small values vanish beside 1; added up first, they don't, and the block is worth more."""
    values = np.zeros(4099)
    values[16:32] = [0.0, 1.0, *[2.0**-53] * 13, 0.0]
    tree = filled(values)
    assert tree.total > values.cumsum()[-1] == 1
    assert tree.find(np.array([0.0, 1.0, tree.total])).tolist() == [17, 17, 17]


def test_of_equal_items_the_last_counts():
    tree = SumTree(5003)
    tree.set(np.array([9, 4, 9, 5002, 9, 4]), np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    assert tree.values(np.array([4, 9, 5002])).tolist() == [6.0, 5.0, 4.0]
    assert tree.total == 15.0


@settings(deadline=None, max_examples=25)
@given(capacities, seeds, st.sampled_from([1, 2, 13, 211]))
def test_draw_i_comes_from_the_ith_part_of_the_total(capacity: int, seed: int, n: int):
    generator = np.random.default_rng(seed)
    tree = SumTree(capacity)
    ends = disturb(tree, generator).cumsum()
    uniforms = generator.random(n)
    items = tree.sample(uniforms)
    for i in range(n):
        mass = (i + uniforms[i]) / n * ends[-1]
        assert items[i] == np.searchsorted(ends, mass, side="right")
        assert ends[items[i]] > i / n * ends[-1]
    assert np.array_equal(items, np.sort(items))
    assert np.array_equal(
        tree.sample(uniforms.astype(np.float32)), tree.sample(uniforms.astype(np.float32).astype("f8"))
    )


def test_greatest_uniforms_draw_the_last_item():
    tree = filled(np.array([3.0, 0.1, 0.7, 0.0]))
    for n in (1, 3, 49, 1000):
        assert tree.sample(np.full(n, np.nextafter(1.0, 0.0)))[-1] == 2
        assert tree.sample(np.full(n, np.nextafter(1.0, 0.0), np.float32))[-1] == 2


def test_items_are_drawn_as_often_as_their_values_say():
    generator = np.random.default_rng(3)
    values = extremes(generator, 4099) * 0
    drawable = generator.permutation(4099)[:257]
    values[drawable] = generator.exponential(size=257) + 0.05
    tree = filled(values)
    n = 100_000
    expected = n * values / values.sum()

    counts = np.bincount(tree.find(generator.random(n) * tree.total), minlength=4099)
    chi_square = ((counts - expected)[drawable] ** 2 / expected[drawable]).sum()
    assert abs(chi_square - 256) < 4 * math.sqrt(2 * 256)
    assert counts.sum() == counts[drawable].sum()
    # An item covers so many whole parts of the total and a piece of one at either end.
    stratified = np.bincount(tree.sample(generator.random(n)), minlength=4099)
    assert np.abs(stratified - expected).max() < 2


@pytest.mark.parametrize("bad", [-1e-9, math.inf, -math.inf, math.nan])
def test_values_that_are_no_priority_are_refused_and_change_nothing(bad: float):
    tree = filled(np.arange(5003.0))
    total = tree.total
    with pytest.raises(ValueError, match=r"is not a finite number of at least 0"):
        tree.set(np.array([3, 4]), np.array([1.0, bad]))
    with pytest.raises(ValueError, match=r"is not a finite number of at least 0"):
        tree.fill(3, 5, bad)
    with pytest.raises(ValueError, match=r"is not a finite number of at least 0"):
        tree.fill(3, 5, np.array([1.0, bad]))
    assert np.array_equal(tree.leaves, np.arange(5003.0))
    assert tree.total == total


def test_items_that_are_not_there_are_refused():
    tree = SumTree(4099)
    for item in (-1, 4099, 4111):
        with pytest.raises(IndexError):
            tree.set(np.array([0, item]), np.ones(2))
    for start, stop in ((-1, 3), (3, 4100), (3, 2)):
        with pytest.raises(IndexError, match="are not in"):
            tree.fill(start, stop, 1.0)
    assert tree.total == 0
    with pytest.raises(ValueError, match="no item has a priority above 0"):
        tree.sample(np.zeros(3))
    with pytest.raises(ValueError, match="read-only"):
        tree.leaves[0] = 1.0


def test_nothing_may_be_set_filled_and_drawn():
    tree = filled(np.ones(11))
    tree.set(np.zeros(0, np.int64), np.zeros(0))
    tree.fill(4, 4, np.zeros(0))
    assert tree.total == 11
    assert tree.sample(np.zeros(0)).shape == (0,)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_importance_weights_are_those_of_the_paper(beta: float):
    generator = np.random.default_rng(5)
    probability, count = generator.random((2, 13)) / 1000, 1009
    got = importance_weights(probability, count, beta)
    for row, weights in zip(probability, got, strict=True):
        w = [(1 / count * 1 / p) ** beta for p in row]
        assert weights == pytest.approx([each / max(w) for each in w], rel=1e-12)
    assert (got.max(axis=-1) == 1).all()
    assert np.array_equal(got.argmax(axis=-1), probability.argmin(axis=-1)) or beta == 0
    assert importance_weights(probability, 3, beta) == pytest.approx(got, rel=1e-12)


def test_full_correction_gives_the_mean_over_all_items():
    """With beta = 1 each item's expected part of the weighted sum is the same: P(i) w_i is constant."""
    values = np.random.default_rng(6).random(17) + 0.01
    probability = values / values.sum()
    weighted = probability * importance_weights(probability, 17, 1.0)
    assert weighted == pytest.approx(np.full(17, weighted[0]), rel=1e-12)


class TestProportional:
    ALPHA, EPSILON = 0.6, 0.01

    def make(self) -> Proportional:
        draws = Proportional(5003, self.ALPHA, self.EPSILON)
        draws.insert(np.arange(10, 21))
        return draws

    def test_new_items_get_the_greatest_priority_so_far(self):
        draws = self.make()
        assert draws.max_priority == 1
        assert draws.tree.values(np.arange(9, 22)).tolist() == [0.0, *[1.0] * 11, 0.0]
        draws.update(np.array([11, 12]), np.array([-3.0, 0.5], np.float32))
        draws.insert(np.array([5002]))
        assert draws.max_priority == 3.01
        assert draws.tree.values(np.array([5002]))[0] == 3.01**self.ALPHA
        draws.update(np.array([11]), np.array([0.1]))  # the greatest is gone, and counts all the same
        assert draws.max_priority == 3.01

    def test_priorities_are_powers_of_errors(self):
        draws = self.make()
        draws.update(np.array([11, 12, 13, 11]), np.array([-3.0, 0.5, 0.0, 0.25]))
        expected = [(error + self.EPSILON) ** self.ALPHA for error in (0.25, 0.5, 0.0)]
        assert draws.tree.values(np.array([11, 12, 13])) == pytest.approx(expected, rel=1e-12)

    def test_items_removed_stay_away(self):
        draws = self.make()
        draws.remove(np.array([12, 13]))
        draws.update(np.array([11, 12]), np.array([2.0, 2.0]))
        assert (draws.tree.leaves > 0).sum() == 9
        assert draws.tree.values(np.array([12, 13])).tolist() == [0.0, 0.0]

    @pytest.mark.parametrize("alpha", [0.0, 0.6])
    def test_draws_have_the_weights_of_their_probabilities(self, alpha: float):
        draws = Proportional(5003, alpha, self.EPSILON)
        draws.insert(np.arange(10, 21))
        draws.update(np.arange(10, 21), np.arange(11.0))
        draws.remove(np.array([14]))
        uniforms = np.random.default_rng(7).random(29)
        items, weight = draws.draw(uniforms, 10, 0.4)
        assert np.array_equal(items, draws.tree.sample(uniforms))
        priority = np.array([abs(i - 10.0) + self.EPSILON for i in range(5003)])
        raised = np.array([priority[i] ** alpha if 10 <= i < 21 and i != 14 else 0.0 for i in range(5003)])
        w = np.array([(10 * raised[i] / raised.sum()) ** -0.4 for i in items])
        assert weight == pytest.approx(w / w.max(), rel=1e-9)
        if alpha == 0:
            assert np.array_equal(weight, np.ones(29))

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_errors_that_are_no_numbers_are_refused_and_change_nothing(self, bad: float):
        draws = self.make()
        before = draws.tree.leaves.copy()
        with pytest.raises(ValueError, match="is not a finite number"):
            draws.update(np.array([11, 12]), np.array([2.0, bad]))
        assert np.array_equal(draws.tree.leaves, before)
        assert draws.max_priority == 1


@settings(deadline=None, max_examples=25)
@given(capacities, seeds)
def test_draws_that_were_saved_go_on_bit_by_bit(capacity: int, seed: int):
    """Priorities of all sizes, so that no sum is exact; those that are saved are copies."""
    generator = np.random.default_rng(seed)
    draws, restored = Proportional(capacity), Proportional(capacity)

    def happen(*both: Proportional) -> None:
        """Items come, go and are learned from."""
        items = generator.integers(capacity, size=(2, 1 + capacity // 3))
        uniforms, errors = generator.random(31), generator.normal(size=31) * 10.0 ** generator.integers(-6, 7, 31)
        for each in both:
            each.remove(items[0])
            each.insert(items[1])
            each.update(each.draw(uniforms, capacity, 0.4).items, errors)

    for _ in range(generator.integers(1, 6)):
        happen(draws)
    state = draws.state()
    wanted = draws.tree.leaves.tobytes()
    happen(draws)
    assert state["priorities"].numpy().tobytes() == wanted
    restored.load(draws.state())
    for _ in range(3):
        assert restored.max_priority == draws.max_priority
        for level, expected in zip(restored.tree._levels, draws.tree._levels, strict=True):
            assert level.tobytes() == expected.tobytes()
        assert restored.tree._cumulative.tobytes() == draws.tree._cumulative.tobytes()
        uniforms = generator.random(97)
        for one, other in zip(draws.draw(uniforms, 11, 0.4), restored.draw(uniforms, 11, 0.4), strict=True):
            assert one.tobytes() == other.tobytes()
        happen(draws, restored)
