"""Google Research Football from its own package (`gfootball:SCENARIO`, installed by `make grf`).

EnvPool's ids (`envpool:gfootball/...`) come with a pip line and are the same game, but only this package has the
checkpoint rewards and the vector of 115 numbers. It lets go of Python's lock while it computes, so that lanes are
stepped at the same time by threads or by worker processes. It renders one environment per process, which is why
observations of pixels are not among the representations. Nothing here imports torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from slipstream.envs import old_gym
from slipstream.envs.ids import unknown_id

PREFIX = "gfootball:"
SCORE_KEY = "score_reward"
"""Where `info` has the goals of a step, without the checkpoints."""

_REPRESENTATIONS = ("extracted", "simple115v2", "simple115")
_REWARDS = ("scoring", "scoring,checkpoints")
_SEEDS = 2_000_000_000  # the engine's seeds are below


class Football(gymnasium.Env[Any, np.int64]):
    """A scenario with one controlled player, behind Gymnasium's interface.

    An episode is a function of the seed of its `reset` and of the actions. Its clock running out truncates it, since
    observations don't show the clock; a goal, the ball out of play or lost, as the scenario has it, terminates it. In
    the very last step of the clock only a goal is told from the clock.

    Args:
        scenario: Name, such as `academy_run_to_score`, one of `scenarios()`.
        rewards: `scoring` (a goal is 1, one against -1), or `scoring,checkpoints`: 0.1 more for each of ten zones
            towards the goal, once per episode. What was scored is in `info["score_reward"]` either way.
        representation: `extracted`, planes uint8 `[72, 96, 4]` of both teams, ball and active player (the "super mini
            map"); `simple115v2`, float32 `[115]`; `simple115`.
        stacked: Whether the last four observations are joined along the last axis.
        render_mode: `rgb_array`, or none. The engine renders one environment per process.

    Raises:
        ImportError: The package is not installed.
        ValueError: An unknown representation or reward.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 - Gymnasium's name and type

    def __init__(
        self,
        scenario: str,
        rewards: str = "scoring,checkpoints",
        representation: str = "extracted",
        stacked: bool = False,
        render_mode: str | None = None,
    ) -> None:
        _require(rewards, _REWARDS, "rewards")
        _require(representation, _REPRESENTATIONS, "representation")
        _require(stacked, (False, True), "stacked")
        self.render_mode = render_mode
        self._game: Any = _package().create_environment(
            env_name=scenario,
            rewards=rewards,
            representation=representation,
            stacked=stacked,
            render=render_mode is not None,
            other_config_options=_seeded(0),
        )
        self._core: Any = self._game.unwrapped._env
        self._config: Any = self._game.unwrapped._config
        self.observation_space = self._game.observation_space
        self.action_space = gymnasium.spaces.Discrete(int(self._game.action_space.n))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Kicks off; without a seed, with the next one of this environment's generator."""
        super().reset(seed=seed)
        chosen = int(self.np_random.integers(_SEEDS)) if seed is None else seed
        self._config.update(_seeded(chosen))
        return self._game.reset(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Plays a tenth of a second."""
        obs, reward, done, info = self._game.step(int(action))
        rules = self._core._env.config
        late = self._core._step >= rules.game_duration and not (rules.end_episode_on_score and info[SCORE_KEY])
        return obs, float(reward), done and not late, done and late, info

    def render(self) -> Any:
        """The broadcast view, uint8 `[720, 1280, 3]`."""
        return self._game.render(mode="rgb_array")

    def close(self) -> None:
        """Gives the engine back to the package, which keeps it for the next environment."""
        self._game.close()


def scenarios() -> list[str]:
    """Names of the scenarios; none where the package is not installed. Does not import it."""
    found = importlib.util.find_spec("gfootball")
    if found is None or found.origin is None:
        return []
    files = (Path(found.origin).parent / "scenarios").glob("[!_]*.py")
    return sorted(file.stem for file in files if not file.stem.startswith("test_"))


def require_scenario(scenario: str) -> None:
    """Refuses names that the package doesn't have.

    Raises:
        ImportError: It is not installed.
        ValueError: It has no such scenario; the nearest are named.
    """
    known = scenarios()
    if not known:
        raise ImportError(
            f"{PREFIX}{scenario} needs the package gfootball, which is compiled from its sources: type `make grf` "
            "(Debian, Python 3.11). EnvPool has the game with rewards for goals only, as in "
            'envpool:gfootball/academy_run_to_score-v1: pip install "slipstream[envpool]"'
        )
    if scenario not in known:
        raise ValueError(unknown_id(f"{PREFIX}{scenario}", [f"{PREFIX}{name}" for name in known]))


def _package() -> Any:
    """The package's module of environments."""
    if "gfootball.env" not in sys.modules:
        with old_gym.stand_in():
            return importlib.import_module("gfootball.env")
    return sys.modules["gfootball.env"]


def _seeded(seed: int) -> Mapping[str, Any]:
    """What the engine draws an episode from; some scenarios swap sides in every other episode of an environment."""
    return {
        "game_engine_random_seed": seed % _SEEDS,
        "reverse_team_processing": bool(seed % _SEEDS % 2),
        "episode_number": seed // 2 % _SEEDS,
    }


def _require(given: object, known: Sequence[object], what: str) -> None:
    if given not in known:
        raise ValueError(f"{what} of {PREFIX[:-1]} must be {' or '.join(map(repr, known))}, got {given!r}")
