"""Whatever is typed, and however environments behave: a message that says what is wrong, or a run that is right."""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slipstream import patience
from slipstream.algos import ALGORITHMS
from slipstream.envs import EnvError
from slipstream.run.config import known_settings
from slipstream.run.presets import configure
from slipstream.run.settings import ConfigError
from slipstream.run.training import Training

NUMBERS = st.sampled_from([-1.0, 0.0, 1e-3, 0.5, 1.0, 2.0, math.inf, math.nan])
CHOICES: dict[str, st.SearchStrategy[Any]] = {
    "num_envs": st.integers(-1, 6),
    "lanes": st.integers(0, 4),
    "group": st.integers(0, 3),
    "shards": st.integers(-1, 4),
    "unroll": st.integers(0, 9),
    "max_lag": st.integers(0, 3),
    "schedule": st.sampled_from(["sync", "concurrent", "async", "sometimes"]),
    "stale": st.sampled_from(["wait", "drop"]),
    "refresh": st.sampled_from(["unroll", "row"]),
    "reward": st.sampled_from(["raw", "clip", "sign", "scale"]),
    "seed": st.sampled_from([-1, 0, 1, 2**63]),
    "net.hidden": st.sampled_from([[], [0], [5], [3, 4]]),
    "net.core": st.sampled_from(["none", "lstm", "gru"]),
    "net.core_size": st.sampled_from([0, 3]),
    "net.share_torso": st.booleans(),
    "net.normalize_obs": st.booleans(),
    "net.latent": st.sampled_from([0, 2]),
    "algo.lr": NUMBERS,
    "algo.gamma": NUMBERS,
    "algo.max_grad_norm": NUMBERS,
    "algo.batch_size": st.integers(0, 16),
    "algo.epochs": st.integers(0, 2),
    "algo.n_step": st.integers(0, 3),
    "algo.replay.capacity": st.sampled_from([0, 16, 64, 256]),
    "algo.replay.learning_starts": st.sampled_from([0, 10, 10**6]),
    "algo.replay.ratio": NUMBERS,
    "algo.replay.proportion": NUMBERS,
    "algo.reuse_forward": st.booleans(),
    "env_options.frame_stack": st.integers(0, 3),
    "env_options.decorrelate_steps": st.integers(-1, 5),
    "env_options.max_episode_steps": st.integers(0, 3),
    "placement.collectors": st.sampled_from(["inline", "thread"]),
    "placement.workers": st.integers(-1, 3),
    "placement.loaders": st.integers(-1, 2),
    "stop_at_return": st.sampled_from([None, 0.0, math.nan]),
}
SMALL: dict[str, Any] = {"num_envs": 2, "unroll": 4, "net.hidden": [5], "total_steps": 64, "placement.workers": 1}


@st.composite
def typed(draw: st.DrawFn) -> tuple[str, str, dict[str, Any]]:
    """An algorithm, an environment and up to five settings that the algorithm has."""
    algo = draw(st.sampled_from(sorted(ALGORITHMS)))
    keys = sorted(CHOICES.keys() & known_settings(algo).keys())
    chosen = draw(st.lists(st.sampled_from(keys), max_size=5, unique=True))
    small = {"algo.batch_size": 4} if "algo.batch_size" in keys else {}
    small |= {"algo.replay.capacity": 64, "algo.replay.learning_starts": 8} if "algo.replay.ratio" in keys else {}
    env = draw(st.sampled_from(["CartPole-v1", "Pendulum-v1"]))
    return algo, env, {**SMALL, **small, **{key: draw(CHOICES[key]) for key in chosen}}


def trains_or_says_why(case: tuple[str, str, dict[str, Any]]) -> None:
    algo, env, values = case
    said = None
    with warnings.catch_warnings(action="ignore"):
        try:
            training = Training(configure(algo, env, values))
            try:
                assert next(iter(training)).update == 1
            finally:
                training.close()
        except (ConfigError, ValueError) as error:
            said = str(error)
        except FloatingPointError as error:  # of a learning rate that is infinite
            said = str(error).replace("not finite", "algo.lr")
    if said is not None:
        named = {part for key in [*values, "actions", "action space"] for part in (key, *key.split("."))}
        named |= {name.replace("_", "-") for name in named}
        assert any(re.search(rf"\b{re.escape(name)}\b", said) for name in named), said


ALIKE = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@settings(ALIKE, max_examples=25)
@given(typed())
def test_settings_train_or_are_refused_by_name(case: tuple[str, str, dict[str, Any]]) -> None:
    trains_or_says_why(case)


@pytest.mark.slow
@settings(ALIKE, max_examples=500)
@given(typed())
def test_more_settings_train_or_are_refused_by_name(case: tuple[str, str, dict[str, Any]]) -> None:
    trains_or_says_why(case)


SPACES: dict[str, spaces.Space[Any]] = {
    "box": spaces.Box(-1.0, 1.0, (3,), np.float32),
    "scalar": spaces.Box(-1.0, 1.0, (), np.float32),
    "bytes": spaces.Box(0, 255, (2, 3), np.uint8),
    "double": spaces.Box(-1e6, 1e6, (2,), np.float64),
    "discrete": spaces.Discrete(5, start=-2),
    "choices": spaces.MultiDiscrete([2, 3]),
    "bits": spaces.MultiBinary(3),
    "dict": spaces.Dict({"a": spaces.Discrete(3), "b": spaces.Box(0.0, 1.0, (2,), np.float32)}),
    "tuple": spaces.Tuple((spaces.Discrete(2), spaces.Box(0.0, 1.0, (1,), np.float32))),
}


class Scripted(gymnasium.Env[Any, Any]):
    """What it shows depends on the seed, the step and nothing else; raises in its kind's calls of the given numbers."""

    calls = 0
    faults: frozenset[int] = frozenset()

    def __init__(self, space: spaces.Space[Any], actions: spaces.Space[Any], lengths: Sequence[int]) -> None:
        self.observation_space, self.action_space, self._lengths = space, actions, lengths
        self._seed = self._t = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self._call("reset")
        self._seed, self._t = seed or 0, 0
        return self._show(), {}

    def step(self, action: Any) -> Any:
        self._call("step")
        self._t += 1
        over = self._t >= self._lengths[self._seed % len(self._lengths)]
        return self._show(), float(self._seed % 3), over and self._seed % 2 == 0, over and self._seed % 2 == 1, {}

    def _show(self) -> Any:
        self.observation_space.seed((self._seed + self._t) % 2**31)
        return self.observation_space.sample()

    def _call(self, what: str) -> None:
        cls = type(self)
        cls.calls += 1
        if cls.calls in cls.faults:
            raise RuntimeError(f"{what} number {cls.calls} fails")


@contextmanager
def failing(faults: frozenset[int]) -> Iterator[None]:
    Scripted.calls, Scripted.faults = 0, faults
    pause = patience._FIRST_PAUSE
    patience._FIRST_PAUSE = 0.0
    try:
        yield
    finally:
        patience._FIRST_PAUSE = pause
        Scripted.faults = frozenset()


def run(kind: str, action: str, lengths: list[int], faults: frozenset[int]) -> tuple[str, int]:
    """A hash of three updates, and how often lanes were brought back."""
    chosen = {"discrete": spaces.Discrete(3), "box": spaces.Box(-1.0, 1.0, (2,), np.float32)}[action]
    size = {"num_envs": 4, "lanes": 2, "unroll": 5, "algo.batch_size": 10, "algo.epochs": 1, "net.hidden": [5]}
    place = {"placement.workers": 1, "placement.restarts": 99, "total_steps": 60}
    with failing(faults), warnings.catch_warnings(action="ignore"):
        training = Training(
            configure("ppo", "callable:scripted", {**size, **place}), lambda: Scripted(SPACES[kind], chosen, lengths)
        )
        digest, restarts = hashlib.sha256(), 0
        try:
            for report in training:
                digest.update(repr((report.steps, report.episodes)).encode())
                restarts = int(report.metrics["faults/restarts"])
            for name, tensor in sorted(training.state()[0].items()):
                assert not tensor.is_floating_point() or tensor.isfinite().all(), name
                digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
        finally:
            training.close()
    return digest.hexdigest(), restarts


@settings(ALIKE, max_examples=15)
@given(
    st.sampled_from(sorted(SPACES)),
    st.sampled_from(["discrete", "box"]),
    st.lists(st.integers(1, 7), min_size=1, max_size=3),
    st.frozensets(st.integers(5, 70), min_size=1, max_size=6),
)
def test_faults_anywhere_change_no_bit(kind: str, action: str, lengths: list[int], faults: frozenset[int]) -> None:
    """Four calls are the first resets, in which an environment that raises is one that never worked."""
    found, restarts = run(kind, action, lengths, faults)
    assert restarts >= 1
    assert found == run(kind, action, lengths, frozenset())[0]


def test_an_environment_that_never_works_is_an_error() -> None:
    with pytest.raises(EnvError, match="reset raised RuntimeError: reset number"):
        run("box", "discrete", [3], frozenset(range(1, 10_000)))
