"""The gradient through the forwards of acting: the same bits wherever they are, and the gradient that it is without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slipstream.run.config import ConfigError
from slipstream.run.presets import configure
from slipstream.run.training import Training

UPDATES = 4
SIZE = {"num_envs": 8, "lanes": 4, "unroll": 5, "total_steps": 10_000, "seed": 3}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sync": ("CartPole-v1", {}),
    "recurrent": ("toy:recall", {"schedule": "concurrent", "net.core": "lstm", "unroll": 9}),
    "continuous": ("Pendulum-v1", {"reward": "scale", "net.normalize_obs": True, "schedule": "concurrent"}),
    "images": (
        "ALE/Pong-v5",
        {
            "schedule": "concurrent",
            "num_envs": 4,
            "lanes": 2,
            "env_options.atari.screen_size": 36,
            "autoencoder.weight": 0.1,
            "net.latent": 8,
        },
    ),
}


def trained(case: str, **settings: Any) -> list[dict[str, torch.Tensor]]:
    """All tensors of the learner after every update."""
    env, own = CASES[case]
    training = Training(configure("a2c", env, {**SIZE, **own, "algo.reuse_forward": True, **settings}))
    found: list[dict[str, torch.Tensor]] = []
    try:
        for _ in training:
            found.append({name: value.clone() for name, value in training.state()[0].items()})
            if len(found) == UPDATES:
                return found
    finally:
        training.close()
    raise AssertionError("the run ended early")


def same(one: list[dict[str, torch.Tensor]], other: list[dict[str, torch.Tensor]]) -> bool:
    return all(torch.equal(value, b[name]) for a, b in zip(one, other, strict=True) for name, value in a.items())


@pytest.mark.parametrize("case", CASES)
def test_threads_change_no_bit(case: str) -> None:
    assert same(trained(case, **{"placement.workers": 2}), trained(case, **{"placement.collectors": "inline"}))


@pytest.mark.parametrize("case", ["recurrent", "images"])
def test_kept_and_repeated_forwards_give_the_same_bits(case: str) -> None:
    repeated = trained(case, **{"placement.collectors": "process", "placement.workers": 1})
    assert same(repeated, trained(case, **{"placement.collectors": "inline"}))


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_the_one_without(case: str) -> None:
    """After every update: with lag 1, from the second on, both take it at the parameters that acted.

    The learning rate is one at which the parameters of two updates are told apart.
    """
    reused, plain = (trained(case, **{"algo.reuse_forward": reuse, "algo.lr": 0.01}) for reuse in (True, False))
    for update, (one, other) in enumerate(zip(reused, plain, strict=True), start=1):
        assert one.keys() == other.keys()
        for name, value in other.items():
            if not name.startswith("standing."):  # a checksum of what is shown is another one after any rounding
                torch.testing.assert_close(one[name], value, rtol=1e-4, atol=1e-6, msg=f"update {update}: {name}")


def test_what_can_not_be_reused_is_refused() -> None:
    with pytest.raises(ConfigError, match="--group 1"):
        configure("a2c", "CartPole-v1", {**SIZE, "algo.reuse_forward": True, "group": 2})
    with pytest.raises(ConfigError, match="--shards 4"):
        configure("a2c", "CartPole-v1", {**SIZE, "algo.reuse_forward": True, "shards": 2})
