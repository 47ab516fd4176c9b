from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from slipstream.algos import APPO, IMPALA
from slipstream.replay.mixer import REPLAYED, Mixer
from slipstream.replay.options import UnrollReplay
from slipstream.replay.windows import Windows
from slipstream.types import Trajectory
from tests.algos import rows
from tests.algos.test_cloning import actor, remembered, student
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


REPLAY = UnrollReplay(proportion=1.0, capacity=2_000)


@pytest.mark.parametrize(
    "algorithm",
    [IMPALA(replay=REPLAY), APPO(replay=REPLAY, batch_size=rows.ROWS * 3, target_period=2)],
    ids=["impala", "appo"],
)
def test_columns_that_are_not_fresh_are_kept_for_later_and_replayed_ones_count(algorithm: IMPALA | APPO) -> None:
    """Whatever they hold, their own update is the same; that of a later slab, which replays them, is another one."""
    fresh = torch.arange(rows.COLUMNS) % 2 == 0
    found: dict[str, list[torch.Tensor]] = {}
    for changed in ("nothing", "stale", "stored"):
        policy = actor()
        learner, crew = student(algorithm, policy)
        stored, mixed, later = (remembered(policy, seed) for seed in range(3))
        if changed == "stored":
            stored.reward.add_(5.0)
        if changed == "stale":
            mixed.reward[:, ~fresh] += 5.0
            mixed.log_prob[:, ~fresh] -= 0.5
        learner.skip(stored)
        after: list[torch.Tensor] = []
        for each, columns in ((mixed, fresh), (later, None)):
            learner.step(each, fresh=columns)
            after.append(torch.cat([parameter.detach().flatten() for parameter in policy.parameters()]))
        crew.close()
        assert learner.steps == sum(int(each.valid.sum()) for each in (stored, mixed, later))
        found[changed] = after
    assert torch.equal(found["nothing"][0], found["stale"][0])
    assert not torch.equal(found["nothing"][0], found["stored"][0])
    assert not torch.equal(found["nothing"][1], found["stale"][1])
