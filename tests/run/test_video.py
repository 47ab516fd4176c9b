from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from PIL import Image

from slipstream.envs import EnvError
from slipstream.run import presets, video
from slipstream.run.agent import Agent
from slipstream.run.files import CheckpointError
from slipstream.types import EnvSpec


class Painted(gymnasium.Env[Any, Any]):
    """Four steps; the picture's red is the step's number times 50, the action is ignored."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, render_mode: str | None = "rgb_array") -> None:
        self.observation_space, self.action_space = spaces.Box(0, 9, (1,)), spaces.Discrete(2)
        self.render_mode, self._t = render_mode, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self._t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        self._t += 1
        return np.full(1, self._t, np.float32), 2.5, self._t == 4, False, {}

    def render(self) -> Any:
        frame = np.zeros((20, 30, 3), np.uint8)
        frame[..., 0] = 50 * self._t
        return frame


def _agent(env: Any, spec: EnvSpec) -> Agent:
    name = env if isinstance(env, str) else "callable:it"
    config = presets.configure("ppo", name, {"net.hidden": [8]})
    policy = config.algo.make_policy(spec, config.net, None, 1)
    return Agent(policy, spec, config, 0, Path("nowhere"), None if isinstance(env, str) else env)


def _spec_of(env: Any) -> EnvSpec:
    stage = video.make_stage(
        presets.configure("ppo", env if isinstance(env, str) else "callable:it"), env if callable(env) else None
    )
    stage.close()
    return stage.envs.spec


def test_a_gif_shows_every_step_and_the_end(tmp_path: Path) -> None:
    agent = _agent(Painted, _spec_of(Painted))
    made = video.record(agent, tmp_path / "videos" / "x.gif")
    assert (made.reward, made.steps, made.ended) == (10.0, 4, True)
    with Image.open(made.path) as image:
        reds = []
        for place in range(getattr(image, "n_frames", 1)):
            image.seek(place)
            assert image.info["duration"] == 100
            reds.append(image.convert("RGB").getpixel((3, 3))[0])
    assert reds == [0, 50, 100, 150, 200]


def test_a_recording_can_be_cut(tmp_path: Path) -> None:
    made = video.record(_agent(Painted, _spec_of(Painted)), tmp_path / "x.gif", max_steps=3)
    assert (made.steps, made.ended) == (3, False)


def test_the_double_of_an_atari_game_is_the_same_game() -> None:
    config = presets.configure("ppo", "ALE/Pong-v5", {"env_options.atari.sticky_actions": 0.25})
    stage = video.make_stage(config, None)
    try:
        assert stage.double is not None
        assert stage.fps == 15.0
        stage.reset(3)
        rng = np.random.default_rng(0)
        step = stage.envs.recv(0)
        frames = [stage.frame(step.obs)]
        rewards = []
        for _ in range(120):
            stage.send(rng.integers(0, 6, 1))
            step = stage.envs.recv(0)
            twin = stage.double.recv(0)
            assert twin.reward == step.reward
            assert twin.ended == step.ended
            rewards.append(float(step.reward[0]))
            frames.append(twin.obs[0, -1].copy())
        assert any(rewards)
        assert frames[0].shape == (210, 210, 3)
        assert len({frame.tobytes() for frame in frames}) > 60
        grey = step.obs[0, -1].astype(float)
        small = np.asarray(Image.fromarray(frames[-1]).convert("L").resize((84, 84), Image.Resampling.BOX), float)
        assert np.corrcoef(grey.ravel(), small.ravel())[0, 1] > 0.9
    finally:
        stage.close()


@pytest.mark.parametrize("shape", [(12, 10), (3, 12, 10), (12, 10, 3), (4, 12, 10), (12, 10, 4), (12, 10, 1)])
def test_observations_that_are_images_are_shown(shape: tuple[int, ...]) -> None:
    class Seen(Painted):
        def __init__(self) -> None:
            super().__init__(None)
            self.observation_space = spaces.Box(0, 255, shape, np.uint8)

        def reset(self, **options: Any) -> Any:
            return np.full(shape, 200, np.uint8), {}

    stage = video.make_stage(presets.configure("ppo", "callable:it"), Seen)
    stage.reset(1)
    frame = stage.frame(stage.envs.recv(0).obs)
    stage.close()
    assert frame.shape == (12, 10, 3)
    assert frame.dtype == np.uint8
    assert frame.max() >= 200


def test_what_cannot_be_seen_is_an_error() -> None:
    with pytest.raises(EnvError, match=r"^toy:catch cannot be watched: it has no render_mode"):
        video.make_stage(presets.configure("ppo", "toy:catch"), None)


def test_a_vector_environment_is_refused() -> None:
    def make() -> Any:
        return SyncVectorEnv([Painted] * 2)

    with pytest.raises(EnvError, match="makes a vector environment, which cannot be watched; load the run"):
        video.make_stage(presets.configure("ppo", "callable:it"), make)


def test_mp4_with_its_package(tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    assert video.suffix("auto") == ".mp4"
    made = video.record(_agent(Painted, _spec_of(Painted)), tmp_path / "x.mp4")
    assert made.path.read_bytes()[4:8] == b"ftyp"


def test_mp4_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video.importlib.util, "find_spec", lambda name: None)
    assert (video.suffix("auto"), video.suffix("gif")) == (".gif", ".gif")
    with pytest.raises(ImportError, match=r'pip install "slipstream\[video\]"'):
        video.suffix("mp4")


class Unpainted(Painted):
    error: Exception

    def render(self) -> Any:
        raise self.error


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            gymnasium.error.DependencyNotInstalled("pygame is not installed, run `pip install gymnasium[classic]`"),
            ImportError,
            'callable:it cannot be rendered, a package is missing: pip install "slipstream[video]"',
        ),
        (RuntimeError("no display"), EnvError, "callable:it cannot be rendered: RuntimeError: no display"),
    ],
)
def test_what_cannot_be_rendered_says_why_and_leaves_no_file(
    tmp_path: Path, error: Exception, kind: type[Exception], message: str
) -> None:
    agent = _agent(Painted, _spec_of(Painted))
    Unpainted.error = error
    agent.env = Unpainted
    for name in ("x.gif", "x.mp4"):
        with pytest.raises(kind) as caught:
            video.record(agent, tmp_path / name)
        assert str(caught.value) == message
    assert list(tmp_path.iterdir()) == []


def test_a_video_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *arguments: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(video, "_write_gif", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*x\.gif: No space left on device \("):
        video.record(_agent(Painted, _spec_of(Painted)), tmp_path / "x.gif")
    assert list(tmp_path.iterdir()) == []
