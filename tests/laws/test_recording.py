"""Recorded forwards and gradients give the same bits as those that are asked for anew: no Python matters in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slipstream import collector, ready
from slipstream.ops import distributions
from slipstream.run import learning, training
from slipstream.run.presets import configure
from tests import recorders

UPDATES = 6
SIZE = {"num_envs": 4, "lanes": 2, "unroll": 8, "total_steps": 10_000, "seed": 3, "placement.collectors": "inline"}
_REPLAY = {"algo.replay.learning_starts": 16, "algo.replay.capacity": 1_000, "algo.batch_size": 8}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ppo": ("ppo", "CartPole-v1", {"schedule": "concurrent", "algo.batch_size": 16}),
    "ppo, grouped": ("ppo", "CartPole-v1", {"group": 2, "algo.batch_size": 16}),
    "ppo, recurrent": ("ppo", "toy:recall", {"net.core": "lstm", "algo.batch_size": 16}),
    "ppo, grouped and recurrent": ("ppo", "toy:recall", {"net.core": "gru", "group": 2, "algo.batch_size": 16}),
    "ppo, normalised": ("ppo", "Pendulum-v1", {"net.normalize_obs": True, "algo.batch_size": 16}),
    "a2c, delayed": ("a2c", "CartPole-v1", {"schedule": "concurrent"}),
    "impala": ("impala", "CartPole-v1", {"schedule": "concurrent"}),
    "appo, replay and auto-encoder": (
        "appo",
        "ALE/Pong-v5",
        {
            "schedule": "concurrent",
            "env_options.atari.screen_size": 36,
            "algo.batch_size": 16,
            "algo.replay.proportion": 1.0,
            "algo.replay.capacity": 200,
            "autoencoder.weight": 0.1,
            "net.latent": 8,
            "total_steps": 20_000,
        },
    ),
    "dqn": ("dqn", "CartPole-v1", {**_REPLAY, "schedule": "concurrent"}),
    "c51": ("c51", "CartPole-v1", _REPLAY),
    "qrdqn": ("qrdqn", "CartPole-v1", _REPLAY),
    "rainbow": ("rainbow", "CartPole-v1", _REPLAY),
    "r2d2": ("r2d2", "toy:recall", {**_REPLAY, "algo.batch_size": 2}),
    "sac": ("sac", "Pendulum-v1", _REPLAY),
    "td3": ("td3", "Pendulum-v1", _REPLAY),
    "ddpg": ("ddpg", "Pendulum-v1", _REPLAY),
}


def trained(case: str, cuda_graphs: bool) -> list[dict[str, torch.Tensor]]:
    """All tensors of the learner after every update."""
    algo, env, own = CASES[case]
    run = training.Training(configure(algo, env, {**SIZE, **own, "placement.cuda_graphs": cuda_graphs}))
    found: list[dict[str, torch.Tensor]] = []
    try:
        for _ in run:
            found.append({name: value.clone() for name, value in run.learner.state()[0].items()})
            if len(found) == UPDATES:
                return found
    finally:
        run.close()
    raise AssertionError("the run ended early")


@pytest.mark.parametrize("case", CASES)
def test_a_recording_changes_no_bit(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # On the CPU small perceptrons act by NumPy and actions are drawn by it, which a recording can't follow.
    monkeypatch.setattr(
        distributions.Categorical, "sample", lambda self, u: distributions.drawn_there(self.log_probs, u)
    )
    for module in (collector, ready):
        monkeypatch.setattr(module, "acting", lambda policy, slots, device: policy)
    plain = trained(case, False)
    counts = {module: recorders.Counting() for module in (learning, training)}
    for module, counting in counts.items():
        monkeypatch.setattr(module, "recorder", counting)
    recorded = trained(case, True)
    _, _, own = CASES[case]
    lanes, recurrent = SIZE["lanes"] // own.get("group", 1), "net.core" in own or case == "r2d2"
    assert counts[training].recordings == lanes
    assert counts[training].replays >= lanes * SIZE["unroll"] * UPDATES // (2 if "algo.replay.capacity" in own else 1)
    assert (counts[learning].recordings == 0) == recurrent
    assert (counts[learning].replays > counts[learning].recordings) != recurrent
    assert not all(torch.equal(plain[0][name], value) for name, value in plain[-1].items())
    for update, (one, other) in enumerate(zip(plain, recorded, strict=True), start=1):
        assert [f"update {update}: {name}" for name, value in one.items() if not torch.equal(value, other[name])] == []
