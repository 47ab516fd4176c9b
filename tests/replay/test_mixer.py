from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from slipstream.replay.mixer import REPLAYED, Mixer
from slipstream.replay.windows import Windows
from slipstream.types import Trajectory
from tests.replay.streams import Stream, slab
from tests.replay.test_rows import made

UNROLL = 3


def mixer(proportion: float, columns: int = 4, unrolls: int = 8) -> Mixer:
    return Mixer(
        Windows(made(columns, UNROLL, columns * UNROLL * unrolls), UNROLL, UNROLL), columns, proportion, ("value",)
    )


def column(trajectory: Trajectory, number: int) -> tuple[object, ...]:
    """All that one column holds, but row T of the extras."""
    parts = [trajectory.obs, trajectory.action, trajectory.log_prob, trajectory.reward, trajectory.terminated]
    parts += [trajectory.truncated, trajectory.valid, trajectory.version, trajectory.extras["value"][:-1]]
    return *(part[:, number].numpy().tobytes() for part in parts), trajectory.state0[0][number].numpy().tobytes()


def test_every_update_has_p_replayed_unrolls_for_a_fresh_one() -> None:
    """Fresh columns first and as they were; the others are whole unrolls of earlier slabs, all of them in time."""
    mixed, streams = mixer(1.5), [Stream(slot, 7) for slot in range(4)]
    earlier, seen = set[tuple[object, ...]](), set[tuple[object, ...]]()
    for number in range(30):
        fresh = slab(streams, UNROLL)
        got = mixed.mix(fresh, np.random.default_rng(number))
        replayed = 0 if number < 2 else 6
        assert got.columns == 4 + replayed
        assert [column(got, b) for b in range(4)] == [column(fresh, b) for b in range(4)]
        assert got.extras[REPLAYED][:, :4].max() == 0
        assert got.slot[:4].tolist() == [0, 1, 2, 3]
        drawn = {column(got, b) for b in range(4, got.columns)}
        assert drawn <= earlier
        if replayed:
            assert got.extras[REPLAYED].shape == (UNROLL + 1, 10)
            assert got.extras[REPLAYED][:, 4:].min() == 1
        seen |= drawn
        earlier |= {column(fresh, b) for b in range(4)}
    assert len(seen) > 60, "most of 120 unrolls are drawn sooner or later"


def test_the_oldest_unrolls_make_room() -> None:
    mixed, streams = mixer(1.0, unrolls=3), [Stream(slot, 7) for slot in range(4)]
    slabs = [slab(streams, UNROLL) for _ in range(12)]
    for number, fresh in enumerate(slabs):
        got = mixed.mix(fresh, np.random.default_rng(number))
        kept = {column(each, b) for each in slabs[max(0, number - 3) : number] for b in range(4)}
        assert {column(got, b) for b in range(4, got.columns)} <= kept


def test_shares_by_age_are_the_same_names_in_every_update_and_sum_to_one() -> None:
    """Against counting by hand; 8 unrolls are kept, so that what is 8 updates old or older is the last of them."""
    mixed, streams = mixer(1.0), [Stream(slot, 7) for slot in range(4)]
    names = [f"lag/replayed_from_{least}" for least in (1, 2, 4, 8)]
    for number in [*range(13), 40]:
        fresh = slab(streams, UNROLL)
        fresh.version.fill_(number)
        got = mixed.mix(fresh, np.random.default_rng(number))
        ages = mixed.ages(got, number)
        if number == 0:
            assert ages == {}, "nothing is replayed yet"
            continue
        old = [number - int(got.version[t, b]) for b in range(4, 8) for t in range(UNROLL) if got.valid[t, b]]
        assert float(ages.pop("lag/replayed_mean")) == pytest.approx(sum(old) / len(old))
        assert ages.pop("lag/replayed_max") == max(old)
        bounds = [1, 2, 4, 8, 10**9]
        shares = [sum(low <= age < high for age in old) / len(old) for low, high in pairwise(bounds)]
        assert list(ages) == names
        assert list(ages.values()) == pytest.approx(shares)
        assert sum(ages.values()) == pytest.approx(1.0)
    assert ages["lag/replayed_from_8"] == 1.0, "all of them are 28 updates old, or older"


def test_what_is_skipped_is_stored() -> None:
    mixed, streams = mixer(1.0), [Stream(slot, 7) for slot in range(4)]
    assert not mixed.ready
    skipped = slab(streams, UNROLL)
    mixed.store(skipped)
    got = mixed.mix(slab(streams, UNROLL), np.random.default_rng(0))
    assert {column(got, b) for b in range(4, 8)} <= {column(skipped, b) for b in range(4)}


def test_draws_are_a_function_of_the_generator() -> None:
    found: list[torch.Tensor] = []
    for seed in (1, 1, 2):
        mixed, streams = mixer(2.0), [Stream(slot, 7) for slot in range(4)]
        for _ in range(5):
            got = mixed.mix(slab(streams, UNROLL), np.random.default_rng(seed))
        found.append(got.version)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(("proportion", "said"), [(0.3, "use 0.25"), (0.1, "use 0.25"), (1.1, "use 1.0")])
def test_a_part_of_an_unroll_is_refused(proportion: float, said: str) -> None:
    with pytest.raises(
        ValueError, match=rf"algo.replay.proportion={proportion} of 4 unrolls is no whole number; {said}"
    ):
        mixer(proportion)


def test_a_slab_is_not_changed() -> None:
    mixed, streams = mixer(1.0), [Stream(slot, 7) for slot in range(4)]
    fresh = slab(streams, UNROLL)
    before = replace(fresh, extras=dict(fresh.extras), obs=fresh.obs.clone())
    mixed.mix(fresh, np.random.default_rng(0))
    assert fresh.extras.keys() == before.extras.keys()
    assert torch.equal(fresh.obs, before.obs)
