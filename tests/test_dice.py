from __future__ import annotations

import math

import numpy as np
import pytest

from slipstream import dice

KEYS = dice.keys(7, "act", range(5))


def test_numbers_are_the_published_splitmix64_sequence():
    """Outputs of the reference implementation for seed 0; the top 23 bits of each are used."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    got = dice.uniform(np.zeros(1, np.uint64), 0, 4, 1).ravel()
    assert got.tolist() == [(number >> 41) / 2**23 for number in published]


def test_any_row_can_be_read_without_those_before_it():
    whole = dice.uniform(KEYS, 0, 11, 3)
    assert whole.shape == (11, 5, 3)
    assert whole.dtype == np.float32
    for row, rows in ((0, 4), (4, 7), (10, 1)):
        assert np.array_equal(dice.uniform(KEYS, row, rows, 3), whole[row : row + rows])


def test_a_slot_does_not_see_its_neighbours():
    whole = dice.uniform(KEYS, 3, 2, 2)
    for slot in range(5):
        assert np.array_equal(dice.uniform(KEYS[slot : slot + 1], 3, 2, 2), whole[:, slot : slot + 1])


def test_numbers_are_multiples_of_2_to_the_minus_23_below_one():
    numbers = dice.uniform(KEYS, 0, 20_000, 1).astype(np.float64)
    assert numbers.min() >= 0
    assert numbers.max() <= 1 - 2.0**-23
    assert np.array_equal(numbers * 2**23, np.round(numbers * 2**23))
    # Small numbers occur as often as they should: the grid is uniform, not the mantissa.
    assert 50 < (numbers < 1e-3).sum() < 150


def test_numbers_are_uniform_and_slots_are_uncorrelated():
    numbers = dice.uniform(KEYS, 0, 20_000, 1)[..., 0].astype(np.float64)
    counts = np.histogram(numbers, bins=64, range=(0, 1))[0]
    expected = numbers.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 4 * math.sqrt(2 * 63)
    correlation = np.corrcoef(numbers.T) - np.eye(5)
    assert np.abs(correlation).max() < 4 / math.sqrt(20_000)
    assert abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 4 / math.sqrt(20_000)


def test_a_million_rows_on_the_numbers_still_differ():
    assert not np.array_equal(dice.uniform(KEYS, 2**40, 3, 1), dice.uniform(KEYS, 0, 3, 1))


def test_keys_depend_on_seed_role_and_slot_only():
    assert np.array_equal(dice.keys(7, "act", [3, 1]), KEYS[[3, 1]])
    others = [dice.keys(8, "act", range(5)), dice.keys(7, "explore", range(5)), KEYS]
    assert len(np.unique(np.concatenate(others))) == 15


def test_keys_are_the_same_on_every_machine():
    """Written down once: a change here changes every run ever made."""
    assert dice.keys(0, "act", [0, 1]).tolist() == [11074439855061308189, 12115628885953938667]
    assert dice.env_seed(0, "env", 2, 5) == 689022673


def test_env_seeds_fit_an_int32_and_differ():
    seeds = [dice.env_seed(1, "env", slot, episode) for slot in range(20) for episode in range(20)]
    assert len(set(seeds)) == 400
    assert all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize("size", [1, 2, 97])
def test_permutation_holds_every_index_once_and_is_keyed(size: int):
    got = dice.permutation(3, "minibatch", 4, 5, size=size)
    assert np.array_equal(np.sort(got), np.arange(size))
    assert np.array_equal(got, dice.permutation(3, "minibatch", 4, 5, size=size))
    if size > 2:
        assert not np.array_equal(got, dice.permutation(3, "minibatch", 4, 6, size=size))
        assert not np.array_equal(got, dice.permutation(3, "replay", 4, 5, size=size))


def test_the_global_generator_is_not_read():
    np.random.seed(0)
    one = dice.permutation(3, "minibatch", size=50)
    np.random.seed(1)
    assert np.array_equal(one, dice.permutation(3, "minibatch", size=50))
    assert np.array_equal(dice.keys(7, "act", range(5)), KEYS)


def test_runs_of_neighbouring_seeds_share_no_environment():
    """Not as where the seed of an environment is the run's plus its number."""
    seeds = [dice.env_seed(run, "env", slot, 0) for run in range(30) for slot in range(30)]
    assert len(set(seeds)) == 900
