from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from slipstream import slab, tree
from slipstream.collector import Assignment, Stands, home
from slipstream.envs import EnvOptions, make_envs
from slipstream.envs.recorded import recorded
from slipstream.local import Locals
from slipstream.nets.actor_critic import make_actor_critic
from slipstream.nets.trunk import Network
from slipstream.ready import make_collector

LANES, SIZE, ROWS, SEED = 4, 2, 9, 5
TWO = [range(1), range(1, LANES)]


class Stage:
    """CartPole in lanes, who collects from it, and the slab that they fill."""

    def __init__(self, shares: Sequence[range], core: str) -> None:
        inner = make_envs("CartPole-v1", LANES * SIZE, LANES, EnvOptions())
        envs = recorded(inner, restarts=0)
        assert envs is not None
        network = Network(hidden=(5,), core="gru" if core == "gru" else "none", core_size=4)
        policy = make_actor_critic(envs.spec, network, None, 2)
        self.slab = slab.allocate(envs.spec, policy, ROWS)

        def make(lanes: range, row: int) -> Stands:
            return make_collector(Assignment(envs, lanes, policy, [self.slab], SEED, int, row=row), 1)

        self.locals = Locals(envs, envs, shares, make)

    def unroll(self) -> list[Tensor]:
        for collector in self.locals.collectors:
            collector.collect(home(collector.lanes, SIZE, 0))
        return [leaf.clone() for leaf in tree.leaves(vars(self.slab))]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("core", ["none", "gru"])
def test_slots_go_on_from_where_they_stood_whoever_collects(core: str) -> None:
    first = Stage(TWO, core)
    first.locals.begin(SEED, 0)
    for _ in range(3):
        first.unroll()
    standing = first.locals.state()
    rows = first.unroll()
    for shares in (TWO, [range(LANES)], [range(lane, lane + 1) for lane in range(LANES)]):
        second = Stage(shares, core)
        assert second.locals.restore(SEED, standing) == []
        assert same(second.unroll(), rows)


def test_slots_that_show_something_else_are_told() -> None:
    stage = Stage(TWO, "none")
    stage.locals.begin(SEED, 0)
    stage.unroll()
    standing = stage.locals.state()
    standing.seen[[2, 7]] += 1
    assert Stage(TWO, "none").locals.restore(SEED, standing) == [2, 7]


def test_a_new_start_has_other_episodes_and_dice_and_the_same_list_of_collectors() -> None:
    stage = Stage(TWO, "none")
    stage.locals.begin(SEED, 0)
    collectors, rows = stage.locals.collectors, stage.unroll()
    stage.locals.begin(SEED, 0)
    assert same(stage.unroll(), rows)
    for seed, row in ((SEED + 1, 0), (SEED, ROWS)):
        stage.locals.begin(seed, row)
        assert not same(stage.unroll(), rows)
    assert stage.locals.collectors is collectors
    assert stage.locals.restarted == 0
