"""Every environment backend through the whole stack: it trains, and threads, processes and delays change no bit."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor

from slipstream.envs import EnvError
from slipstream.run.config import CALLABLE
from slipstream.run.presets import configure
from slipstream.run.training import Training
from slipstream.types import Report

SMALL = {"num_envs": 4, "unroll": 8, "total_steps": 10_000, "seed": 3}
PPO = {**SMALL, "algo.batch_size": 16, "algo.epochs": 2}
LIMIT = 5  # steps of an episode, so that every slab holds ends and dead rows


def train(
    algo: str, env: str, settings: dict[str, Any], make: Callable[[], Any] | None = None, updates: int = 2
) -> tuple[list[str], list[Report], dict[str, Tensor]]:
    """One hash of parameters, optimiser state and episodes per update; the reports; the last parameters."""
    training = Training(configure(algo, env, settings), make)
    hashes: list[str] = []
    reports: list[Report] = []
    try:
        for report in training:
            digest = hashlib.sha256(repr(report.episodes).encode())
            for name, tensor in sorted(training.learner.state()[0].items()):
                digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
            hashes.append(digest.hexdigest())
            reports.append(report)
            if len(reports) == updates:
                return hashes, reports, {name: t.clone() for name, t in training.policy.state_dict().items()}
    finally:
        training.close()
    raise AssertionError("the run ended early")


def assert_every_parameter_moved(algo: str, env: str, settings: dict[str, Any], make: Any = None) -> None:
    """One update leaves nothing as it was, and nothing that is not a number."""
    training = Training(configure(algo, env, settings), make)
    try:
        before = {name: t.detach().clone() for name, t in training.policy.named_parameters()}
        next(iter(training))
        for name, parameter in training.policy.named_parameters():
            assert torch.isfinite(parameter).all(), name
            assert not torch.equal(parameter, before[name]), name
    finally:
        training.close()


def cartpole() -> gymnasium.Env[Any, Any]:
    return gymnasium.make("CartPole-v1", max_episode_steps=LIMIT)


def vector(size: int, mode: AutoresetMode) -> SyncVectorEnv:
    return SyncVectorEnv([cartpole] * size, autoreset_mode=mode)


SHORT = {"env_options.max_episode_steps": LIMIT}
NATIVE: dict[str, tuple[str, dict[str, Any]]] = {
    "ale": ("ALE/Pong-v5", SHORT),
    "envpool classic": ("envpool:CartPole-v1", SHORT),
    "envpool atari": ("envpool:Pong-v5", SHORT),
}
MODES = {f"vector {mode.name}": mode for mode in AutoresetMode}
BACKENDS = ["gym", "workers", *MODES, *NATIVE]


@cache
def run(backend: str, lanes: int, threads: int) -> tuple[list[str], list[Report]]:
    """Two updates with `threads` workers, environment processes and native threads."""
    settings = {**PPO, "lanes": lanes, "placement.workers": threads}
    if backend in NATIVE:
        env, options = NATIVE[backend]
        return train("ppo", env, {**settings, **options, "placement.env_threads": threads})[:2]
    make: Callable[[], Any] = cartpole
    if backend in MODES:
        make = partial(vector, 4 // lanes, MODES[backend])
    elif backend == "workers":
        settings["placement.env_workers"] = threads
    return train("ppo", CALLABLE + "cartpole", settings, make)[:2]


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_trains_and_threads_change_no_bit(backend: str, lanes: int) -> None:
    one, reports = run(backend, lanes, 1)
    assert len(set(one)) == 2
    assert [report.update for report in reports] == [1, 2]
    assert reports[0].steps < 4 * 8, "no dead row was left out"
    assert sum(len(report.episodes) for report in reports) >= 4
    assert run(backend, lanes, 2)[0] == one


@pytest.mark.parametrize("lanes", [1, 2])
def test_backends_that_play_the_same_episodes_learn_the_same(lanes: int) -> None:
    """NEXT_STEP leaves the seeds of later episodes to the environments, so it alone is another run."""
    reference = run("gym", lanes, 1)[0]
    for backend in ("workers", "vector SAME_STEP", "vector DISABLED"):
        assert run(backend, lanes, 1)[0] == reference, backend
    assert run("vector NEXT_STEP", lanes, 1)[0][-1] != reference[-1]


class Delayed(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Answers after up to 3 ms, another delay for every environment and step."""

    def __init__(self, key: int) -> None:
        super().__init__(cartpole())
        self._key = key
        self._generator = np.random.Generator(np.random.Philox(key))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self._generator = np.random.Generator(np.random.Philox([self._key, seed or 0]))
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> Any:
        time.sleep(self._generator.uniform(0.0, 0.003))
        return super().step(action)


@pytest.mark.parametrize(("workers", "env_workers", "key"), [(2, 0, 1), (2, 0, 2), (1, 2, 1), (2, 2, 2)])
def test_random_delays_change_no_bit(workers: int, env_workers: int, key: int) -> None:
    settings = {**PPO, "lanes": 2, "placement.workers": workers, "placement.env_workers": env_workers}
    delayed = train("ppo", CALLABLE + "cartpole", settings, partial(Delayed, key))[0]
    assert delayed == run("gym", 2, 1)[0]


class Masked(gymnasium.Env[Any, Any]):
    """Allows another random set of options at every step, none at the end, and raises on what it did not allow.

    Args:
        action_space: Discrete or MultiDiscrete.
        key: Name of the mask in the observation.
    """

    def __init__(self, action_space: spaces.Discrete | spaces.MultiDiscrete, key: str = "action_mask") -> None:
        self.action_space, self._key = action_space, key
        multi = isinstance(action_space, spaces.MultiDiscrete)
        self._sizes = [int(size) for size in action_space.nvec] if multi else [int(action_space.n)]
        entries = sum(self._sizes)
        mask = spaces.MultiBinary(entries) if multi else spaces.Box(0, 1, (entries,), np.int8)
        self.observation_space = spaces.Dict({"x": spaces.Box(-1.0, 1.0, (3,), np.float32), key: mask})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self._t = 0
        return self._obs(), {}

    def step(self, action: Any) -> Any:
        choices = [int(choice) for choice in np.atleast_1d(action)]
        for choice, allowed in zip(choices, self._allowed, strict=True):
            if not allowed[choice]:
                raise ValueError(f"{choice} is masked: {allowed}")
        self._t += 1
        return self._obs(), float(choices[0]), self._t == LIMIT, False, {}

    def _obs(self) -> dict[str, Any]:
        self._allowed = [self.np_random.permutation(size) < self.np_random.integers(1, size) for size in self._sizes]
        mask = np.concatenate(self._allowed).astype(np.int8) * (self._t < LIMIT)
        return {"x": self.np_random.uniform(-1, 1, 3).astype(np.float32), self._key: mask.astype(np.int8)}


@pytest.mark.parametrize(
    ("action_space", "env_workers"),
    [(spaces.Discrete(5), 0), (spaces.MultiDiscrete([2, 3]), 2)],
    ids=["one choice", "several choices"],
)
def test_masked_actions_are_never_taken(action_space: Any, env_workers: int) -> None:
    settings = {**SMALL, "lanes": 2, "algo.batch_size": 32, "algo.epochs": 1, "placement.env_workers": env_workers}
    reports = train("ppo", CALLABLE + "masked", settings, partial(Masked, action_space), updates=5)[1]
    for report in reports:
        # One minibatch, so the parameters have not moved yet: learning applies the mask that acting applied.
        assert abs(float(report.metrics["train/approx_kl"])) < 1e-6
    assert sum(len(report.episodes) for report in reports) >= 4


@pytest.mark.parametrize("action_space", [spaces.Discrete(5), spaces.MultiDiscrete([2, 3])], ids=["one", "several"])
def test_without_the_mask_they_would_be(action_space: Any) -> None:
    settings = {**SMALL, "lanes": 2, "algo.batch_size": 32, "algo.epochs": 1}
    with pytest.raises(EnvError, match=r"slot \d, step \d+, .* is masked"):
        train("ppo", CALLABLE + "masked", settings, partial(Masked, action_space, "allowed"), updates=5)


class Sampled(gymnasium.Env[Any, Any]):
    """Shows samples of any space; every action is worth something else."""

    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        self.observation_space = copy.deepcopy(observation_space)  # it holds the generator of its samples
        self.action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.observation_space.seed(seed)
        self._t = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        self._t += 1
        return self.observation_space.sample(), float(action), False, self._t == LIMIT, {}


BOX = spaces.Box(-1.0, 1.0, (2, 3), np.float32)
OBSERVATIONS = {
    "discrete": spaces.Discrete(4, start=-2),
    "multi_discrete": spaces.MultiDiscrete([3, 4], start=[1, 5]),
    "multi_binary": spaces.MultiBinary((2, 2)),
    "dict": spaces.Dict({"x": BOX, "eye": spaces.Box(0, 255, (36, 36, 3), np.uint8)}),
    "tuple": spaces.Tuple((BOX, spaces.Discrete(3))),
    "nested": spaces.Dict({"b": spaces.Tuple((BOX, spaces.MultiBinary(3))), "a": spaces.Dict({"c": BOX})}),
}


@pytest.mark.parametrize("kind", OBSERVATIONS)
def test_observations_of_every_space_train(kind: str) -> None:
    settings = {**PPO, "lanes": 2, "net.normalize_obs": kind == "nested"}
    assert_every_parameter_moved("ppo", CALLABLE + "sampled", settings, partial(Sampled, OBSERVATIONS[kind]))


def test_observations_that_workers_share_train_the_same() -> None:
    settings, make = {**PPO, "lanes": 2}, partial(Sampled, OBSERVATIONS["nested"])
    inline = train("ppo", CALLABLE + "sampled", settings, make)[0]
    assert train("ppo", CALLABLE + "sampled", {**settings, "placement.env_workers": 2}, make)[0] == inline


@pytest.mark.parametrize(
    ("algo", "settings"),
    [
        ("a2c", {"net.torso": "nips_cnn"}),
        ("a2c", {"net.torso": "nature_cnn", "net.core": "gru", "net.core_size": 16}),
        ("ppo", {"net.torso": "impala_resnet", "algo.batch_size": 16, "algo.epochs": 1}),
    ],
    ids=["a2c, nips", "a2c, nature and gru", "ppo, resnet"],
)
def test_convolutional_networks_train_on_ale(algo: str, settings: dict[str, Any]) -> None:
    assert_every_parameter_moved(algo, "ALE/Pong-v5", {**SMALL, "num_envs": 4, "lanes": 2, **SHORT, **settings})


def test_a2c_with_convolutions_does_not_depend_on_threads() -> None:
    settings = {**SMALL, "lanes": 2, **SHORT}
    one, two = (
        train("a2c", "ALE/Pong-v5", {**settings, "placement.workers": count, "placement.env_threads": count})[0]
        for count in (1, 2)
    )
    assert one == two
    assert len(set(one)) == 2
