"""Weights in shared memory: whole snapshots or none, whatever the writer does meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
import torch

from slipstream import memory, process, weights
from slipstream.nets.actor_critic import ActorCritic, make_actor_critic
from slipstream.nets.trunk import Network
from slipstream.types import EnvSpec, Weights
from slipstream.weights import Ring, RingReplica

SPEC = EnvSpec("test", gymnasium.spaces.Box(-1.0, 1.0, (7,), np.float32), gymnasium.spaces.Discrete(3), 2)
SNAPSHOTS = 1000

WRITER = """
import sys
from slipstream import memory
from tests.test_weights import SNAPSHOTS, constant, policy, ring
written = ring(int(sys.argv[1]))
network = policy()
while written.newest() < SNAPSHOTS:
    written.publish(constant(network, written.newest() + 1))
"""


def policy() -> ActorCritic:
    return make_actor_critic(SPEC, Network(hidden=(257, 131), normalize_obs=True), None, 2)


def ring(fd: int) -> Ring:
    return Ring(memory.share(fd, Ring.layout(policy())))


def constant(network: ActorCritic, number: int) -> Weights:
    tensors = {name: torch.full_like(value, number) for name, value in network.state_dict().items()}
    return Weights(number, tensors)


def values(network: ActorCritic) -> set[float]:
    """The least and the greatest number of each tensor."""
    return {float(end) for tensor in network.state_dict().values() for end in tensor.aminmax()}


@pytest.fixture
def shared() -> Ring:
    fd = process.anonymous_file()
    try:
        return ring(fd)
    finally:
        os.close(fd)


def test_a_replica_has_the_newest_weights(shared: Ring) -> None:
    network = policy()
    replica = RingReplica(policy(), shared)
    for version in (3, 4, 9, 10, 11):
        shared.publish(Weights(version, constant(network, 10 * version).tensors))
        if version != 9:
            assert replica.refresh() == version
            assert values(replica.policy) == {10.0 * version}


def test_a_replica_keeps_what_it_has_until_there_is_more(shared: Ring) -> None:
    replica = RingReplica(policy(), shared)
    shared.publish(constant(replica.policy, 5))
    assert replica.refresh() == 5
    weights.copy_into(replica.policy, constant(replica.policy, 1).tensors)
    assert replica.refresh() == 5
    assert values(replica.policy) == {1.0}


def test_nothing_published_is_an_error(shared: Ring) -> None:
    with pytest.raises(LookupError, match="no weights have been published"):
        RingReplica(policy(), shared).refresh()


@pytest.mark.parametrize(("meanwhile", "expected"), [(1, 1), (2, 1), (3, 4), (7, 8)])
def test_what_is_overwritten_while_it_is_read_is_read_again(
    shared: Ring, monkeypatch: pytest.MonkeyPatch, meanwhile: int, expected: int
) -> None:
    """The writer publishes `meanwhile` snapshots between the first and the last tensor of the first reading."""
    copy, network, first = weights.copy_into, policy(), [True]

    def slow(target: ActorCritic, tensors: dict[str, torch.Tensor]) -> None:
        names = sorted(tensors)
        state = target.state_dict()
        state[names[0]].copy_(tensors[names[0]])
        while first:
            first.pop()
            for _ in range(meanwhile):
                shared.publish(constant(network, shared.newest() + 1))
        for name in names[1:]:
            state[name].copy_(tensors[name])

    replica = RingReplica(policy(), shared)
    shared.publish(constant(network, 1))
    monkeypatch.setattr(weights, "copy_into", slow)
    assert replica.refresh() == expected
    assert values(replica.policy) == {float(expected)}
    monkeypatch.setattr(weights, "copy_into", copy)
    assert replica.refresh() == 1 + meanwhile


def test_a_snapshot_is_never_torn_between_processes() -> None:
    """A writer in another process publishes as fast as it can; every snapshot that is read holds one number only."""
    fd = process.anonymous_file()
    try:
        replica = RingReplica(policy(), ring(fd))
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(fd)], pass_fds=[fd])
    finally:
        os.close(fd)
    version = reads = 0
    while version < SNAPSHOTS:
        try:
            found = replica.refresh()
        except LookupError:
            assert writer.poll() is None
            continue
        assert found >= version
        if found > version:
            assert values(replica.policy) == {float(found)}
            version, reads = found, reads + 1
        assert writer.poll() in (None, 0)
    assert writer.wait(60) == 0
    assert reads > 1
