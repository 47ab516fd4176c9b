"""How environments are made: frozen dataclasses that are also command-line flags."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal


@dataclass(frozen=True)
class AtariProtocol:
    """Every choice of an Atari experiment, spelled out. Rewards are always raw; the learner clips.

    Attributes:
        sticky_actions: Probability that the emulator repeats the previous action, drawn anew for every frame.
        noop_max: An episode starts with a random number of no-op frames in `[0, noop_max)`; 0 switches them off.
        life_loss: Whether a lost life terminates the target. The episode goes on, so returns stay whole.
        fire_on_reset: Whether FIRE is pressed once after a reset, in games that have that action.
        frame_skip: Emulator frames per step.
        maxpool: Whether a frame is the pixelwise maximum of the last two emulator frames (sprites flicker).
        frame_stack: Frames in an observation; those before the start of the episode are black.
        screen_size: Height and width of a frame, in pixels.
        grayscale: Whether frames are luminance `[stack, size, size]`; otherwise RGB `[stack, size, size, 3]`.
        full_action_set: Whether all 18 actions are offered, not only those that matter in the game.
        max_frames: Emulator frames after which an episode is truncated (108,000 frames are 30 minutes of play).
    """

    sticky_actions: float
    noop_max: int
    life_loss: bool
    fire_on_reset: bool
    frame_skip: int = 4
    maxpool: bool = True
    frame_stack: int = 4
    screen_size: int = 84
    grayscale: bool = True
    full_action_set: bool = False
    max_frames: int = 108_000

    def __post_init__(self) -> None:
        """Refuses what the emulator would misread."""
        if not 0.0 <= self.sticky_actions < 1.0:
            raise ValueError(f"atari.sticky_actions is a probability in [0, 1), got {self.sticky_actions}")
        if self.noop_max < 0:
            raise ValueError(f"atari.noop_max must be 0 or more frames, got {self.noop_max}")
        for name in ("frame_skip", "frame_stack", "screen_size", "max_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"atari.{name} must be at least 1, got {getattr(self, name)}")


PROTOCOLS: dict[str, AtariProtocol] = {
    "v4": AtariProtocol(sticky_actions=0.0, noop_max=30, life_loss=True, fire_on_reset=True),
    "ale_v5": AtariProtocol(sticky_actions=0.25, noop_max=0, life_loss=False, fire_on_reset=False),
}
"""The two standard protocols. Scores under one must never be compared with scores under the other."""


@dataclass(frozen=True)
class AtariOptions:
    """A standard protocol, with any single choice overridden; None leaves the choice to the protocol.

    Attributes:
        protocol: `v4`: no sticky actions, random no-op starts, targets end with a life (the `NoFrameskip-v4` tradition:
            DQN, A3C, PPO, IMPALA). `ale_v5`: sticky actions 0.25, no life loss, no no-ops, no FIRE (Machado et al.,
            2018; Dopamine). The protocol alone decides, also for ids that end in `-v5`.
        sticky_actions: Probability of repeating the previous action.
        noop_max: Random no-op frames at the start, in `[0, noop_max)`.
        life_loss: Whether a lost life terminates the target (never the episode).
        fire_on_reset: Whether FIRE is pressed after a reset.
        frame_skip: Emulator frames per step.
        maxpool: Whether the last two frames are max-pooled.
        frame_stack: Frames in an observation.
        screen_size: Pixels per side.
        grayscale: Luminance instead of RGB.
        full_action_set: All 18 actions.
        max_frames: Emulator frames until an episode is truncated.
    """

    protocol: Literal["v4", "ale_v5"] = "v4"
    sticky_actions: float | None = None
    noop_max: int | None = None
    life_loss: bool | None = None
    fire_on_reset: bool | None = None
    frame_skip: int | None = None
    maxpool: bool | None = None
    frame_stack: int | None = None
    screen_size: int | None = None
    grayscale: bool | None = None
    full_action_set: bool | None = None
    max_frames: int | None = None

    def spelled_out(self) -> AtariProtocol:
        """The protocol with the overrides put in: every choice has a value.

        Raises:
            ValueError: A choice is out of its range.
        """
        chosen: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(AtariProtocol)}
        overrides = {name: value for name, value in chosen.items() if value is not None}
        return replace(PROTOCOLS[self.protocol], **overrides)


NonFinite = Literal["raise", "skip", "clamp"]
"""What becomes of numbers that are not finite."""

_LONGEST = 30 * 86400.0  # seconds


@dataclass(frozen=True)
class EnvOptions:
    """Choices for all kinds of environments.

    Attributes:
        atari: Choices that only Atari games have.
        frame_stack: Observations stacked along a new first axis in Gymnasium environments (1: none).
        max_episode_steps: Steps after which an episode is truncated; None keeps the id's own limit.
        decorrelate_steps: Before the first row every slot plays a random number, in `[0, decorrelate_steps]`, of random
            steps, so that slots don't go through their episodes in step. A function of (seed, slot); 0 switches it off.
            The first episode of a slot is then seen, and reported, from its middle on.
        score_key: Key of `info` under which Gymnasium environments say what a step really scored, where their reward is
            shaped for learning; returns are then reported as sums of that. Empty: the reward is what counts. None: as
            the environment has it, which is empty but for gfootball's `score_reward`.
        non_finite: What becomes of NaN and infinity in observations, rewards and scores, before anybody has seen them:
            `raise` ends the run; `skip` cuts the episode (a truncation, with the last good observation and no reward)
            and begins the next, in environments that are stepped by Python one by one (a reset that shows NaN ends the
            run); `clamp` writes 0 in their place,
            or the bound of the space for infinity where there is one. `faults/mended_rows` counts.
        timeout_seconds: How long worker and collector processes may take for resetting or stepping a lane.
        kwargs: Further arguments of the environment, each typed as `--env-options.kwargs.NAME VALUE`: of
            `gymnasium.make(id, ...)`, of an EnvPool family, of a toy, of gfootball (rewards, representation, stacked).
    """

    atari: AtariOptions = field(default_factory=AtariOptions)
    frame_stack: int = 1
    max_episode_steps: int | None = None
    decorrelate_steps: int = 0
    score_key: str | None = None
    non_finite: NonFinite = "raise"
    timeout_seconds: float = 300.0
    kwargs: dict[str, int | float | bool | str] = field(default_factory=dict[str, int | float | bool | str])

    def __post_init__(self) -> None:
        """Refuses numbers that mean nothing."""
        if self.frame_stack < 1:
            raise ValueError(f"frame_stack must be at least 1, got {self.frame_stack}")
        if self.max_episode_steps is not None and self.max_episode_steps < 1:
            raise ValueError(f"max_episode_steps must be at least 1, got {self.max_episode_steps}")
        if self.decorrelate_steps < 0:
            raise ValueError(f"decorrelate_steps must be 0 or more, got {self.decorrelate_steps}")
        if not 0 < self.timeout_seconds <= _LONGEST:
            raise ValueError(f"timeout_seconds must be above 0 and at most {_LONGEST:.0f}, got {self.timeout_seconds}")
