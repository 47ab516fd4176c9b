"""A row of a forward of fixed shape has the same bits whatever the other rows hold, on this machine's kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from slipstream.nets.actor_critic import make_actor_critic
from slipstream.nets.independence import rows_are_independent
from slipstream.nets.trunk import Network
from slipstream.types import EnvSpec

CPU = torch.device("cpu")
VECTOR = spaces.Box(-np.inf, np.inf, (7,), np.float32)
IMAGE = spaces.Box(0, 255, (4, 84, 84), np.uint8)
MIXED = spaces.Dict(
    {
        "image": spaces.Box(0, 255, (1, 36, 36), np.uint8),
        "kind": spaces.Discrete(3, start=-1),
        "cards": spaces.MultiDiscrete([4, 2]),
        "lamps": spaces.MultiBinary(3),
        "far": spaces.Box(-3e38, 3e38, (2,), np.float64),
        "action_mask": spaces.MultiBinary(5),
    }
)
NETWORKS = {
    "perceptron": (VECTOR, Network()),
    "separate perceptrons": (VECTOR, Network(share_torso=False, normalize_obs=True)),
    "nips_cnn": (IMAGE, Network(torso="nips_cnn")),
    "nature_cnn": (IMAGE, Network(torso="nature_cnn")),
    "impala_resnet": (IMAGE, Network(torso="impala_resnet")),
    "lstm": (VECTOR, Network(core="lstm")),
    "gru": (VECTOR, Network(core="gru", share_torso=False)),
    "nature_cnn, lstm": (IMAGE, Network(torso="nature_cnn", core="lstm")),
    "everything that can be seen": (MIXED, Network()),
}


def spec_of(space: spaces.Space[Any], action: spaces.Space[Any] | None = None) -> EnvSpec:
    return EnvSpec("test", space, action or spaces.Discrete(5), 16)


@pytest.mark.parametrize("rows", [2, 5, 16])
@pytest.mark.parametrize("network", NETWORKS)
def test_our_networks_keep_rows_apart(network: str, rows: int) -> None:
    space, choices = NETWORKS[network]
    spec = spec_of(space)
    assert rows_are_independent(make_actor_critic(spec, choices, None, 2), spec, rows, CPU)


def test_continuous_actions_keep_rows_apart() -> None:
    spec = spec_of(VECTOR, spaces.Box(-1.0, 1.0, (3,), np.float32))
    assert rows_are_independent(make_actor_critic(spec, Network(), None, 2), spec, 11, CPU)


class Leak(nn.Module):
    """A torso whose row `to` sees a little of row `source`."""

    def __init__(self, to: int, source: int) -> None:
        super().__init__()
        self._to, self._source = to, source
        self.linear = nn.Linear(7, 3)

    def forward(self, obs: Tensor) -> Tensor:
        features = self.linear(obs)
        if len(features) > max(self._to, self._source):
            features[self._to] += 1e-3 * features[self._source]
        return features


@pytest.mark.parametrize(("to", "source"), [(0, 1), (1, 0), (4, 8), (7, 8), (10, 0), (0, 10), (9, 10)])
def test_one_row_that_reaches_another_is_found(to: int, source: int) -> None:
    spec = spec_of(VECTOR)
    torso = Leak(to, source)
    with torch.no_grad():
        assert not rows_are_independent(make_actor_critic(spec, Network(), torso, 2), spec, 11, CPU)


def test_statistics_over_the_batch_are_found() -> None:
    spec = spec_of(VECTOR)
    torso = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5, track_running_stats=False))
    assert not rows_are_independent(make_actor_critic(spec, Network(), torso, 2), spec, 11, CPU)
    torso = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5).eval())
    assert rows_are_independent(make_actor_critic(spec, Network(), torso, 2), spec, 11, CPU)
