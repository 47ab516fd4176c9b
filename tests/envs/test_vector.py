"""Vector environments of the user: three autoreset modes, one rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper

from slipstream.envs import EnvError, EnvOptions, make_envs
from slipstream.envs.make import list_envs
from slipstream.envs.toy import Counter

from .playing import assert_equal, assert_rule, counter_rows, play

SCRIPT = [(3, "t"), (5, "c"), (1, "t"), (2, "b")]
MODES = list(AutoresetMode)


class Life(Counter):
    """Counter whose episode number is that of its slot as the driver counts, told by the seed if there is one."""

    episodes: dict[int, int]

    def __init__(self) -> None:
        super().__init__("3t 5c 1t 2b")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        if seed is not None and seed in self.episodes:
            self._episode = self.episodes[seed] - 1
        return super().reset(seed=seed)


def lanes_of(size: int, mode: AutoresetMode, copy: bool = False) -> Callable[[], Any]:
    from slipstream import dice

    Life.episodes = {dice.env_seed(11, "env", slot, episode): episode for slot in range(4) for episode in range(40)}
    return lambda: SyncVectorEnv([Life] * size, copy=copy, autoreset_mode=mode)


@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_every_cell_of_counter_is_known_in_advance(mode: AutoresetMode, lanes: int) -> None:
    played = play(make_envs(lanes_of(4 // lanes, mode), 4, lanes), 37, seed=11, backwards=lanes == 2)
    assert_equal(played, counter_rows(11, 4, 37, SCRIPT, reseeded=mode is not AutoresetMode.NEXT_STEP))
    assert_rule(played)


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED], ids=lambda mode: mode.name)
@pytest.mark.parametrize("env", ["CartPole-v1", "Blackjack-v1", "dict"])
def test_masked_modes_play_the_very_episodes_of_gym_envs(mode: AutoresetMode, env: str) -> None:
    def single() -> gymnasium.Env[Any, Any]:
        if env != "dict":
            return gymnasium.make(env)
        space = gymnasium.spaces.Dict({"x": gymnasium.make("CartPole-v1").observation_space})
        return gymnasium.wrappers.TransformObservation(gymnasium.make("CartPole-v1"), lambda x: {"x": x}, space)

    reference = play(make_envs(single, 3), 67)
    played = play(make_envs(lambda: SyncVectorEnv([single] * 3, autoreset_mode=mode), 3), 67)
    assert reference.ended.sum() > 3
    assert_equal(played, reference)


def test_next_step_of_gymnasium_follows_the_rule() -> None:
    played = play(make_envs(lambda: gymnasium.make_vec("CartPole-v1", 3), 3), 67)
    assert_rule(played)
    assert_equal(played, play(make_envs(lambda: gymnasium.make_vec("CartPole-v1", 3), 3), 67))


@pytest.mark.parametrize("lanes", [1, 2])
def test_an_id_means_the_vector_environment_that_is_registered_for_it(lanes: int) -> None:
    size = 4 // lanes
    reference = play(make_envs(lambda: gymnasium.make_vec("CartPole-v1", size), 4, lanes), 67)
    envs = make_envs("vector:CartPole-v1", 4, lanes)
    assert (envs.spec.id, envs.spec.family) == ("vector:CartPole-v1", "classic")
    assert_equal(play(envs, 67), reference)
    assert "vector:CartPole-v1" in list_envs()["classic"]


def test_options_of_an_id_go_to_its_vector_environment() -> None:
    options = EnvOptions(max_episode_steps=3, kwargs={"sutton_barto_reward": True})
    played = play(make_envs("vector:CartPole-v1", 2, 1, options), 9)
    assert (played.truncated.sum(), played.terminated.sum(), abs(played.reward).sum()) == (4, 0, 0)


@pytest.mark.parametrize(
    ("id", "options", "workers", "message"),
    [
        ("vector:Acrobot-v1", {}, 0, "vector:Acrobot-v1: no vector environment is registered for Acrobot-v1; type Acr"),
        (
            "vector:CartPole-v1",
            {},
            2,
            "vector:CartPole-v1: env_workers is not for vector environments; type CartPole-v1",
        ),
        ("vector:CartPole-v1", {"frame_stack": 2}, 0, "frame_stack is not for vector environments; type CartPole-v1"),
        ("vector:ALE/Pong-v5", {}, 0, "no vector environment is registered for ALE/Pong-v5; type ALE/Pong-v5"),
        ("vector:toy:catch", {}, 0, "no vector environment is registered for toy:catch; type toy:catch"),
        ("vector:CartPole-v9", {}, 0, "unknown environment 'CartPole-v9'; did you mean"),
    ],
)
def test_an_id_without_one_is_refused(id: str, options: dict[str, Any], workers: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_envs(id, 4, 1, EnvOptions(**options), workers=workers)


class Declares(VectorWrapper[Any, Any, Any, Any, Any]):
    """Says something else about itself than is true."""

    def __init__(self, env: VectorEnv[Any, Any, Any], mode: Any) -> None:
        super().__init__(env)
        self.metadata = {"autoreset_mode": mode} if mode is not None else {}


@pytest.mark.parametrize("mode", [None, "sometimes", 3])
def test_an_unknown_mode_is_refused(mode: Any) -> None:
    with pytest.raises(ValueError, match=r"metadata\['autoreset_mode'\] is .*; set it to AutoresetMode\.NEXT_STEP"):
        make_envs(lambda: Declares(gymnasium.make_vec("CartPole-v1", 2), mode), 2)


def test_a_mode_may_be_its_value() -> None:
    envs = make_envs(lambda: Declares(gymnasium.make_vec("CartPole-v1", 2), "NextStep"), 2)
    assert_rule(play(envs, 67))


def test_same_step_that_says_next_step_is_noticed() -> None:
    envs = make_envs(lambda: Declares(lanes_of(2, AutoresetMode.SAME_STEP)(), AutoresetMode.NEXT_STEP), 2)
    with pytest.raises(EnvError, match=r"row 3: autoreset_mode says NEXT_STEP, but at the end .* is it another mode"):
        play(envs, 9)


class Silent(Declares):
    """Tells nothing about its last observations."""

    def step(self, actions: Any) -> Any:
        return (*super().step(actions)[:4], {})


def test_a_dead_row_that_is_none_is_noticed() -> None:
    envs = make_envs(lambda: Silent(lanes_of(2, AutoresetMode.SAME_STEP)(), AutoresetMode.NEXT_STEP), 2)
    with pytest.raises(EnvError, match=r"row 4: autoreset_mode says NEXT_STEP, but slot 0 has a reward or an end"):
        play(envs, 9)


def test_next_step_that_says_same_step_is_noticed() -> None:
    envs = make_envs(lambda: Declares(lanes_of(2, AutoresetMode.NEXT_STEP)(), AutoresetMode.SAME_STEP), 2)
    with pytest.raises(EnvError, match=r"says SAME_STEP, but at the end .* are not in info\['final_obs'\]"):
        play(envs, 9)


class ResetsAll(VectorWrapper[Any, Any, Any, Any, Any]):
    """Ignores the mask of a partial reset."""

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        return self.env.reset(seed=seed)


def test_a_vector_environment_that_ignores_the_mask_is_noticed() -> None:
    envs = make_envs(
        lambda: ResetsAll(SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 3, autoreset_mode="SameStep")), 3
    )
    with pytest.raises(EnvError, match=r"reset\(options={'reset_mask': mask}\) changed slots outside the mask"):
        play(envs, 67)


class Answers(VectorWrapper[Any, Any, Any, Any, Any]):
    """Answers steps with something of its own."""

    def __init__(self, **answers: Any) -> None:
        super().__init__(SyncVectorEnv([Counter] * 2))
        self._answers = answers

    def step(self, actions: Any) -> Any:
        names = ("obs", "reward", "terminated", "truncated", "info")
        return (*(self._answers.get(name, own) for name, own in zip(names, super().step(actions), strict=True)),)


@pytest.mark.parametrize("name", ["terminated", "truncated"])
@pytest.mark.parametrize(
    ("flags", "got"),
    [
        (None, r"NoneType object \[\]"),
        (False, r"bool bool \[\]"),
        (["no", "no"], r"list <U2 \[2\]"),
        (np.zeros(3, np.bool_), r"ndarray bool \[3\]"),
        (np.zeros((2, 1), np.bool_), r"ndarray bool \[2, 1\]"),
        (np.zeros(2, np.float32), r"ndarray float32 \[2\]"),
        ([False, [False]], "list: .*inhomogeneous"),
    ],
)
def test_ends_that_are_no_truth_values_are_refused(name: str, flags: Any, got: str) -> None:
    expected = rf"slots 0 to 1, row 1: expected True or False as {name}, one for each of 2 slots, got {got}"
    with pytest.raises(EnvError, match=expected):
        play(make_envs(lambda: Answers(**{name: flags}), 2), 1)


def test_integers_are_ends_if_they_are_0_or_1() -> None:
    assert play(make_envs(lambda: Answers(truncated=np.array([0, 1])), 2), 1).ended[1].tolist() == [False, True]
    with pytest.raises(EnvError, match=r"row 1: expected True or False as truncated, got \[0 2\]"):
        play(make_envs(lambda: Answers(truncated=np.array([0, 2])), 2), 1)


@pytest.mark.parametrize("reward", [None, 1.0, ["1", "2"], np.zeros((2, 1))])
def test_rewards_that_are_no_numbers_are_refused(reward: Any) -> None:
    with pytest.raises(EnvError, match="row 1: expected numbers as reward, one for each of 2 slots, got"):
        play(make_envs(lambda: Answers(reward=reward), 2), 1)


def test_sizes_must_fit() -> None:
    with pytest.raises(ValueError, match=r"has 4 environments, but a lane has 2 slots \(num_envs 4 over 2 lanes\)"):
        make_envs(lambda: gymnasium.make_vec("CartPole-v1", 4), 4, 2)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"workers": 2}, "workers"),
        ({"options": EnvOptions(frame_stack=2)}, "frame_stack"),
        ({"options": EnvOptions(decorrelate_steps=2)}, "decorrelate_steps"),
        ({"options": EnvOptions(max_episode_steps=2)}, "max_episode_steps"),
    ],
)
def test_what_a_vector_environment_cannot_do_is_refused(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is not for vector environments; build it into the callable"):
        make_envs(lambda: gymnasium.make_vec("CartPole-v1", 4), 4, **arguments)


class Kept(VectorWrapper[Any, Any, Any, Any, Any]):
    """Remembers, in the class, which are closed."""

    made: list[Kept]

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        super().__init__(env)
        self.shut = False
        Kept.made.append(self)

    def close(self, **kwargs: Any) -> None:
        self.shut = True
        super().close(**kwargs)


@pytest.mark.parametrize(
    ("fault", "num_envs", "lanes", "options", "message"),
    [
        ("size", 4, 2, None, "has 3 environments, but a lane has 2 slots"),
        ("raises", 4, 2, None, "making the environment of slot 2 failed: OSError: no display"),
        ("single", 4, 2, None, "expected another vector environment for slot 2, got CartPoleEnv"),
        ("mode", 4, 2, None, "metadata"),
        ("none", 4, 3, None, "lanes must divide num_envs"),
        ("none", 4, 2, EnvOptions(frame_stack=2), "frame_stack is not for vector environments"),
    ],
)
def test_construction_that_fails_closes_what_it_made(
    fault: str, num_envs: int, lanes: int, options: EnvOptions | None, message: str
) -> None:
    Kept.made = []

    def factory() -> Any:
        further = bool(Kept.made)
        if fault == "raises" and further:
            raise OSError("no display")
        if fault == "single" and further:
            return gymnasium.make("CartPole-v1").unwrapped
        made = Kept(gymnasium.make_vec("CartPole-v1", 3 if fault == "size" and further else 2))
        if fault == "mode" and further:
            made.metadata = {}
        return made

    with pytest.raises((ValueError, EnvError), match=message):
        make_envs(factory, num_envs, lanes, options)
    assert Kept.made
    assert all(made.shut for made in Kept.made)


def test_a_close_that_raises_is_a_line_in_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def close(self: SyncVectorEnv, **kwargs: Any) -> None:
        closed.append(self)
        raise RuntimeError("it sticks")

    closed: list[SyncVectorEnv] = []
    monkeypatch.setattr(SyncVectorEnv, "close", close)
    with pytest.raises(ValueError, match="frame_stack is not for vector environments"):
        make_envs(lanes_of(2, AutoresetMode.NEXT_STEP), 4, 2, EnvOptions(frame_stack=2))
    with pytest.raises(ValueError, match="lanes must divide num_envs"):
        make_envs(lanes_of(2, AutoresetMode.NEXT_STEP), 4, 3)
    envs = make_envs(lanes_of(2, AutoresetMode.NEXT_STEP), 4, 2)
    caplog.clear()
    closed.clear()
    envs.close()
    assert len(closed) == 2
    said = "close of slot 0 raised RuntimeError: it sticks (so did those of 1 other)"
    assert [message.partition(": ")[2] for message in caplog.messages] == [said]


def test_close_twice() -> None:
    envs = make_envs(lambda: gymnasium.make_vec("CartPole-v1", 2), 2)
    envs.close()
    envs.close()
