"""Gymnasium environments in this process: the reference."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from slipstream import dice, tree
from slipstream.envs import EnvError, EnvOptions, make_envs
from slipstream.envs.toy import Chaos
from slipstream.types import Envs

from .playing import assert_equal, assert_rule, counter_rows, play, random_actions

SCRIPT = [(3, "t"), (5, "c"), (1, "t"), (2, "b")]
OPTIONS = EnvOptions(kwargs={"script": "3t 5c 1t 2b"})


@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize("backwards", [False, True])
def test_every_cell_of_counter_is_known_in_advance(lanes: int, backwards: bool) -> None:
    played = play(make_envs("toy:counter", 4, lanes, OPTIONS), 37, seed=11, backwards=backwards)
    assert_equal(played, counter_rows(11, 4, 37, SCRIPT))
    assert_rule(played)


def test_the_oracle_has_all_kinds_of_ends() -> None:
    rows = counter_rows(11, 4, 37, SCRIPT)
    kinds = {(bool(a), bool(b)) for a, b in zip(rows.terminated.ravel(), rows.truncated.ravel(), strict=True)}
    assert kinds == {(False, False), (True, False), (False, True), (True, True)}


def test_cartpole_equals_a_hand_written_loop() -> None:
    played = play(make_envs("CartPole-v1", 3, 3), 61, seed=2)
    env = gymnasium.make("CartPole-v1")
    actions = random_actions(make_envs("CartPole-v1", 3, 3), 61)
    for slot in range(3):
        episode, over = 0, False
        obs, _ = env.reset(seed=dice.env_seed(2, "env", slot, 0))
        for t in range(61):
            assert (played.obs[t, slot] == obs).all()
            if over:
                episode += 1
                obs, _ = env.reset(seed=dice.env_seed(2, "env", slot, episode))
                over = False
                continue
            obs, reward, terminated, truncated, _ = env.step(actions[t, slot])
            over = terminated or truncated
            assert played.reward[t + 1, slot] == reward
            assert played.terminated[t + 1, slot] == terminated
    assert_rule(played)


def test_seed_decides_and_slots_differ() -> None:
    one, same, other = (play(make_envs("CartPole-v1", 5), 23, seed=seed) for seed in (1, 1, 2))
    assert_equal(one, same)
    assert len({row.tobytes() for row in np.concatenate([one.obs[0], other.obs[0]])}) == 10


def test_reset_starts_over() -> None:
    envs = make_envs("Pendulum-v1", 3)
    assert_equal(play(envs, 13, close=False), play(envs, 13))


def test_time_limit_truncates_and_shows_the_last_observation() -> None:
    played = play(make_envs("Pendulum-v1", 2, 1, EnvOptions(max_episode_steps=7)), 17)
    assert played.truncated[7].all()
    assert not played.terminated.any()
    assert played.ended.sum() == 4
    assert (played.obs[7] != played.obs[8]).any()
    toy = play(make_envs("toy:counter", 2, 1, EnvOptions(max_episode_steps=2, kwargs={"script": "9t"})), 5)
    assert toy.truncated[:, 0].tolist() == [False, False, True, False, False, True]


def test_frames_are_stacked_by_gymnasium() -> None:
    played = play(make_envs("toy:counter", 2, 1, EnvOptions(frame_stack=3, kwargs={"script": "4t"})), 3)
    assert played.obs.shape == (4, 2, 3, 3)
    assert played.obs[:, 0, :, 2].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3]]


def test_decorrelation_spreads_the_slots_and_is_keyed() -> None:
    options = EnvOptions(decorrelate_steps=29, kwargs={"script": "11t 7c"})
    envs = make_envs("toy:counter", 16, 4, options)
    envs.reset(3)
    places = [tuple(row[1:]) for lane in range(4) for row in envs.recv(lane).obs.tolist()]
    assert len(set(places)) >= 8
    # Episode e starts after the steps of the earlier ones (resets while decorrelating cost no step).
    for slot, (episode, t) in enumerate(places):
        generator = np.random.Generator(np.random.Philox(dice.seed_sequence(3, "decorrelate", slot)))
        steps, expected = int(generator.integers(0, 30)), 0
        while steps >= (11, 7)[expected % 2]:
            steps -= (11, 7)[expected % 2]
            expected += 1
        assert (episode, t) == (expected, steps)
    assert_equal(
        play(make_envs("CartPole-v1", 4, 1, EnvOptions(decorrelate_steps=17)), 19),
        play(make_envs("CartPole-v1", 4, 4, EnvOptions(decorrelate_steps=17)), 19, backwards=True),
    )


class Spaces(gymnasium.Env[Any, Any]):
    """Answers with samples of any space, seeded, and remembers its actions."""

    def __init__(self, observation_space: gymnasium.Space[Any], action_space: gymnasium.Space[Any]) -> None:
        self.observation_space, self.action_space = observation_space, action_space
        self.actions: list[Any] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.observation_space.seed(seed)
        self.shown = [self.observation_space.sample()]
        return self.shown[-1], {}

    def step(self, action: Any) -> Any:
        self.actions.append(action)
        self.shown.append(self.observation_space.sample())
        return self.shown[-1], 0.5, False, False, {}


BOX = gymnasium.spaces.Box(-1, 1, (2, 3), np.float64)
KINDS = {
    "float64": BOX,
    "float32": gymnasium.spaces.Box(-1, 1, (5,), np.float32),
    "uint8": gymnasium.spaces.Box(0, 255, (2, 4, 4), np.uint8),
    "scalar": gymnasium.spaces.Box(0, 1, (), np.float32),
    "bool": gymnasium.spaces.Box(0, 1, (3,), np.bool_),
    "discrete": gymnasium.spaces.Discrete(4, start=-2),
    "multi_discrete": gymnasium.spaces.MultiDiscrete([3, 4]),
    "multi_binary": gymnasium.spaces.MultiBinary((2, 2)),
    "nested": gymnasium.spaces.Dict(
        {"b": gymnasium.spaces.Tuple((BOX, gymnasium.spaces.Discrete(2))), "a": gymnasium.spaces.MultiBinary(3)}
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*Box.*:UserWarning")
def test_observations_of_every_space_arrive_unchanged(kind: str) -> None:
    made: list[Spaces] = []

    def factory() -> gymnasium.Env[Any, Any]:
        made.append(Spaces(KINDS[kind], gymnasium.spaces.Discrete(2)))
        return made[-1]

    played = play(make_envs(factory, 3, 3), 5)
    for slot, env in enumerate(made[-3:]):
        for row, shown in enumerate(env.shown):
            for (path, leaf), (other, expected) in zip(tree.items(played.obs), tree.items(shown), strict=True):
                assert path == other
                wanted = np.asarray(expected)
                narrow = wanted.astype(np.float32) if wanted.dtype == np.float64 else wanted
                assert leaf[row, slot].dtype == narrow.dtype
                assert (leaf[row, slot] == narrow).all()


@pytest.mark.parametrize(
    ("space", "sent", "got"),
    [
        (gymnasium.spaces.Discrete(3, start=5), [0, 2], [5, 7]),
        (gymnasium.spaces.MultiDiscrete([2, 3], start=[1, -1]), [[0, 2], [1, 0]], [[1, 1], [2, -1]]),
        (gymnasium.spaces.Box(-1, 2, (1,), np.float32), [[-9.0], [1.5]], [[-1.0], [1.5]]),
        (gymnasium.spaces.Box(-1, 2, (1,), np.float64), [[0.5], [9.0]], [[0.5], [2.0]]),
    ],
)
def test_actions_arrive_in_the_terms_of_the_environment(space: Any, sent: list[Any], got: list[Any]) -> None:
    made: list[Spaces] = []

    def factory() -> gymnasium.Env[Any, Any]:
        made.append(Spaces(BOX, space))
        return made[-1]

    envs = make_envs(factory, 2)
    floats = isinstance(space, gymnasium.spaces.Box)
    envs.reset(0)
    envs.send(np.array(sent, np.float32 if floats else np.int64), 0)
    for env, expected in zip(made[-2:], got, strict=True):
        assert space.contains(env.actions[0])
        assert np.asarray(env.actions[0]).tolist() == expected


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raise", r"toy:chaos: slot 0, step 3, episode 0: step\(0\) raised RuntimeError: Chaos was told to raise"),
        ("leave", r"toy:chaos: slot 0, step 3, episode 0: step\(0\) raised SystemExit"),
        ("shape", r"slot 0, step 3, .*expected float32 \[4\], got float32 \[3\]"),
        ("dtype", r"slot 0, step 3, .*expected float32 \[4\], got int32 \[4\]"),
        ("nan", r"slot 0, step 3, episode 0: expected finite numbers as observation, got \[nan"),
        ("reward", r"slot 0, step 3, .*expected a number as reward, got NoneType None"),
        ("old_api", r"slot 0, step 3, .*got 4 values; an environment of the old Gym API"),
    ],
)
def test_faults_name_slot_and_step(fault: str, message: str) -> None:
    envs = make_envs("toy:chaos", 2, 1, EnvOptions(kwargs={"fault": fault, "at": 3}))
    envs.reset(0)
    for _ in range(2):
        envs.send(np.zeros(2, np.int64), 0)
        envs.recv(0)
    with pytest.raises(EnvError, match=message):  # noqa: PT012 (NaN shows when the row is received)
        envs.send(np.zeros(2, np.int64), 0)
        envs.recv(0)


@pytest.mark.parametrize("reward", ["1.0", np.ones(1, np.float32), [1.0], 1j], ids=["text", "array", "list", "complex"])
def test_rewards_that_are_no_numbers_are_refused(reward: Any) -> None:
    class Odd(Chaos):
        def step(self, action: Any) -> Any:
            obs, _, *rest = super().step(action)
            return obs, reward, *rest

    envs = make_envs(lambda: Odd("none"), 1)
    envs.reset(0)
    with pytest.raises(EnvError, match=r"slot 0, step 1, episode 0: expected a number as reward, got (str|nd|li|com)"):
        envs.send(np.zeros(1, np.int64), 0)


def ending(terminated: Any, truncated: Any) -> Envs:
    """One environment that ends no episode by itself, but answers as it is told."""

    class Odd(Chaos):
        def step(self, action: Any) -> Any:
            obs, reward, *_, info = super().step(action)
            return obs, reward, terminated, truncated, info

    envs = make_envs(lambda: Odd("none"), 1)
    envs.reset(0)
    return envs


@pytest.mark.parametrize("name", ["terminated", "truncated"])
@pytest.mark.parametrize(
    ("flag", "got"),
    [
        (None, "NoneType None"),
        ("no", "str 'no'"),
        (0.0, "float 0.0"),
        (2, "int 2"),
        (np.int64(-1), r"int64 np.int64\(-1\)"),
        ([False], r"list \[False\]"),
        (np.zeros(1, np.bool_), r"ndarray array\(\[False\]\)"),
        (np.zeros(2, np.bool_), r"ndarray array\(\[False, False\]\)"),
        (np.zeros((), np.float32), r"ndarray array\(0., dtype=float32\)"),
    ],
    ids=["none", "text", "float", "two", "negative", "list", "array", "two_flags", "float_array"],
)
def test_ends_that_are_no_truth_values_are_refused(name: str, flag: Any, got: str) -> None:
    envs = ending(flag, False) if name == "terminated" else ending(False, flag)
    with pytest.raises(EnvError, match=rf"slot 0, step 1, episode 0: expected True or False as {name}, got {got}"):
        envs.send(np.zeros(1, np.int64), 0)


@pytest.mark.parametrize(
    "kind", [bool, int, np.bool_, np.uint8, np.array, torch.tensor], ids=lambda kind: kind.__name__
)
def test_truth_values_of_numpy_and_integers_are_ends(kind: Any) -> None:
    for terminated, truncated in [(True, False), (False, True), (False, False)]:
        envs = ending(kind(terminated), kind(truncated))
        envs.send(np.zeros(1, np.int64), 0)
        row = envs.recv(0)
        assert (row.terminated[0], row.truncated[0], row.ended[0]) == (terminated, truncated, terminated or truncated)


def test_bad_actions_are_refused() -> None:
    envs = make_envs("CartPole-v1", 2)
    envs.reset(0)
    with pytest.raises(ValueError, match=r"CartPole-v1: expected actions \[2\] of integers, got int64 \[3\]"):
        envs.send(np.zeros(3, np.int64), 0)
    with pytest.raises(ValueError, match=r"expected actions in \[0, 2\), got \[0, 2\]"):
        envs.send(np.array([0, 2]), 0)
    pendulum = make_envs("Pendulum-v1", 1)
    pendulum.reset(0)
    with pytest.raises(ValueError, match=r"not a number"):
        pendulum.send(np.full((1, 1), np.nan, np.float32), 0)


class Kept(gymnasium.Env[Any, Any]):
    """Remembers, in the class, how many were opened and closed; after one look and slots 0 and 1, slot 2 may fail."""

    action_space = gymnasium.spaces.Discrete(2)
    opened = closed = 0

    def __init__(self, last: str) -> None:
        if last == "raises" and Kept.opened == 3:
            raise OSError("no display")
        self.observation_space = BOX
        if last == "differs" and Kept.opened == 3:
            self.observation_space = gymnasium.spaces.Discrete(2)
        if last == "text":
            self.observation_space = gymnasium.spaces.Text(3)
        Kept.opened += 1

    def close(self) -> None:
        Kept.closed += 1


@pytest.mark.parametrize(
    ("last", "lanes", "opened", "message"),
    [
        ("raises", 1, 3, "making the environment of slot 2 failed: OSError: no display"),
        ("differs", 1, 4, "slot 2 has spaces"),
        ("text", 1, 2, "Text"),
        ("fine", 2, 2, "lanes must divide num_envs"),
    ],
)
def test_construction_that_fails_closes_what_it_made(last: str, lanes: int, opened: int, message: str) -> None:
    Kept.opened = Kept.closed = 0
    with pytest.raises((EnvError, ValueError), match=message):
        make_envs(lambda: Kept(last), 3, lanes)
    assert (Kept.opened, Kept.closed) == (opened, opened)


@pytest.mark.parametrize(("last", "lanes", "message"), [("text", 1, "Text"), ("fine", 2, "lanes must divide num_envs")])
def test_worker_environments_close_the_one_they_looked_at(last: str, lanes: int, message: str) -> None:
    Kept.opened = Kept.closed = 0
    with pytest.raises(ValueError, match=message):
        make_envs(lambda: Kept(last), 3, lanes, workers=1)
    assert (Kept.opened, Kept.closed) == (2, 2)


class Sticking(Chaos):
    """Can't be closed, in one of two ways; counts, in the class, how often that was tried."""

    tried = 0

    def __init__(self, error: type[BaseException] = RuntimeError) -> None:
        super().__init__("none")
        self._error = error

    def close(self) -> None:
        Sticking.tried += 1
        raise self._error("it sticks")


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_a_close_that_raises_is_a_line_in_the_log(
    error: type[BaseException], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    envs = make_envs(lambda: Sticking(error), 3, first_slot=4)
    caplog.clear()
    monkeypatch.setattr(Sticking, "tried", 0)
    envs.close()
    assert Sticking.tried == 3
    said = f"close of slot 4 raised {error.__name__}: it sticks (so did those of 2 others)"
    assert [message.partition(": ")[2] for message in caplog.messages] == [said]


def test_a_close_that_raises_in_a_worker_is_a_line_in_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    make_envs(Sticking, 3, workers=1).close()
    (said,) = capfd.readouterr().err.splitlines()  # of the worker; what the driver says is in its own log
    assert said == "Sticking: close of slot 0 raised RuntimeError: it sticks (so did those of 2 others)"


def test_a_close_that_raises_does_not_hide_why_environments_could_not_be_made() -> None:
    made = iter([Sticking, Sticking, Sticking])
    with pytest.raises(EnvError, match="making the environment of slot 2 failed: StopIteration"):
        make_envs(lambda: next(made)(), 3)


def test_close_twice() -> None:
    envs = make_envs("CartPole-v1", 2)
    envs.close()
    envs.close()
