from __future__ import annotations

from dataclasses import dataclass

import pytest

from slipstream.run import flags
from slipstream.run.config import known_settings
from slipstream.run.names import aliases
from slipstream.run.options import BenchFlags
from slipstream.run.presets import configure
from slipstream.run.settings import ConfigError
from slipstream.run.typed import settings_and


@dataclass(frozen=True)
class Options:
    run: str
    episodes: int = 30
    greedy: bool = False


def test_flags_stand_anywhere_among_the_positional_arguments() -> None:
    for words in (
        ["RUN", "--episodes", "7", "--greedy"],
        ["--greedy", "RUN", "--episodes=7"],
        ["--episodes", "7", "--greedy", "RUN"],
    ):
        assert flags.parse(Options, words, "eval") == Options("RUN", 7, True)
    assert flags.parse(Options, ["RUN", "--no-greedy"], "eval") == Options("RUN")
    assert flags.parse(Options, ["RUN", "--greedy", "false"], "eval") == Options("RUN")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "RUN is missing: type slipstream eval RUN"),
        (["a", "b"], "unexpected argument 'b'; see slipstream eval --help"),
        (["a", "--episode", "3"], "unknown flag --episode. Did you mean --episodes?"),
        (["a", "--episodes"], "--episodes needs a value"),
        (["a", "--episodes", "--greedy"], "--episodes needs a value"),
        (["a", "--episodes", "x"], "episodes: expected a whole number (such as 128 or 2e6), got 'x'"),
    ],
)
def test_parse_says_what_is_wrong(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        flags.parse(Options, words, "eval")
    assert str(caught.value) == message


def test_settings_of_a_run() -> None:
    known = known_settings("ppo")
    words = [
        "--env",
        "X",
        "--net.hidden",
        "32",
        "16",
        "--seed=-3",
        "--algo.no-anneal-lr",
        "--env-options.kwargs.gravity",
        "9.5",
    ]
    positional, values = flags.split(words, known, aliases(known))
    assert positional == []
    assert values == {
        "env": "X",
        "net.hidden": "32 16",
        "seed": "-3",
        "algo.anneal_lr": "false",
        "env_options.kwargs.gravity": 9.5,
    }


@pytest.mark.parametrize("flag", ["--no-algo.anneal-lr", "--algo.no-anneal-lr"])
def test_a_switch_is_off_with_no_before_the_group_or_the_name(flag: str) -> None:
    assert flags.split([flag], {"algo.anneal_lr": bool}) == ([], {"algo.anneal_lr": "false"})


@pytest.mark.parametrize(
    ("flag", "key"),
    [
        ("--total-timesteps", "total_steps"),
        ("--n-envs", "num_envs"),
        ("--num-steps", "unroll"),
        ("--env-id", "env"),
        ("--learning-rate", "algo.lr"),
        ("--gamma", "algo.gamma"),
        ("--clip-coef", "algo.clip_range"),
        ("--algo.n-epochs", "algo.epochs"),
    ],
)
def test_names_of_other_libraries(flag: str, key: str) -> None:
    assert flags.split([flag, "1"], (known := known_settings("ppo")), aliases(known))[1] == {key: "1"}


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("--algo.lrr", "--algo.lr"),
        ("--lrr", "--algo.lr"),
        ("--totl-steps", "--total-steps"),
        ("--worker", "--placement.workers"),
        ("--learner", "--learners"),
        ("--total-timestep", "--total-timesteps"),
        ("--learning-rte", "--learning-rate"),
    ],
)
def test_unknown_flag_names_the_nearest(flag: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        flags.split([flag, "1"], (known := known_settings("ppo")), aliases(known))
    assert str(caught.value) == f"unknown flag {flag}. Did you mean {nearest}?"


@pytest.mark.parametrize(
    ("algo", "key"), [("ppo", "unroll"), ("a2c", "unroll"), ("dqn", "algo.n_step"), ("sac", "algo.n_step")]
)
def test_n_steps_is_what_stable_baselines_calls_so(algo: str, key: str) -> None:
    known = known_settings(algo)
    assert flags.split(["--n-steps", "3"], known, aliases(known))[1] == {key: "3"}


def test_one_name_for_two_settings_of_several_algorithms_is_refused() -> None:
    for flag in ("--n-steps", "--n_steps=3"):
        with pytest.raises(ConfigError) as caught:
            settings_and(BenchFlags, "bench", ["ppo", "dqn"], [flag, "3"])
        assert str(caught.value) == (
            f"{flag.partition('=')[0]} is --unroll of ppo and --algo.n-step of dqn; type which of them you mean, or "
            "the algorithms apart"
        )
    assert settings_and(BenchFlags, "bench", ["ppo", "a2c"], ["--n-steps", "3"])[1] == {"unroll": "3"}


@pytest.mark.parametrize(
    ("algo", "flag", "key"),
    [
        ("dqn", "--gradient-steps", "algo.replay.ratio"),
        ("td3", "--train-freq", "algo.replay.ratio"),
        ("dqn", "--algo.exploration-fraction", "algo.exploration.steps"),
        ("sac", "--ent-coef", "algo.alpha"),
        ("ppo", "--num-minibatches", "algo.batch_size"),
    ],
)
def test_what_is_counted_otherwise_is_explained(algo: str, flag: str, key: str) -> None:
    known = known_settings(algo)
    assert key in known
    with pytest.raises(ConfigError) as caught:
        flags.split([flag, "1"], known, aliases(known))
    assert str(caught.value).startswith(f"unknown flag {flag}. {key} is ")
    with pytest.raises(ConfigError, match=rf"unknown setting {flag.strip('-').replace('-', '_')}\. {key} is "):
        configure(algo, "CartPole-v1", {flag.strip("-"): 1})


def test_nothing_is_explained_by_what_an_algorithm_lacks() -> None:
    for algo, flag in (("ppo", "--gradient-steps"), ("dqn", "--num-minibatches"), ("a2c", "--num-minibatches")):
        known = known_settings(algo)
        with pytest.raises(ConfigError, match=rf"unknown flag {flag}\.(?! algo)"):
            flags.split([flag, "1"], known, aliases(known))


def test_a_flag_of_another_algorithm_is_unknown() -> None:
    with pytest.raises(ConfigError, match=r"unknown flag --clip-range\."):
        flags.split(["--clip-range", "1"], (known := known_settings("a2c")), aliases(known))


def test_two_names_of_a_setting_have_one_value_and_the_last_of_one_name_counts() -> None:
    known = known_settings("ppo")
    with pytest.raises(ConfigError, match=r"^--lr 1e-3 and --learning-rate 1e-4 are the same setting; leave one out$"):
        flags.split(["--lr", "1e-3", "--learning-rate", "1e-4"], known, aliases(known))
    same = ["--lr", "1e-3", "--algo.lr=1e-3", "--num-envs", "3", "--num_envs", "4"]
    assert flags.split(same, known, aliases(known))[1] == {"algo.lr": "1e-3", "num_envs": "4"}
