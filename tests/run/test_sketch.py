from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from slipstream.run import agent, video
from slipstream.run.settings import ConfigError
from slipstream.run.sketch import beside
from tests.run import runs

SMALL = {
    "env": "ALE/Pong-v5",
    "unroll": 8,
    "algo__batch_size": 24,
    "total_steps": 24,
    "net__torso": "nips_cnn",
    "net__hidden": (64, 64),
    "net__latent": 8,
    "env_options__atari__screen_size": 36,
}


def test_panels_have_the_height_of_the_frame() -> None:
    frame = np.full((20, 30, 3), 9, np.uint8)
    picture = np.full((5, 10, 3), 200, np.uint8)
    shown = beside(frame, picture, picture // 2)
    assert shown.shape == (20, 30 + 40 + 40, 3)
    assert (shown[:, :30] == 9).all()
    assert (shown[:, 30:70] == 200).all()
    assert (shown[:, 70:] == 100).all()


def test_a_run_shows_what_its_auto_encoder_draws(tmp_path: Path) -> None:
    """The middle panel is the newest frame that the policy sees, the right one what its decoder makes of it."""
    trained = runs.train(tmp_path, autoencoder__weight=0.1, **SMALL)
    loaded = agent.load(trained.run.path)
    assert loaded.decoder is not None
    assert trained.decoder is not None
    for one, other in zip(loaded.decoder.parameters(), trained.decoder.parameters(), strict=True):
        assert torch.equal(one, other)
    assert loaded.spec.frame_stack == 4
    made = video.record(loaded, tmp_path / "a.gif", max_steps=3, reconstruct=True)
    plain = video.record(loaded, tmp_path / "b.gif", max_steps=3)
    assert made.steps == plain.steps == 3
    with Image.open(made.path) as wide, Image.open(plain.path) as narrow:
        assert wide.height == narrow.height
        assert wide.width == narrow.width + 2 * narrow.height
        left = np.asarray(wide.convert("RGB"))[:, : narrow.width].astype(int)
        assert np.abs(left - np.asarray(narrow.convert("RGB")).astype(int)).mean() < 8, "but for the palette"


def test_what_is_drawn_is_the_decoders_picture(tmp_path: Path) -> None:
    trained = runs.train(tmp_path, autoencoder__weight=0.1, **SMALL)
    loaded = agent.load(trained.run.path)
    sketch = video._sketcher(loaded)
    obs = np.random.default_rng(0).integers(0, 256, (1, 4, 36, 36), np.uint8)
    seen, drawn = sketch(obs)
    np.testing.assert_array_equal(seen, np.repeat(obs[0, -1][..., None], 3, axis=-1))
    with torch.no_grad():
        latent = loaded.policy.unroll(torch.from_numpy(obs)).encoded.latent
        expected = (loaded.decoder(latent)[""][0, 0].clamp(0, 1) * 255).byte().numpy()
    np.testing.assert_array_equal(drawn, np.repeat(expected[..., None], 3, axis=-1))


def test_without_an_auto_encoder_it_says_how_to_get_one(tmp_path: Path) -> None:
    trained = runs.train(tmp_path, **SMALL)
    loaded = agent.load(trained.run.path)
    with pytest.raises(ConfigError, match=r"has no auto-encoder to show: train with --autoencoder.weight 0.1"):
        video.record(loaded, tmp_path / "a.gif", max_steps=3, reconstruct=True)
    assert not (tmp_path / "a.gif").exists()
