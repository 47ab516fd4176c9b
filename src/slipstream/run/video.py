"""Videos of a policy at play: gif with Pillow, mp4 where imageio is installed (the extra `video`).

A Gymnasium environment is rendered by itself. An Atari game runs twice in step, once as the policy sees it and once in
colour at full size: the same seed and actions make them the same game. Where nothing can be rendered, observations that
are images are shown.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from slipstream import dice, slab
from slipstream.arithmetic import adopted
from slipstream.envs import EnvError, EnvOptions, envpool, make_envs, toy
from slipstream.envs.make import VECTOR, GymFactory, score_key
from slipstream.envs.slot import error_line
from slipstream.nets.actor_critic import ActorCritic
from slipstream.run import checkpoint, sketch
from slipstream.run.agent import Agent
from slipstream.run.config import Config
from slipstream.run.files import writing
from slipstream.run.loop import vector_columns
from slipstream.run.presets import family
from slipstream.run.settings import ConfigError
from slipstream.tree import Tree
from slipstream.types import Envs

Frame = NDArray[np.uint8]

_SCREEN_SIZE = 210
_DEFAULT_FPS = 30


@dataclass(frozen=True)
class Recording:
    """One recorded episode.

    Attributes:
        path: The file.
        reward: Raw return.
        steps: Agent decisions shown.
        ended: Whether the episode ended, rather than the recording.
    """

    path: Path
    reward: float
    steps: int
    ended: bool


@dataclass(frozen=True)
class Stage:
    """Where an episode is played and seen.

    Attributes:
        envs: One slot, as the policy sees it.
        double: The same game in colour, to be stepped along; None where `envs` is what is seen.
        frame: RGB `[H, W, 3]` of what is there now, given the last observation; called once per row.
        fps: Frames per second of the real thing.
    """

    envs: Envs
    double: Envs | None
    frame: Callable[[Tree], Frame]
    fps: float

    def reset(self, seed: int) -> None:
        """Starts an episode."""
        for envs in filter(None, (self.envs, self.double)):
            envs.reset(seed)

    def send(self, action: NDArray[Any]) -> None:
        """Steps."""
        for envs in filter(None, (self.envs, self.double)):
            envs.send(action, 0)

    def close(self) -> None:
        """Closes the environments."""
        for envs in filter(None, (self.envs, self.double)):
            envs.close()


class Playback:
    """Iterator over the frames of one episode; counts as it goes.

    Attributes:
        reward: Raw return so far.
        steps: Agent decisions so far.
        ended: Whether the episode has ended.
    """

    def __init__(
        self, agent: Agent, stage: Stage, seed: int, greedy: bool, max_steps: int, reconstruct: bool = False
    ) -> None:
        self._agent, self._stage, self._seed, self._greedy, self._max_steps = agent, stage, seed, greedy, max_steps
        self._sketch = _sketcher(agent) if reconstruct else None
        self.reward, self.steps, self.ended = 0.0, 0, False

    @torch.no_grad()
    def __iter__(self) -> Iterator[Frame]:
        """Plays; yields a frame before every decision and one after the last."""
        policy, stage = self._agent.policy, self._stage
        device = next(policy.parameters()).device
        keys = dice.keys(self._seed, "watch", range(1))
        stage.reset(self._seed)
        step = stage.envs.recv(0)

        state = slab.tensors(policy.initial_state(1), device)
        yield self._frame(step.obs)
        while not self.ended and self.steps < self._max_steps:
            draws = slab.tensors(dice.uniform(keys, self.steps, 1, policy.dice_width)[0], device)
            act = policy.act(slab.tensors(step.obs, device), state, draws, self._greedy)
            stage.send(act.action.cpu().numpy())
            step, state = stage.envs.recv(0), act.state
            self.reward += float(step.reported[0])
            self.steps += 1
            self.ended = bool(step.ended[0])
            yield self._frame(step.obs)

    def _frame(self, obs: Tree) -> Frame:
        """What is seen, with the auto-encoder's pictures beside it if they are wanted."""
        frame = self._stage.frame(obs)
        return frame if self._sketch is None else sketch.beside(frame, *self._sketch(obs))


def record(
    agent: Agent,
    path: Path,
    episode: int = 0,
    greedy: bool = False,
    seed: int | None = None,
    max_steps: int = 5_000,
    reconstruct: bool = False,
) -> Recording:
    """Plays one episode and writes it to `path`, a .gif or .mp4.

    Args:
        agent: Plays; it is only read.
        path: The file; its ending chooses the format.
        episode: Number of the episode: another one, another seed.
        greedy: Whether to take the most probable actions instead of drawn ones.
        seed: Another seed than the run's.
        max_steps: Steps after which the recording ends.
        reconstruct: Whether to show what the policy sees, and what the agent's decoder draws of it, beside the game.

    Raises:
        ConfigError: If that is wanted of an agent without a decoder.
        EnvError: If the environment can neither be rendered nor shown by its observations.
        ImportError: If a package is missing for that; the message has the pip line.
        CheckpointError: If it no longer has the spaces that the agent was trained on, or the file can't be written.
    """
    stage = make_stage(agent.config, agent.env)
    try:
        checkpoint.require_spaces(str(agent.run), agent.spec, stage.envs.spec)
        branch = dice.env_seed(agent.config.seed if seed is None else seed, "watch", episode)
        playback = Playback(agent, stage, branch, greedy, max_steps, reconstruct)
        write = _write_mp4 if path.suffix == ".mp4" else _write_gif
        part = path.with_stem(f".{path.stem}")  # until it is whole
        try:
            with writing(path), adopted():
                path.parent.mkdir(parents=True, exist_ok=True)
                write(part, iter(playback), stage.fps)
                part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return Recording(path, playback.reward, playback.steps, playback.ended)
    finally:
        stage.close()


def _sketcher(agent: Agent) -> Callable[[Tree], tuple[Frame, Frame]]:
    if agent.decoder is None or not isinstance(agent.policy, ActorCritic):
        raise ConfigError(
            f"{agent.run} has no auto-encoder to show: train with --autoencoder.weight 0.1, and watch the run itself"
        )
    return sketch.sketcher(agent.policy, agent.decoder)


def suffix(format: Literal["auto", "gif", "mp4"]) -> str:
    """Ending of a file in this format; `auto` is mp4 where imageio is installed.

    Raises:
        ImportError: If mp4 is asked for and imageio is missing.
    """
    installed = all(importlib.util.find_spec(name) for name in ("imageio", "imageio_ffmpeg"))
    if format == "mp4" and not installed:
        raise ImportError('mp4 needs a package: pip install "slipstream[video]" (or --format gif)')
    return ".mp4" if format == "mp4" or (format == "auto" and installed) else ".gif"


def make_stage(config: Config, env: Callable[[], gymnasium.Env[Any, Any]] | None) -> Stage:
    """A stage for the environment of `config`, or for the callable `env`.

    Raises:
        EnvError: If it can't be seen, or is a vector environment.
    """
    if env is not None and vector_columns(env):
        raise EnvError(
            f"{config.env} makes a vector environment, which cannot be watched; load the run with a callable that "
            "makes one of its environments"
        )
    config = replace(config, env=config.env.removeprefix(VECTOR))  # one of its environments
    options = replace(config.env_options, decorrelate_steps=0)
    if env is None and family(config.env) == "atari":
        return _atari_stage(config.env, options)
    if env is None and config.env.startswith(envpool.PREFIX):
        return _observation_stage(config.env, make_envs(config.env, 1, 1, options), _DEFAULT_FPS)
    made: list[gymnasium.Env[Any, Any]] = []
    mode = None if env is not None or config.env.startswith(toy.PREFIX) else "rgb_array"
    factory = GymFactory(env or config.env, options, mode)

    def make() -> gymnasium.Env[Any, Any]:
        made.append(factory())
        return made[-1]

    watched = EnvOptions(score_key=score_key(env or config.env, options), non_finite=options.non_finite)
    envs = make_envs(make, 1, 1, watched)
    fps = float(made[-1].metadata.get("render_fps") or _DEFAULT_FPS)
    if made[-1].render_mode != "rgb_array":
        return _observation_stage(config.env, envs, fps)

    def rendered(obs: Tree) -> Frame:
        try:
            frame = np.asarray(made[-1].render())
        except gymnasium.error.DependencyNotInstalled as error:
            remedy = 'pip install "slipstream[video]"' if "pygame" in str(error) else str(error)
            raise ImportError(f"{config.env} cannot be rendered, a package is missing: {remedy}") from error
        except Exception as error:
            advice = "; without a display, set MUJOCO_GL=egl or osmesa" if "mujoco" in type(error).__module__ else ""
            raise EnvError(f"{config.env} cannot be rendered: {error_line(error)}{advice}") from error
        if frame.ndim != 3 or frame.dtype != np.uint8:
            raise EnvError(f"{config.env}: render() must return uint8 [H, W, 3], got {frame.dtype} {frame.shape}")
        return frame

    return Stage(envs, None, rendered, fps)


def _atari_stage(env: str, options: EnvOptions) -> Stage:
    """The game as the policy sees it, and its double in colour."""
    colour = replace(options.atari, grayscale=False, frame_stack=1, screen_size=_SCREEN_SIZE)
    seen = make_envs(env, 1, 1, replace(options, atari=colour), threads=1)

    def frame(obs: Tree) -> Frame:
        image = seen.recv(0).obs[0]
        return image[-1] if image.ndim == 4 else image.transpose(1, 2, 0)  # ALE's, EnvPool's

    fps = 60.0 / seen.spec.frames_per_step
    return Stage(make_envs(env, 1, 1, options, threads=1), seen, frame, fps)


def _observation_stage(name: str, envs: Envs, fps: float) -> Stage:
    """Shows observations of `name` that are images: grey, RGB, or planes in colours; channels first or last."""
    space = envs.spec.observation_space
    shape = tuple(space.shape or ())
    if space.dtype != np.uint8 or len(shape) not in (2, 3):
        envs.close()
        raise EnvError(
            f"{name} cannot be watched: it has no render_mode 'rgb_array', and its observations are no images"
        )
    first = len(shape) == 3 and shape[0] < shape[-1]

    def frame(obs: Tree) -> Frame:
        image = np.atleast_3d(obs[0].transpose(1, 2, 0) if first else obs[0])
        if image.shape[-1] == 3:
            return image
        hues = np.array([[1, 1, 1], [1, 0.3, 0.2], [0.2, 0.5, 1], [1, 0.9, 0.2]], np.float32)
        planes = image[..., -len(hues) :].astype(np.float32)
        return (planes @ hues[: planes.shape[-1]]).clip(0, 255).astype(np.uint8)

    return Stage(envs, None, frame, fps)


def _write_gif(path: Path, frames: Iterator[Frame], fps: float) -> None:
    """Frames are reduced to a palette as they come, a third of the memory."""
    images = (Image.fromarray(frame).quantize(128) for frame in frames)
    next(images).save(path, save_all=True, append_images=images, duration=round(1000 / fps), loop=0)


def _write_mp4(path: Path, frames: Iterator[Frame], fps: float) -> None:
    import imageio.v2  # optional: the extra `video`

    with imageio.v2.get_writer(path, fps=fps, macro_block_size=2) as writer:
        for frame in frames:
            writer.append_data(frame)  # pyright: ignore[reportAttributeAccessIssue] - the ffmpeg writer has it
