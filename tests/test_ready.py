from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slipstream import slab, tree
from slipstream.collector import Assignment, Collected, Collector, Stopped, home
from slipstream.envs import EnvOptions, make_envs
from slipstream.history import History
from slipstream.nets.actor_critic import ActorCritic, make_actor_critic
from slipstream.nets.trunk import Network
from slipstream.ready import ReadyCollector, group_that_holds, make_collector
from slipstream.types import Act, Envs, EnvSpec, EnvStep, Place, Trajectory
from tests.draws import Telling, Wide, drawn

ROWS, SLABS, SEED = 7, 3, 5
Core = Literal["none", "lstm", "gru"]


class Shuffled:
    """Environments whose lanes answer in an order that a seed draws; `Envs` in everything else."""

    def __init__(self, envs: Envs, order: int) -> None:
        self._envs = envs
        self._draw = np.random.Generator(np.random.Philox(order))
        self.waits = 0

    @property
    def spec(self) -> EnvSpec:
        return self._envs.spec

    def reset(self, seed: int) -> None:
        self._envs.reset(seed)

    def restore(self, seed: int, history: History) -> None:
        self._envs.restore(seed, history)

    def send(self, action: NDArray[Any], lane: int) -> None:
        self._envs.send(action, lane)

    def wait(self, lanes: Sequence[int]) -> list[int]:
        self.waits += 1
        ready = self._envs.wait(lanes)
        return self._draw.permutation(ready)[: self._draw.integers(1, len(ready) + 1)].tolist()

    def recv(self, lane: int) -> EnvStep:
        return self._envs.recv(lane)

    def close(self) -> None:
        self._envs.close()


def counter(lanes: int, columns: int = 12, order: int = 0) -> Shuffled:
    envs = Shuffled(make_envs("toy:counter", columns, lanes, EnvOptions()), order)
    envs.reset(SEED)
    return envs


def policy_for(envs: Envs, core: Core = "none") -> ActorCritic:
    return make_actor_critic(envs.spec, Network(hidden=(5,), core=core, core_size=4), None, 2)


CPU = torch.device("cpu")

Made = Callable[[Envs, list[int], ActorCritic, list[Trajectory]], Collector | ReadyCollector]


def by_group(group: int) -> Made:
    def made(envs: Envs, lanes: list[int], policy: ActorCritic, slabs: list[Trajectory]) -> ReadyCollector:
        return ReadyCollector(Assignment(envs, lanes, policy, slabs, SEED, int), group)

    return made


def in_turn(envs: Envs, lanes: list[int], policy: ActorCritic, slabs: list[Trajectory]) -> Collector:
    return Collector(Assignment(envs, lanes, policy, slabs, SEED, int))


def fields(trajectory: Trajectory) -> list[Tensor]:
    """Every column, copied."""
    own = [trajectory.action, trajectory.log_prob, trajectory.reward, trajectory.terminated, trajectory.truncated]
    own += [trajectory.valid, trajectory.version, trajectory.slot, *trajectory.extras.values()]
    return [leaf.clone() for leaf in (*own, *tree.leaves(trajectory.obs), *tree.leaves(trajectory.state0))]


def collected(
    lanes: int, made: Made, core: Core = "none", order: int = 0, shares: int = 1, group: int = 1
) -> tuple[list[list[Tensor]], list[Any], int]:
    """Slabs, episodes and steps of the Counter, with `shares` collectors that own whole groups."""
    envs = counter(lanes, order=order)
    policy = policy_for(envs, core)
    trajectory = slab.allocate(envs.spec, policy, ROWS)
    groups = [range(first, first + group) for first in range(0, lanes, group)]
    owned = [[lane for part in groups[share::shares] for lane in part] for share in range(shares)]
    collectors = [made(envs, own, policy, [trajectory]) for own in owned]
    slabs: list[list[Tensor]] = []
    parts: list[Collected] = []
    for _ in range(SLABS):
        parts += [part.collect(home(part.lanes, 12 // lanes, 0)) for part in collectors]
        slabs.append(fields(trajectory))
    episodes = sorted((e for part in parts for e in part.episodes), key=lambda e: (e.row, e.slot))
    return slabs, episodes, sum(part.steps for part in parts)


def assert_same(
    one: tuple[list[list[Tensor]], list[Any], int], other: tuple[list[list[Tensor]], list[Any], int]
) -> None:
    for a, b in zip(itertools.chain(*one[0]), itertools.chain(*other[0]), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert one[1:] == other[1:]


@pytest.mark.parametrize("core", ["none", "lstm", "gru"])
@pytest.mark.parametrize("lanes", [3, 12])
def test_with_one_lane_per_forward_it_is_the_collector(lanes: int, core: Core) -> None:
    """The slow twin takes the lanes in turn; here they answer in any order, at rows of their own."""
    assert_same(collected(lanes, by_group(1), core), collected(lanes, in_turn, core))


@pytest.mark.parametrize("core", ["none", "lstm", "gru"])
def test_one_lane_of_all_slots_is_a_group_of_lanes_that_answer_together(core: Core) -> None:
    """The forward has the same shape, so the bits are those of PAAC, whoever is ready when."""
    assert_same(collected(12, by_group(12), core, group=12), collected(1, in_turn, core))


@pytest.mark.parametrize("core", ["none", "lstm"])
@pytest.mark.parametrize(("lanes", "group"), [(12, 4), (6, 3), (4, 2)])
def test_neither_order_nor_shares_change_a_bit(lanes: int, group: int, core: Core) -> None:
    one = collected(lanes, by_group(group), core, group=group)
    assert_same(collected(lanes, by_group(group), core, order=1, group=group), one)
    assert_same(collected(lanes, by_group(group), core, order=2, shares=2, group=group), one)


def test_lanes_do_run_at_rows_of_their_own() -> None:
    """Otherwise the tests above would show nothing: more waits than rows, since few answer at once."""
    envs = counter(12)
    policy = policy_for(envs)
    collector = ReadyCollector(
        Assignment(envs, range(12), policy, [slab.allocate(envs.spec, policy, ROWS)], SEED, int), 12
    )
    collector.collect(home(range(12), 1, 0))
    assert envs.waits > ROWS


@pytest.mark.parametrize("row", [0, 35])
@pytest.mark.parametrize("group", [1, 3])
def test_every_draw_is_that_of_its_slot_and_row(group: int, row: int) -> None:
    """Slabs number on, row T of one being row 0 of the next, though the lanes are never at the same row."""
    envs = Shuffled(make_envs(Wide, 12, 6, EnvOptions()), 1)
    envs.reset(SEED)
    policy = Telling(envs.spec)
    trajectory = slab.allocate(envs.spec, policy, ROWS)
    given = [Assignment(envs, own, policy, [trajectory], SEED, int, row=row) for own in ([3, 5, 4], [0, 1, 2])]
    parts = [ReadyCollector(each, group) for each in given]
    for number in range(SLABS):
        for part in parts:
            part.collect(home(part.lanes, 2, 0))
        assert torch.equal(trajectory.extras["dice"], drawn(SEED, range(12), row + number * ROWS, ROWS))


def test_an_unroll_goes_where_it_is_told() -> None:
    """Lanes of one group in two slabs, at columns that are not their own (`async`)."""
    envs, other = counter(6, order=1), counter(6, order=2)
    policy = policy_for(envs, "gru")
    moved = [slab.allocate(envs.spec, policy, ROWS) for _ in range(2)]
    still = [slab.allocate(envs.spec, policy, ROWS)]
    places = [Place(0, 10), Place(1, 0), Place(1, 4), Place(0, 2), Place(0, 0), Place(1, 8)]
    moving = ReadyCollector(Assignment(envs, range(6), policy, moved, SEED, int), 3)
    staying = ReadyCollector(Assignment(other, range(6), policy, still, SEED, int), 3)
    for _ in range(2):
        moving.collect(places)
        staying.collect(home(range(6), 2, 0))
        for lane, place in enumerate(places):
            there = fields(slab.columns(moved[place.slab], slice(place.column, place.column + 2)))
            here = fields(slab.columns(still[0], slice(2 * lane, 2 * lane + 2)))
            assert all(torch.equal(a, b) for a, b in zip(there, here, strict=True))


def test_versions_are_kept_by_row_where_weights_are_refreshed_by_row() -> None:
    """A forward's version is that of its moment; a lane never goes back to an older one."""
    envs = counter(6)
    policy = policy_for(envs)
    trajectory = slab.allocate(envs.spec, policy, ROWS)
    versions = itertools.count()
    given = Assignment(envs, range(6), policy, [trajectory], SEED, lambda: next(versions), every_row=True)
    collector = ReadyCollector(given, 6)
    collector.collect(home(range(6), 2, 0))
    assert (trajectory.version[0] == 0).all()
    assert (trajectory.version.diff(dim=0) > 0).all()
    assert int(trajectory.version.max()) > ROWS - 1
    assert next(versions) == int(trajectory.version.max()) + 1


def test_a_stopped_collector_collects_no_more() -> None:
    envs = counter(6)
    policy = policy_for(envs)
    collector = ReadyCollector(
        Assignment(envs, range(6), policy, [slab.allocate(envs.spec, policy, ROWS)], SEED, int), 3
    )
    collector.stop()
    with pytest.raises(Stopped):
        collector.collect(home(range(6), 2, 0))


def test_forwards_read_aligned_memory() -> None:
    """The bits of a forward of two rows depend on it, whichever collector has the group and whatever came before."""
    envs = counter(12)
    policy = policy_for(envs, "lstm")
    collector = ReadyCollector(
        Assignment(envs, range(12), policy, [slab.allocate(envs.spec, policy, ROWS)], SEED, int), 2
    )
    for inputs in (collector._shown, collector._drawn, collector._states):  # pyright: ignore[reportPrivateUsage]
        assert len(inputs) == 6
        assert all(leaf.data_ptr() % 64 == 0 for group in inputs for leaf in tree.leaves(group))


class Mixing(nn.Module):
    """An actor-critic whose rows see the mean over the batch, as batch normalisation does."""

    def __init__(self, inner: ActorCritic) -> None:
        super().__init__()
        self.inner, self.dice_width, self.recurrent = inner, inner.dice_width, False

    def initial_state(self, batch: int) -> Any:
        return self.inner.initial_state(batch)

    def act(self, obs: Any, state: Any, dice: Tensor, greedy: bool = False, slot: Tensor | None = None) -> Act:
        obs = obs.float()
        return self.inner.act(obs - obs.mean(dim=0), state, dice, greedy)

    def unroll(self, obs: Any, state0: Any, first: Tensor | None) -> Any:
        return self.inner.unroll(obs, state0, first)

    def observe(self, obs: Any, valid: Tensor) -> None:
        self.inner.observe(obs, valid)


def test_a_policy_that_mixes_rows_is_found_out_and_acts_lane_by_lane() -> None:
    envs = counter(4)
    policy = Mixing(policy_for(envs))
    with pytest.warns(UserWarning, match="group=2: what Mixing answers for a row depends on the other rows"):
        assert group_that_holds(policy, envs.spec, 2, CPU) == 1
    assert group_that_holds(policy, envs.spec, 1, CPU) == 1


def test_where_rows_are_independent_lanes_share_forwards_without_a_word() -> None:
    envs = counter(4)
    policy = policy_for(envs)
    assert group_that_holds(policy, envs.spec, 4, CPU) == 4
    given = Assignment(envs, range(4), policy, [slab.allocate(envs.spec, policy, ROWS)], SEED, int)
    assert isinstance(make_collector(given, 4), ReadyCollector)
    assert isinstance(make_collector(given, 1), Collector)
