from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

import slipstream
from slipstream import tree
from slipstream.algos.ppo import PPO
from slipstream.envs import check_env, make_envs
from slipstream.nets.policy import Policy
from slipstream.run.agent import Agent
from slipstream.run.files import CheckpointError
from slipstream.run.presets import configure
from slipstream.run.settings import ConfigError
from slipstream.types import EnvSpec
from tests.run.runs import SMALL, train


def _agent(observation_space: spaces.Space[Any], action_space: spaces.Space[Any], **changes: Any) -> Agent:
    config = configure("ppo", "CartPole-v1", {key.replace("__", "."): value for key, value in changes.items()})
    spec = EnvSpec("made-up", observation_space, action_space, num_envs=1)
    return Agent(config.algo.make_policy(spec, config.net, None, 1), spec, config, 0, Path("nowhere"))


BOX = spaces.Box(-1.0, 1.0, (3,), np.float64)
DICT = spaces.Dict({"a": BOX, "b": spaces.Discrete(4), "c": spaces.Tuple((spaces.Box(0, 255, (2, 5), np.uint8),))})


def _dict_batch(columns: int) -> Any:
    shape = (columns,) if columns else ()
    image = np.zeros((*shape, 2, 5), np.uint8)
    return {"a": np.zeros((*shape, 3)), "b": np.zeros(shape, np.int64), "c": (image,)}


@pytest.mark.parametrize(
    ("space", "single", "batch"),
    [
        (BOX, np.zeros(3), np.zeros((5, 3))),
        (spaces.Discrete(4), 2, np.array([0, 1, 2, 3, 1])),
        (DICT, _dict_batch(0), _dict_batch(5)),
    ],
    ids=["box", "discrete", "dict"],
)
@pytest.mark.parametrize(
    ("actions", "shape", "dtype"),
    [
        (spaces.Discrete(3), (), np.int64),
        (spaces.MultiDiscrete([2, 3]), (2,), np.int64),
        (spaces.Box(-0.01, 0.01, (4,)), (4,), np.float32),
    ],
    ids=["discrete", "multidiscrete", "continuous"],
)
def test_predict_shapes(space: Any, single: Any, batch: Any, actions: Any, shape: Any, dtype: Any) -> None:
    agent = _agent(space, actions)
    one, state = agent.predict(single)
    assert (np.shape(one), one.dtype, state) == (shape, dtype, None)
    many, state = agent.predict(batch)
    assert (np.shape(many), many.dtype, state) == ((5, *shape), dtype, None)
    assert actions.contains(one)
    assert all(actions.contains(each) for each in many)


def test_predict_refuses_other_observations() -> None:
    agent = _agent(BOX, spaces.Discrete(3))
    for wrong in (np.zeros(4), np.zeros((2, 4)), np.zeros((2, 2, 3)), np.zeros(3, complex)):
        with pytest.raises(ValueError, match=r"predict: expected an observation of shape \(3,\) or \(B, \*shape\)"):
            agent.predict(wrong)
    with pytest.raises(ValueError, match="predict: expected observations of Dict"):
        _agent(DICT, spaces.Discrete(3)).predict({"a": np.zeros(3)})


def test_predict_refuses_what_is_not_finite() -> None:
    agent = _agent(BOX, spaces.Discrete(3))
    for wrong in (np.nan, np.inf):
        with pytest.raises(ValueError, match="predict: the observation has numbers that are not finite"):
            agent.predict(np.array([[0.0, 0.0, 0.0], [0.0, wrong, 0.0]]))


def test_deterministic_takes_the_mode_and_draws_are_keyed_by_call() -> None:
    obs = np.zeros((11, 3))

    def actions(agent: Agent, deterministic: bool) -> list[list[int]]:
        return [agent.predict(obs, deterministic=deterministic)[0].tolist() for _ in range(5)]

    first, second = (_agent(BOX, spaces.Discrete(3)) for _ in range(2))
    drawn = actions(first, False)
    assert drawn == actions(second, False)
    assert len({tuple(row) for row in drawn}) > 1
    assert len({tuple(row) for row in actions(first, True)}) == 1


@pytest.mark.parametrize("core", ["lstm", "gru"])
def test_recurrent_state_is_carried_and_zeroed_at_the_start_of_an_episode(core: str) -> None:
    agent = _agent(BOX, spaces.Discrete(3), net__core=core, net__core_size=7)
    obs = np.array([[0.5, 0.1, -0.3], [0.2, 0.9, 0.4]])
    _, fresh = agent.predict(obs)
    _, carried = agent.predict(obs, state=fresh)
    _, again = agent.predict(obs, state=fresh, episode_start=np.array([True, False]))

    def leaves(state: Any) -> list[np.ndarray[Any, Any]]:
        return [np.asarray(leaf) for leaf in tree.leaves(state)]

    for new, old, mixed in zip(leaves(fresh), leaves(carried), leaves(again), strict=True):
        assert new.shape == (2, 7)
        assert not np.allclose(new, old)
        np.testing.assert_array_equal(mixed[0], new[0])
        np.testing.assert_array_equal(mixed[1], old[1])


def test_predict_refuses_a_state_of_other_slots() -> None:
    agent = _agent(BOX, spaces.Discrete(3), net__core="gru", net__core_size=7, net__share_torso=True)
    obs = np.zeros((3, 3))
    _, state = agent.predict(obs[:2])
    with pytest.raises(
        ValueError, match=r"expected the state of 3 slots, arrays of shapes \[\(3, 7\)\], got \[\(2, 7\)\]"
    ):
        agent.predict(obs, state)
    with pytest.raises(ValueError, match=r"expected episode_start of shape \(3,\), got \(2,\)"):
        agent.predict(obs, None, np.zeros(2, np.bool_))
    agent.predict(obs[:2], state, np.array([True, False]))
    agent.predict(obs[0], None, True)  # type: ignore[arg-type]


def test_an_agent_that_cannot_be_saved_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    agent = _agent(BOX, spaces.Discrete(3))
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*saved: No space left on device \([\d.]+ .B free\)$"):
        agent.save(tmp_path / "saved")


def test_train_load_save(tmp_path: Path) -> None:
    settings = {**SMALL, "log.dir": str(tmp_path / "runs"), "log.tensorboard": False}
    agent = slipstream.train("ppo", env="CartPole-v1", total_steps=4.2e1, seed=5, config=settings, quiet=True)
    assert (agent.config.seed, agent.config.total_steps) == (5, 42)
    assert agent.steps >= 42
    loaded = slipstream.load(agent.run)
    loaded.save(tmp_path / "saved")
    copied = slipstream.load(tmp_path / "saved")
    obs = np.linspace(-0.1, 0.1, 20).reshape(5, 4)
    wanted = loaded.predict(obs)[0]
    np.testing.assert_array_equal(copied.predict(obs)[0], wanted)
    assert loaded.steps == copied.steps == agent.steps
    assert agent.evaluate(3).returns == loaded.evaluate(3).returns == copied.evaluate(3).returns
    assert loaded.evaluate(3, seed=6).returns != loaded.evaluate(3).returns
    with pytest.raises(ValueError, match="at least 1 episode"):
        loaded.evaluate(0)
    assert slipstream.load(agent.run, checkpoint=agent.steps).steps == agent.steps
    assert set(slipstream.__all__) <= set(dir(slipstream))
    with pytest.raises(FileExistsError, match="saved exists; save writes a new directory"):
        loaded.save(tmp_path / "saved")
    with pytest.raises(ConfigError, match="holds a saved agent, not a run"):
        slipstream.resume(tmp_path / "saved", total_steps=100, quiet=True)
    assert slipstream.resume(agent.run, total_steps=84, quiet=True).steps >= 84


def test_settings_may_be_keywords_in_names_of_other_libraries_too(tmp_path: Path) -> None:
    settings = {**SMALL, "log.dir": str(tmp_path), "log.tensorboard": False}
    agent = slipstream.train(
        "ppo", "CartPole-v1", config=settings, quiet=True, total_timesteps=28, learning_rate=2e-3, gamma=0.8
    )
    assert isinstance(agent.config.algo, PPO)
    assert (agent.config.total_steps, agent.config.algo.lr, agent.config.algo.gamma) == (28, 2e-3, 0.8)
    with pytest.raises(ConfigError, match=r"gama.*gamma"):
        slipstream.train("ppo", "CartPole-v1", gama=0.9)
    with pytest.raises(ConfigError, match="total_steps is given twice"):
        slipstream.train("ppo", "CartPole-v1", total_steps=100, total_timesteps=200)
    with pytest.raises(ConfigError, match=r"algo\.gamma is given twice, as 0\.9 and, by the name gamma, as 0\.8"):
        slipstream.train("ppo", "CartPole-v1", config={"algo.gamma": 0.9}, gamma=0.8)
    with pytest.raises(ConfigError, match="unroll: given twice, in config and as a keyword"):
        slipstream.train("ppo", "CartPole-v1", config={"unroll": 8}, unroll=8)


def test_a_saved_agent_is_the_same_policy_where_observations_do_not_count_from_zero(tmp_path: Path) -> None:
    space = spaces.MultiDiscrete([3, 4], start=[1, 5])
    agent = _agent(space, spaces.Discrete(3), net__hidden=[8])
    agent.save(tmp_path / "saved")
    loaded = slipstream.load(tmp_path / "saved")
    obs = torch.tensor([[1, 5], [3, 8], [2, 6], [1, 8], [3, 5]])

    def value(policy: Policy) -> Tensor:
        return policy.act(obs, policy.initial_state(5), torch.full((5, policy.dice_width), 0.5)).extras["value"]

    assert value(agent.policy).unique().numel() == 5
    assert torch.equal(value(loaded.policy), value(agent.policy))


class Torso(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = nn.Linear(4, size)

    def forward(self, obs: Tensor) -> Tensor:
        return torch.relu(self.layer(obs))


OWN_TORSO = {key: value for key, value in SMALL.items() if key != "net.hidden"}


def test_a_torso_of_ones_own_must_be_given_again(tmp_path: Path) -> None:
    settings = {**OWN_TORSO, "log.dir": str(tmp_path), "log.tensorboard": False, "total_steps": 21}
    agent = slipstream.train("ppo", "CartPole-v1", config=settings, torso=Torso(5), quiet=True)
    loaded = slipstream.load(agent.run, torso=Torso(5))
    assert agent.evaluate(2).returns == loaded.evaluate(2).returns
    for torso in (None, Torso(6)):
        with pytest.raises(CheckpointError, match="does not fit the network; give the torso or policy") as caught:
            slipstream.load(agent.run, torso=torso)
        assert "\n" not in str(caught.value), "not all that PyTorch lists"


def test_a_resume_without_the_torso_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    settings = {**OWN_TORSO, "log.dir": str(tmp_path), "log.tensorboard": False, "total_steps": 21}
    agent = slipstream.train("ppo", "CartPole-v1", config=settings, torso=Torso(5), quiet=True)
    before = {path: path.read_bytes() for path in agent.run.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="does not fit the network; give the torso or policy"):
        slipstream.resume(agent.run, total_steps=84, quiet=True)
    assert {path: path.read_bytes() for path in agent.run.rglob("*") if path.is_file()} == before
    assert slipstream.resume(agent.run, total_steps=84, torso=Torso(5), quiet=True).steps >= 84


class Long(gymnasium.Wrapper[Any, Any, Any, Any]):
    """CartPole with a number more to see."""

    def __init__(self) -> None:
        super().__init__(gymnasium.make("CartPole-v1"))
        self.observation_space = spaces.Box(-np.inf, np.inf, (5,), np.float32)

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(**options)
        return np.append(obs, np.float32(0)), info

    def step(self, action: Any) -> Any:
        obs, *rest = self.env.step(action)
        return np.append(obs, np.float32(0)), *rest


def test_an_environment_that_has_changed_its_spaces_is_refused(tmp_path: Path) -> None:
    settings = {**SMALL, "log.dir": str(tmp_path), "log.tensorboard": False, "total_steps": 21}
    agent = slipstream.train("ppo", Long, config=settings, quiet=True)
    assert len(agent.evaluate(2).returns) == 2
    with pytest.raises(ConfigError, match="trained on the Python callable Long"):
        slipstream.load(agent.run).evaluate(2)
    assert len(slipstream.load(agent.run, env=Long).evaluate(2).returns) == 2
    agent.env = lambda: gymnasium.make("CartPole-v1")
    with pytest.raises(CheckpointError, match="belongs to another environment: its observation space"):
        agent.evaluate(2)
    with pytest.raises(CheckpointError, match=r"its observation space \(of Long\) is Box\(.*\(5,\).* is Box\(.*\(4,\)"):
        slipstream.load(agent.run, env=agent.env)


def test_a_run_is_loaded_and_resumed_with_an_id(tmp_path: Path) -> None:
    settings = {**SMALL, "log.dir": str(tmp_path), "log.tensorboard": False, "total_steps": 21}
    agent = slipstream.train("ppo", lambda: gymnasium.make("CartPole-v1"), config=settings, quiet=True)
    loaded = slipstream.load(agent.run, env="CartPole-v1")
    assert loaded.config.env == "CartPole-v1"
    assert loaded.evaluate(3).returns == agent.evaluate(3).returns
    with pytest.raises(CheckpointError, match="belongs to another environment: its observation space"):
        slipstream.load(agent.run, env="Acrobot-v1")
    with pytest.raises(ValueError, match="unknown environment 'CartPol-v1'; did you mean CartPole-v1"):
        slipstream.load(agent.run, env="CartPol-v1")
    with pytest.raises(CheckpointError, match="belongs to another environment: its observation space"):
        slipstream.resume(agent.run, total_steps=42, env="Acrobot-v1", quiet=True)
    assert slipstream.load(agent.run).config == agent.config
    with pytest.raises(ConfigError, match=r"num_envs was 3, not 6\. Leave"):
        slipstream.resume(agent.run, total_steps=42, env="CartPole-v1", quiet=True, num_envs=6)
    more = {"placement.restarts": 7}
    resumed = slipstream.resume(agent.run, total_timesteps=42, env="CartPole-v1", quiet=True, config=more)
    assert (resumed.steps >= 42, resumed.config.placement.restarts) == (True, 7)
    assert slipstream.load(agent.run).config.env == "CartPole-v1"


def test_an_environment_in_place_of_what_makes_one_is_refused(tmp_path: Path) -> None:
    run = train(tmp_path, total_steps=21).run.path
    made: Any = gymnasium.make("CartPole-v1")
    message = (
        r"expected an id or a callable that makes an environment, got an environment .* env=lambda: gymnasium\.make"
    )
    for use in (
        lambda: slipstream.train("ppo", made, quiet=True),
        lambda: slipstream.load(run, env=made),
        lambda: slipstream.resume(run, env=made, quiet=True),
        lambda: check_env(made),
        lambda: make_envs(made, 2),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    for nothing in (3, None):
        with pytest.raises(ValueError, match=f"got {type(nothing).__name__} {nothing}"):
            slipstream.train("ppo", nothing, quiet=True)  # type: ignore[arg-type]


def test_load_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run directory"):
        slipstream.load(tmp_path)
    with pytest.raises(ConfigError, match="nothing does not exist"):
        slipstream.load(tmp_path / "nothing")
    run = train(tmp_path, total_steps=20).run
    with pytest.raises(ConfigError, match=rf"has no config.yaml; the newest run in it is {run.path}$"):
        slipstream.load(run.path.parent)
    with pytest.raises(ConfigError, match="is a file, not a run directory"):
        slipstream.load(run.path / "config.yaml")
    with pytest.raises(CheckpointError, match="no checkpoint '7'"):
        slipstream.load(run.path, checkpoint="7")


def test_public_names() -> None:
    for name in slipstream.__all__:
        assert callable(getattr(slipstream, name))
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        slipstream.trian  # noqa: B018
