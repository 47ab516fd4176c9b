"""`slipstream check-env`: plays an environment, says where it breaks the contract, and how to mend it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces as gym_spaces
from numpy.typing import NDArray

from slipstream import dice, tree
from slipstream.envs import spaces
from slipstream.envs.factory import EnvFactory, require_maker
from slipstream.envs.gym import GymEnvs
from slipstream.envs.make import env_family, gym_source, make_envs
from slipstream.envs.options import EnvOptions
from slipstream.envs.rows import EnvError
from slipstream.envs.slot import close_all
from slipstream.ops.spaces import allowed, space_tree
from slipstream.tree import Tree
from slipstream.types import Envs, EnvSpec, EnvStep

_SLOTS = 3


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or that may surprise.

    Attributes:
        severity: `error`: training would fail or learn from wrong data. `warning`: it can be meant.
        problem: What is wrong, with the place.
        remedy: What to do about it.
    """

    severity: Literal["error", "warning"]
    problem: str
    remedy: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.severity}: {self.problem}; {self.remedy}"


@dataclass(frozen=True)
class _Play:
    """Rows of one run: `[steps + 1]` of them, each of all slots."""

    spec: EnvSpec
    rows: list[EnvStep]


def check_env(
    env: str | EnvFactory, options: EnvOptions | None = None, steps: int = 500, seed: int = 0
) -> list[Finding]:
    """Plays `steps` random steps in a few slots, several times over, and tells what it found.

    Checked: spaces; shapes, dtypes and bounds of observations; rewards; determinism (twice the same seed, in a fresh
    environment and in a used one); different lives in different slots, by their seeds; ends of episodes; observations
    that change after they were handed out.

    Args:
        env: An id or a callable, as for `make_envs`.
        options: Choices; defaults if None.
        steps: Steps per slot and run.
        seed: Of the environments and of the random actions.

    Returns:
        Findings, errors first; empty if all is well.

    Raises:
        ValueError: Neither an id nor a callable, or an unknown id. Options that the environment does not have are a
            finding.
        ImportError: A package is missing.
        EnvError: The environment failed in the second run only.
    """
    options = options or EnvOptions()
    _require(env)
    try:
        envs = make_envs(env, _SLOTS, 1, options)
    except (ValueError, EnvError) as error:
        return [Finding("error", str(error), "mend this first; nothing else could be checked")]
    try:
        first, again = _play(envs, steps, seed), _play(envs, steps, seed)
    except EnvError as error:
        remedy = "the environment must answer as its spaces promise, and with finite numbers"
        return [Finding("error", str(error), remedy)]
    finally:
        envs.close()
    fresh = make_envs(env, _SLOTS, 1, options)
    try:
        second, seeded = _play(fresh, steps, seed), _seeded(fresh, steps, seed)
    finally:
        fresh.close()
    findings = [*_bounds(first), *_determinism(first, second, again), *_lives(first, seeded), *_ends(first, steps)]
    if isinstance(fresh, GymEnvs):
        findings += _views(gym_source(env, options).make(0), seed)
    return sorted(findings, key=lambda finding: finding.severity)


def _require(env: str | EnvFactory) -> None:
    """Lets the errors of whoever typed the id through: they are not findings about the environment."""
    require_maker(env)
    if isinstance(env, str):
        env_family(env)


def _play(envs: Envs, steps: int, seed: int) -> _Play:
    """Random actions, a function of the seed alone."""
    generator = np.random.Generator(np.random.Philox(dice.seed_sequence(seed, "check")))
    actions = spaces.Actions(envs.spec.action_space, envs.spec.num_envs, envs.spec.id)
    envs.reset(seed)
    rows = [copy.deepcopy(envs.recv(0))]
    for _ in range(steps):
        shown = [tree.map(lambda leaf, slot=slot: leaf[slot], rows[-1].obs) for slot in range(envs.spec.num_envs)]
        envs.send(np.stack([actions.sample(generator, allowed(obs)) for obs in shown]), 0)
        rows.append(copy.deepcopy(envs.recv(0)))
    return _Play(envs.spec, rows)


def _bounds(play: _Play) -> list[Finding]:
    """Observations outside their space."""
    findings: list[Finding] = []
    for path, space in tree.items(space_tree(play.spec.observation_space)):
        name = f"observation '{path}'" if path else "observation"
        for number, row in enumerate(play.rows):
            leaf = dict(tree.items(row.obs))[path]
            outside = _outside(space, leaf)
            if outside is not None:
                findings.append(
                    Finding(
                        "error",
                        f"{name} of slot {outside}, step {number} is outside {space}: {_short(leaf[outside])}",
                        "widen the bounds of the space, or clip the observation",
                    )
                )
                break
    return findings


def _outside(space: gymnasium.Space[Any], leaf: NDArray[Any]) -> int | None:
    """The first slot whose observation is outside the space, if any."""
    if isinstance(space, gym_spaces.Box):
        bad = (leaf < space.low.astype(leaf.dtype)) | (leaf > space.high.astype(leaf.dtype))
    elif isinstance(space, gym_spaces.MultiDiscrete):
        bad = (leaf < space.start) | (leaf >= space.start + space.nvec)
    elif isinstance(space, gym_spaces.Discrete):
        bad = (leaf < space.start) | (leaf >= space.start + space.n)
    else:
        bad = (leaf != 0) & (leaf != 1)
    columns = np.flatnonzero(bad.reshape(len(leaf), -1).any(axis=1))
    return int(columns[0]) if len(columns) else None


def _determinism(first: _Play, fresh: _Play, again: _Play) -> list[Finding]:
    """The same seed and actions, twice."""
    remedy = "draw all random numbers from self.np_random, seeded by super().reset(seed=seed), and no global generator"
    difference = _difference(first, fresh)
    if difference is not None:
        return [Finding("error", f"two environments with the same seed differ: {difference}", remedy)]
    difference = _difference(first, again)
    if difference is None:
        return []
    remedy = "reset(seed=...) must set everything back that earlier episodes changed"
    return [Finding("error", f"reset with the same seed does not bring back the same episode: {difference}", remedy)]


def _difference(one: _Play, other: _Play) -> str | None:
    """The first row, slot and field in which two runs differ."""
    for number, (a, b) in enumerate(zip(one.rows, other.rows, strict=True)):
        for (path, x), (_, y) in zip(_fields(a), _fields(b), strict=True):
            if not np.array_equal(x, y):
                column = int(np.flatnonzero((x != y).reshape(len(x), -1).any(axis=1))[0])
                return f"{path} of slot {column}, step {number}: {_short(x[column])} and {_short(y[column])}"
    return None


def _fields(row: EnvStep) -> list[tuple[str, NDArray[Any]]]:
    flags = [("reward", row.reward), ("terminated", row.terminated), ("truncated", row.truncated)]
    return [*tree.items(row.obs, "observation"), *flags]


def _seeded(envs: Envs, steps: int, seed: int) -> bool:
    """Whether slots come to differ under the same actions, by what their seeds decide: starts, or what follows."""
    generator = np.random.Generator(np.random.Philox(dice.seed_sequence(seed, "same")))
    actions = spaces.Actions(envs.spec.action_space, envs.spec.num_envs, envs.spec.id)
    envs.reset(seed)
    for _ in range(steps):
        row = envs.recv(0)
        if _differ(_fields(row)):
            return True
        action = actions.sample(generator, allowed(tree.map(lambda leaf: leaf[0], row.obs)))
        envs.send(np.stack([action] * envs.spec.num_envs), 0)
    return _differ(_fields(envs.recv(0)))


def _lives(play: _Play, seeded: bool) -> list[Finding]:
    """Slots that all live the same life."""
    if not any(_differ(tree.items(row.obs)) for row in play.rows):
        return [Finding("warning", "no observation ever changed between slots", "is there anything to learn?")]
    if seeded:
        return []
    problem = "all slots start from the same observation, and the same actions lead to the same, whatever the seed"
    remedy = "if starts should be random, use the seed given to reset; decorrelate_steps spreads the slots out"
    return [Finding("warning", problem, remedy)]


def _differ(fields: Iterable[tuple[str, NDArray[Any]]]) -> bool:
    """Whether the slots of a row do."""
    return any((leaf != leaf[0]).any() for _, leaf in fields)


def _ends(play: _Play, steps: int) -> list[Finding]:
    """Episodes that never end, and rows after the end that are not as the rule wants them."""
    findings: list[Finding] = []
    ended = np.stack([row.ended for row in play.rows])
    dead = ended[:-1]
    flags = np.stack([row.terminated | row.truncated | (row.reward != 0) for row in play.rows])[1:]
    if (dead & flags).any():
        number, slot = (int(index[0]) for index in np.nonzero(dead & flags))
        problem = f"slot {slot}, step {number + 1} follows the end of an episode, but has a reward or a flag"
        findings.append(Finding("error", problem, "it must be the reset: see the autoreset mode"))
    if not ended.any():
        remedy = "if episodes can go on for ever, set max_episode_steps"
        findings.append(Finding("warning", f"no episode ended within {steps} random steps", remedy))
    return findings


def _views(env: gymnasium.Env[Any, Any], seed: int) -> list[Finding]:
    """Observations that the environment writes to again after handing them out."""
    actions = spaces.Actions(env.action_space, 1, "env")
    generator = np.random.Generator(np.random.Philox(dice.seed_sequence(seed, "views")))
    obs, _ = env.reset(seed=seed)
    held, kept = obs, copy.deepcopy(obs)
    try:
        for number in range(1, 4):
            obs, _, terminated, truncated, _ = env.step(
                actions.encode(actions.sample(generator, allowed(obs))[None])[0]
            )
            if not _same(held, kept):
                problem = f"the observation handed out before step {number} was changed by that step"
                remedy = "return a copy: `return self._obs.copy(), ...`; wrappers that keep observations need it"
                return [Finding("error", problem, remedy)]
            if terminated or truncated:
                obs, _ = env.reset()
            held, kept = obs, copy.deepcopy(obs)
    finally:
        close_all("env", {0: env})
    return []


def _same(one: Tree, other: Tree) -> bool:
    pairs = zip(tree.leaves(one), tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def _short(value: Any) -> str:
    text = np.array2string(np.asarray(value), threshold=8, precision=4).replace("\n", "")
    return text if len(text) <= 60 else text[:57] + "..."
