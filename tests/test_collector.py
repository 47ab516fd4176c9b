from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import gymnasium
import pytest
import torch

from slipstream import dice, slab
from slipstream.collector import Assignment, Collected, Collector, Stopped, home
from slipstream.envs import EnvOptions, make_envs
from slipstream.nets.actor_critic import ActorCritic, make_actor_critic
from slipstream.nets.small import SmallActor, acting
from slipstream.nets.trunk import Network
from slipstream.run.presets import configure
from slipstream.run.training import Training
from slipstream.types import Envs, Episode, Place, Trajectory
from tests.draws import Telling, Wide, drawn

COLUMNS, ROWS, SLABS = 12, 7, 3
Core = Literal["none", "lstm", "gru"]
SCRIPT = [(3, "t"), (5, "c"), (2, "t")]


def counter(lanes: int) -> Envs:
    """Slots that count; every slot runs the same script of episode lengths and ends."""
    envs = make_envs("toy:counter", COLUMNS, lanes, EnvOptions())
    envs.reset(5)
    return envs


def collector_of(
    envs: Envs, lanes: Sequence[int], policy: ActorCritic, slabs: Sequence[Trajectory], version: Callable[[], int] = int
) -> Collector:
    return Collector(Assignment(envs, lanes, policy, slabs, 5, version))


def fill(collector: Collector, lanes: int, index: int = 0) -> Collected:
    """Fills the collector's own columns of a slab; `lanes` is the number of all lanes."""
    return collector.collect(home(collector.lanes, COLUMNS // lanes, index))


def policy_for(envs: Envs, core: Core = "none") -> ActorCritic:
    return make_actor_critic(envs.spec, Network(hidden=(5,), core=core, core_size=4), None, 2)


def life() -> list[tuple[int, int, float, bool, bool, bool]]:
    """(episode, t, reward, terminated, truncated, valid) of every row of a slot, by hand."""
    rows: list[tuple[int, int, float, bool, bool, bool]] = []
    for episode in range(10):
        length, how = SCRIPT[episode % len(SCRIPT)]
        for t in range(length):
            last = t == length - 1
            rows.append((episode, t, 100.0 * episode + t + 1, last and how == "t", last and how == "c", True))
        rows.append((episode, length, 0.0, False, False, False))
    return rows


def test_the_script_of_the_counter_is_the_one_used_here() -> None:
    assert [f"{length}{how}" for length, how in SCRIPT] == ["3t", "5c", "2t"]


@pytest.mark.parametrize("lanes", [1, 2, 3, 4])
@pytest.mark.parametrize("collectors", [1, 2])
def test_every_cell_is_known_in_advance(lanes: int, collectors: int) -> None:
    envs = counter(lanes)
    policy = policy_for(envs)
    trajectory = slab.allocate(envs.spec, policy, ROWS)
    shares = [range(first, lanes, collectors) for first in range(min(collectors, lanes))]
    version = 0
    parts = [collector_of(envs, share, policy, [trajectory], lambda: version) for share in shares]
    expected = life()
    for number in range(SLABS):
        version = number
        collected = [fill(part, lanes) for part in parts]
        rows = expected[number * ROWS : (number + 1) * ROWS + 1]
        for t, (episode, step, reward, terminated, truncated, valid) in enumerate(rows):
            # Row T of a slab is row 0 of the next: nothing is lost or repeated between them.
            assert (trajectory.obs[t, :, 1] == episode).all()
            assert (trajectory.obs[t, :, 2] == step).all()
            if t < ROWS:
                assert (trajectory.reward[t] == reward).all()
                assert (trajectory.terminated[t] == terminated).all()
                assert (trajectory.truncated[t] == truncated).all()
                assert (trajectory.valid[t] == valid).all()
        assert (trajectory.version == number).all()
        assert sum(part.steps for part in collected) == COLUMNS * sum(row[5] for row in rows[:ROWS])


def test_every_slot_has_its_own_seeds() -> None:
    envs = counter(3)
    policy = policy_for(envs)
    trajectory = slab.allocate(envs.spec, policy, ROWS)
    fill(collector_of(envs, range(3), policy, [trajectory]), 3)
    expected = [dice.env_seed(5, "env", slot, 0) for slot in range(COLUMNS)]
    assert trajectory.obs[0, :, 0].tolist() == expected
    assert len(set(expected)) == COLUMNS


@pytest.mark.parametrize("lanes", [1, 4])
def test_episodes_carry_over_slabs(lanes: int) -> None:
    envs = counter(lanes)
    policy = policy_for(envs)
    trajectory = slab.allocate(envs.spec, policy, ROWS)
    collector = collector_of(envs, range(lanes), policy, [trajectory])
    episodes = [episode for _ in range(SLABS) for episode in fill(collector, lanes).episodes]
    of_slot = [episode for episode in episodes if episode.slot == 5]
    assert of_slot[:3] == [
        Episode(slot=5, row=3, length=3, reward=6, shaped=None, truncated=False),
        Episode(slot=5, row=9, length=5, reward=515, shaped=None, truncated=True),
        Episode(slot=5, row=12, length=2, reward=403, shaped=None, truncated=False),
    ]


def filled(core: Core, lanes: int, order: list[int]) -> list[Trajectory]:
    """Copies of two slabs collected with the lanes in the given order."""
    envs = counter(lanes)
    policy = policy_for(envs, core)
    slabs = [slab.allocate(envs.spec, policy, ROWS) for _ in range(2)]
    collectors = [collector_of(envs, [lane], policy, slabs) for lane in order]
    for index in range(2):
        for collector in collectors:
            fill(collector, lanes, index)
    return slabs


@pytest.mark.parametrize("core", ["none", "lstm", "gru"])
def test_lanes_in_any_order_give_the_same_bits(core: Core) -> None:
    for one, other in zip(filled(core, 4, [0, 1, 2, 3]), filled(core, 4, [2, 0, 3, 1]), strict=True):
        assert torch.equal(one.action, other.action)
        assert torch.equal(one.log_prob, other.log_prob)
        assert torch.equal(one.extras["value"], other.extras["value"])


@pytest.mark.parametrize("core", ["lstm", "gru"])
def test_unrolling_the_stored_rows_repeats_what_acting_computed(core: Core) -> None:
    """Values of all rows, row T and the last observations of episodes included, with the state carried over slabs."""
    envs = counter(2)
    policy = policy_for(envs, core)
    slabs = [slab.allocate(envs.spec, policy, ROWS) for _ in range(2)]
    collector = collector_of(envs, range(2), policy, slabs)
    for index, trajectory in enumerate(slabs):
        fill(collector, 2, index)
        first = torch.zeros(ROWS + 1, COLUMNS, dtype=torch.bool)
        first[1:] = ~trajectory.valid
        with torch.no_grad():
            out = policy.unroll(trajectory.obs, trajectory.state0, first)
        torch.testing.assert_close(out.value, trajectory.extras["value"], rtol=1e-5, atol=1e-6)
        log_prob = out.distribution.log_prob(torch.cat([trajectory.action, trajectory.action[-1:]]))[:-1]
        torch.testing.assert_close(log_prob, trajectory.log_prob, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("row", [0, 35])
def test_every_draw_is_that_of_its_slot_and_row(row: int) -> None:
    """Slabs number on, row T of one being row 0 of the next; nobody draws what another slot or another row drew."""
    envs = make_envs(Wide, COLUMNS, 3, EnvOptions())
    envs.reset(5)
    policy = Telling(envs.spec)
    trajectory = slab.allocate(envs.spec, policy, ROWS)
    parts = [Collector(Assignment(envs, own, policy, [trajectory], 5, int, row=row)) for own in ([2, 0], [1])]
    for number in range(SLABS):
        for part in parts:
            fill(part, 3)
        assert torch.equal(trajectory.extras["dice"], drawn(5, range(COLUMNS), row + number * ROWS, ROWS))
    everything = drawn(5, range(COLUMNS), row, SLABS * ROWS)
    assert everything.flatten(0, 1).unique(dim=0).shape[0] == (SLABS * ROWS + 1) * COLUMNS


def test_an_unroll_goes_where_it_is_told() -> None:
    """Lanes keep their life while their columns change places, and the slab says whose they are."""
    envs = counter(3)
    policy = policy_for(envs)
    slabs = [slab.allocate(envs.spec, policy, ROWS) for _ in range(2)]
    straight = [slab.allocate(envs.spec, policy, ROWS) for _ in range(2)]
    moving, other = collector_of(envs, [2, 0], policy, slabs), counter(3)
    still = collector_of(other, [2, 0], policy, straight)
    for places in ([Place(0, 0), Place(1, 8)], [Place(1, 4), Place(0, 4)]):
        moving.collect(places)
        index = 0 if places[0].slab == 0 else 1
        fill(still, 3, index)
        for lane, place in zip([2, 0], places, strict=True):
            columns, own = slice(place.column, place.column + 4), slice(4 * lane, 4 * lane + 4)
            assert torch.equal(slabs[place.slab].obs[:, columns], straight[index].obs[:, own])
            assert torch.equal(slabs[place.slab].action[:, columns], straight[index].action[:, own])
            assert slabs[place.slab].slot[columns].tolist() == list(range(own.start, own.stop))


def test_versions_are_kept_by_row_where_weights_are_refreshed_by_row() -> None:
    envs = counter(2)
    policy = policy_for(envs)
    trajectory = slab.allocate(envs.spec, policy, ROWS)
    versions = iter(range(100))
    collector = Collector(Assignment(envs, range(2), policy, [trajectory], 5, lambda: next(versions), every_row=True))
    fill(collector, 2)
    assert trajectory.version.tolist() == [[row] * COLUMNS for row in range(ROWS)]


def test_weights_that_are_refreshed_by_row_act_at_once() -> None:
    """Those of a perceptron, in whose place NumPy acts, too: every row's values are those of its weights."""
    envs = make_envs("CartPole-v1", COLUMNS, 1, EnvOptions())
    envs.reset(5)
    policy = make_actor_critic(envs.spec, Network(hidden=(8,)))
    assert isinstance(acting(policy, COLUMNS, torch.device("cpu")), SmallActor)
    trajectory = slab.allocate(envs.spec, policy, ROWS)
    weights: list[dict[str, torch.Tensor]] = []

    def refresh() -> int:
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.25)
        weights.append({name: value.clone() for name, value in policy.state_dict().items()})
        return len(weights)

    fill(Collector(Assignment(envs, [0], policy, [trajectory], 5, refresh, every_row=True)), 1)
    assert len(weights) == ROWS
    for t, each in enumerate(weights):
        policy.load_state_dict(each)
        value = policy.unroll(trajectory.obs[t]).value
        torch.testing.assert_close(trajectory.extras["value"][t], value.detach(), rtol=1e-5, atol=1e-6)
    assert trajectory.extras["value"][:ROWS].abs().min() > 1e-4


def test_a_stopped_collector_collects_no_more() -> None:
    envs = counter(2)
    policy = policy_for(envs)
    collector = collector_of(envs, range(2), policy, [slab.allocate(envs.spec, policy, ROWS)])
    collector.stop()
    with pytest.raises(Stopped):
        fill(collector, 2)


def test_environments_that_differentiate_in_their_steps_may() -> None:
    class Learned(gymnasium.Wrapper[Any, Any, Any, Any]):
        def step(self, action: Any) -> Any:
            weight = torch.ones(1, requires_grad=True)
            (2.0 * weight).sum().backward()
            assert weight.grad is not None
            return self.env.step(action)

    small = {"num_envs": 2, "lanes": 1, "unroll": 4, "algo.batch_size": 8, "placement.collectors": "inline"}
    config = configure("ppo", "callable:learned", {**small, "total_steps": 8})
    training = Training(config, lambda: Learned(gymnasium.make("CartPole-v1")))
    try:
        assert [report.steps for report in training] == [8]
    finally:
        training.close()
