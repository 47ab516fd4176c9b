from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from slipstream.algos import APPO, IMPALA
from slipstream.loader import Loader
from slipstream.replay.mixer import REPLAYED, Mixer
from slipstream.replay.options import UnrollReplay
from slipstream.replay.windows import Windows
from slipstream.types import Trajectory
from tests.algos import rows
from tests.algos.test_cloning import actor, remembered, student
from tests.replay.streams import Stream, slab
from tests.replay.test_rows import made

UNROLL = 3


def mixer(proportion: float, columns: int = 4, unrolls: int = 8, seed: int = 1, loader: Loader | None = None) -> Mixer:
    windows = Windows(made(columns, UNROLL, columns * UNROLL * unrolls), UNROLL, UNROLL)
    return Mixer(windows, columns, proportion, ("value",), (loader or Loader(0, torch.device("cpu"))).begin, seed)


def ahead(mixed: Mixer, fresh: Trajectory, version: int) -> Trajectory:
    """As a learner does: the next update's draw begins once this one's minibatches are gathered."""
    found = mixed.mix(fresh, version)
    mixed.look_ahead(version + 1)
    return found


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
        got = mixed.mix(fresh, number)
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
        got = mixed.mix(fresh, number)
        kept = {column(each, b) for each in slabs[max(0, number - 3) : number] for b in range(4)}
        assert {column(got, b) for b in range(4, got.columns)} <= kept


def test_shares_by_age_are_the_same_names_in_every_update_and_sum_to_one() -> None:
    """Against counting by hand; 8 unrolls are kept, so that what is 8 updates old or older is the last of them."""
    mixed, streams = mixer(1.0), [Stream(slot, 7) for slot in range(4)]
    names = [f"lag/replayed_from_{least}" for least in (1, 2, 4, 8)]
    ages = dict[str, torch.Tensor | float]()
    for number in [*range(13), 40]:
        fresh = slab(streams, UNROLL)
        fresh.version.fill_(number)
        got = mixed.mix(fresh, number)
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
    skipped = slab(streams, UNROLL)
    mixed.store(skipped)
    got = mixed.mix(slab(streams, UNROLL), 0)
    assert {column(got, b) for b in range(4, 8)} <= {column(skipped, b) for b in range(4)}


def test_draws_are_a_function_of_seed_and_version_wherever_they_are_gathered() -> None:
    found: list[list[torch.Tensor]] = []
    for seed, threads in ((1, 0), (1, 2), (2, 0)):
        loader = Loader(threads, torch.device("cpu"))
        try:
            mixed, streams = mixer(2.0, seed=seed, loader=loader), [Stream(slot, 7) for slot in range(4)]
            found.append([ahead(mixed, slab(streams, UNROLL), version).version for version in range(8)])
        finally:
            loader.close()
    assert all(map(torch.equal, found[0], found[1]))
    assert not all(map(torch.equal, found[0], found[2]))


def test_a_draw_for_another_version_is_drawn_anew() -> None:
    """As after a checkpoint was loaded."""
    found: list[Trajectory] = []
    for versions in (range(6), (0, 1, 2, 3, 9, 5)):
        mixed, streams = mixer(2.0), [Stream(slot, 7) for slot in range(4)]
        found.append([ahead(mixed, slab(streams, UNROLL), version) for version in versions][-1])
    assert torch.equal(found[0].version, found[1].version)


@pytest.mark.parametrize("threads", [0, 2])
def test_what_is_stored_or_restarted_meanwhile_is_drawn_from(threads: int) -> None:
    """What was gathered before is forgotten, and nothing moves under those who gather it."""
    loader = Loader(threads, torch.device("cpu"))
    try:
        mixed, streams = mixer(1.0, unrolls=3, loader=loader), [Stream(slot, 7) for slot in range(4)]
        slabs = [slab(streams, UNROLL) for _ in range(8)]
        for version, fresh in enumerate(slabs[:3]):
            ahead(mixed, fresh, version)
        for fresh in slabs[3:7]:
            mixed.store(fresh)
            mixed.look_ahead(3)
        mixed.restart()
        anew = mixer(1.0, unrolls=3, loader=loader)
        for fresh in slabs[:7]:
            anew.store(fresh)
        anew.restart()
        got, wanted = (each.mix(slabs[7], 3) for each in (mixed, anew))
    finally:
        loader.close()
    assert [column(got, b) for b in range(8)] == [column(wanted, b) for b in range(8)]
    kept = {row for each in slabs[5:7] for row in each.version.flatten().tolist()}
    assert set(got.version[:, 4:].flatten().tolist()) <= kept


def test_a_replay_that_never_holds_enough_unrolls_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no more than 8 unrolls, and 12 are replayed .*replay.capacity 48"):
        mixer(3.0, unrolls=3)
    mixed, streams = mixer(3.0, unrolls=4), [Stream(slot, 7) for slot in range(4)]
    assert [mixed.mix(slab(streams, UNROLL), version).columns for version in range(6)] == [4, 4, 4, 16, 16, 16]


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
    mixed.mix(fresh, 0)
    assert fresh.extras.keys() == before.extras.keys()
    assert torch.equal(fresh.obs, before.obs)


REPLAY = UnrollReplay(proportion=1.0, capacity=2_000)


class Noting(Loader):
    """Notes what it is asked to do, which it does in the thread that asks."""

    def __init__(self) -> None:
        super().__init__(0, torch.device("cpu"))
        self.notes: list[str] = []

    def load(self, gathers: Iterator[Callable[[], Sequence[Any]]]) -> Generator[Sequence[Any]]:
        def noted() -> Iterator[Callable[[], Sequence[Any]]]:
            for gather in gathers:
                self.notes.append("minibatch")
                yield gather

        return super().load(noted())

    def begin(self, task: Callable[[], Any]) -> Callable[[], Any]:
        self.notes.append("replay")
        return super().begin(task)


@pytest.mark.parametrize(
    ("algorithm", "minibatches"),
    [(IMPALA(replay=REPLAY), 1), (APPO(replay=REPLAY, batch_size=rows.ROWS * 6, epochs=2, target_period=2), 4)],
    ids=["impala", "appo"],
)
def test_an_update_replays_what_was_stored_and_the_next_draw_waits_for_its_minibatches(
    algorithm: IMPALA | APPO, minibatches: int
) -> None:
    found: list[torch.Tensor] = []
    for bonus in (0.0, 5.0):
        policy, loader = actor(), Noting()
        learner, crew = student(algorithm, policy, loader=loader)
        stored, fresh = (remembered(policy, seed) for seed in range(2))
        stored.reward.add_(bonus)
        learner.skip(stored)
        learner.step(fresh)
        crew.close()
        assert learner.steps == sum(int(each.valid.sum()) for each in (stored, fresh))
        assert loader.notes == ["minibatch"] * minibatches + ["replay"]
        found.append(torch.cat([parameter.detach().flatten() for parameter in policy.parameters()]))
    assert not torch.equal(*found)
