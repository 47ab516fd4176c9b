from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream.run.config import ConfigError
from slipstream.run.presets import configure
from slipstream.run.training import Training

SMALL: dict[str, Any] = {
    "num_envs": 4,
    "lanes": 2,
    "unroll": 8,
    "total_steps": 10_000,
    "net.torso": "nips_cnn",
    "net.latent": 16,
    "env_options.atari.screen_size": 36,
    "placement.workers": 1,
}
BATCH = {"ppo": {"algo.batch_size": 16, "algo.epochs": 1}, "appo": {"algo.batch_size": 16, "algo.epochs": 1}}


def state_after(updates: int, algo: str, **changes: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Tensors before and after some updates on Pong, and the reconstruction loss of each."""
    named = {key.replace("__", "."): value for key, value in changes.items()}
    training = Training(configure(algo, "ALE/Pong-v5", {**SMALL, "schedule": "sync", **BATCH.get(algo, {}), **named}))
    try:
        before = {name: value.clone() for name, value in training.state()[0].items()}
        losses: list[float] = []
        for report in training:
            losses.append(float(report.metrics.get("train/reconstruction_loss", float("nan"))))
            if report.update == updates:
                break
        return before, {name: value.clone() for name, value in training.state()[0].items()}, losses
    finally:
        training.close()


def moved(before: dict[str, Tensor], after: dict[str, Tensor], prefix: str) -> set[str]:
    return {name for name in before if name.startswith(prefix) and not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("algo", ["ppo", "a2c", "impala", "appo"])
def test_reconstruction_trains_encoder_and_decoder(algo: str) -> None:
    """What the original's did not: with the algorithm's own loss kept from the torso, the torso still moves."""
    before, after, losses = state_after(
        2, algo, autoencoder__weight=1.0, net__latent_from_rl=False, algo__lr=1e-3, algo__optimizer="adam"
    )
    assert len(moved(before, after, "decoder.")) == len([name for name in before if name.startswith("decoder.")]) > 4
    assert moved(before, after, "policy.trunk.torso")
    assert losses[0] > 0


def test_without_weight_there_is_no_decoder() -> None:
    before, after, _ = state_after(1, "ppo")
    assert not [name for name in before if name.startswith("decoder.")]
    assert moved(before, after, "policy.trunk")


def test_a_decoder_that_only_watches_changes_no_bit_of_the_policy() -> None:
    """Neither by its gradient nor by the norm that gradients are clipped at."""
    *_, alone, _ = state_after(2, "ppo")
    changes = {"autoencoder__shapes_encoder": False, "autoencoder__weight": 100.0}
    before, watched, _ = state_after(2, "ppo", **changes)
    assert moved(before, watched, "decoder.")
    assert not moved({name: value for name, value in alone.items() if name.startswith("policy.")}, watched, "policy.")


@pytest.mark.parametrize("algo", ["a2c", "impala"])
def test_the_weight_is_relative_to_a_loss_of_any_scale(algo: str) -> None:
    """Adam's steps don't depend on a factor of the whole loss; one of 64 changes no rounding."""
    found: list[dict[str, Tensor]] = []
    for scale in (1.0, 64.0):
        changes = {"algo__loss_scale": scale, "algo__eps": 1e-5 * scale, "algo__max_grad_norm": float("inf")}
        *_, after, _ = state_after(2, algo, autoencoder__weight=0.5, algo__optimizer="adam", **changes)
        found.append({name: value for name, value in after.items() if not name.startswith("optimizer.")})
    assert not moved(*found, "")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"autoencoder.weight": 1.0, "autoencoder.shapes_encoder": False},
        {"autoencoder.weight": 1.0, "net.share_torso": False},
    ],
)
def test_a_torso_that_nothing_trains_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^net\.latent_from_rl=False "):
        configure("ppo", "ALE/Pong-v5", {**SMALL, "net.latent_from_rl": False, **changes})


def test_pictures_are_learned() -> None:
    *_, losses = state_after(25, "ppo", autoencoder__weight=1.0, algo__lr=1e-3, algo__anneal_lr=False)
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("schedule", ["sync", "concurrent"])
def test_variational_draws_are_the_same_everywhere(schedule: str) -> None:
    found: set[str] = set()
    for workers, loaders in ((1, 0), (2, 2)):
        changes = {"autoencoder__weight": 0.5, "autoencoder__variational": True, "schedule": schedule}
        *_, after, _ = state_after(3, "ppo", placement__workers=workers, placement__loaders=loaders, **changes)
        digest = hashlib.sha256()
        for name, value in sorted(after.items()):
            digest.update(name.encode() + value.contiguous().numpy().tobytes())
        found.add(digest.hexdigest())
    assert len(found) == 1


def test_it_is_for_actor_critics() -> None:
    with pytest.raises(ConfigError, match=r"autoencoder\.weight is for actor-critics"):
        configure("dqn", "ALE/Pong-v5", {"autoencoder.weight": 0.1})


def test_collectors_do_not_have_the_decoder() -> None:
    training = Training(configure("ppo", "ALE/Pong-v5", {**SMALL, **BATCH["ppo"], "autoencoder.weight": 0.1}))
    try:
        assert not [name for name in training.learner.weights().tensors if "decoder" in name or "drawing" in name]
    finally:
        training.close()
