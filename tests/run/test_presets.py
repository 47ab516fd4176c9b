from __future__ import annotations

import dataclasses

import pytest

from slipstream.algos import A2C, ALGORITHMS, C51, DQN, IMPALA, PPO, Rainbow
from slipstream.envs import AtariOptions
from slipstream.envs.options import PROTOCOLS
from slipstream.run import presets, typed
from slipstream.run.config import Config, ConfigError, override
from slipstream.run.preset_table import PRESETS

FAMILIES = ["atari", "gfootball", "classic", "mujoco", "box2d", "toy", "other"]


@pytest.mark.parametrize("key", sorted(PRESETS))
def test_every_preset_is_a_valid_configuration(key: tuple[str, str]) -> None:
    algo, _ = key
    config = override(Config(env="x", algo=ALGORITHMS[algo]()), PRESETS[key])
    assert config.algo.name == algo


DISCRETE_ONLY, CONTINUOUS_ONLY = ("dqn", "c51", "qrdqn", "rainbow", "r2d2"), ("sac", "td3", "ddpg")


@pytest.mark.parametrize("algo", sorted(ALGORITHMS))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_preset_for_every_algorithm(algo: str, family: str) -> None:
    """But for those that can't act there: all actions are continuous, or none are."""
    impossible = {"mujoco": DISCRETE_ONLY, "atari": CONTINUOUS_ONLY, "gfootball": CONTINUOUS_ONLY}
    assert ((algo, family) in PRESETS) == (algo not in impossible.get(family, ()))


@pytest.mark.parametrize(
    ("env", "family"),
    [
        ("ALE/Pong-v5", "atari"),
        ("PongNoFrameskip-v4", "atari"),
        ("CartPole-v1", "classic"),
        ("HalfCheetah-v5", "mujoco"),
        ("envpool:gfootball/academy_empty_goal_close-v1", "gfootball"),
        ("envpool:Pong-v5", "atari"),
        ("LunarLander-v3", "box2d"),
        ("toy:catch", "toy"),
        ("vector:CartPole-v1", "classic"),
        ("callable:make", "other"),
    ],
)
def test_family(env: str, family: str) -> None:
    assert presets.family(env) == family


def test_a_vector_environment_has_the_preset_of_its_environments() -> None:
    for algo in ("ppo", "c51"):
        assert presets.preset(algo, "vector:CartPole-v1") == presets.preset(algo, "CartPole-v1")


def test_flags_win_over_the_id_and_the_id_over_its_family() -> None:
    general, exact = PRESETS["ppo", "classic"], PRESETS["ppo", "Acrobot-v1"]
    config = presets.configure("ppo", "Acrobot-v1", {"algo.gamma": 0.5})
    assert isinstance(config.algo, PPO)
    assert config.algo.gamma == 0.5
    assert config.algo.gae_lambda == exact["algo.gae_lambda"] != general["algo.gae_lambda"]
    assert config.algo.clip_range == general["algo.clip_range"]
    assert presets.configure("ppo", "CartPole-v1").algo.epochs == general["algo.epochs"]


@pytest.mark.parametrize("env", ["ALE/Pong-v5", "envpool:Pong-v5"])
def test_an_atari_protocol_is_written_out(env: str) -> None:
    options = presets.configure("ppo", env, {"env_options.atari.protocol": "ale_v5"}).env_options.atari
    assert None not in dataclasses.astuple(options)
    assert (options.sticky_actions, options.life_loss, options.frame_skip) == (0.25, False, 4)
    assert options.spelled_out() == PROTOCOLS["ale_v5"]
    other = presets.configure("ppo", env, {"env_options.atari.noop_max": 7}).env_options.atari
    assert other.spelled_out() == dataclasses.replace(PROTOCOLS["v4"], noop_max=7)


def test_what_is_not_atari_has_no_protocol() -> None:
    assert presets.configure("ppo", "CartPole-v1").env_options.atari == AtariOptions()


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting algo\.gama\. Did you mean algo\.gamma\?"):
        presets.configure("ppo", "CartPole-v1", {"algo.gama": 0.5})


def test_names_of_other_libraries_are_understood() -> None:
    config = presets.configure("ppo", "CartPole-v1", {"n_envs": 4, "learning_rate": 0.25})
    assert (config.num_envs, config.algo.lr) == (4, 0.25)
    config = presets.configure("dqn", "CartPole-v1", {"buffer_size": 5_000, "learning_starts": 7, "end_e": 0.25})
    assert isinstance(config.algo, DQN)
    assert (config.algo.replay.capacity, config.algo.replay.learning_starts) == (5_000, 7)
    assert config.algo.exploration.final == 0.25


@pytest.mark.parametrize("env", ["PongNoFrameskip-v4", "envpool:Pong-v5"])
def test_a_game_has_its_preset_under_all_its_ids(env: str) -> None:
    assert presets.preset("ppo", env) == presets.preset("ppo", "ALE/Pong-v5")
    assert presets.preset("ppo", env.replace("Pong", "Breakout")) == PRESETS["ppo", "atari"]


def test_a_system_is_a_setting_like_any_other_and_flags_win_over_it() -> None:
    config = presets.configure("ppo", "CartPole-v1", {"system": "hts", "num_envs": 12})
    assert (config.schedule, config.lanes, config.num_envs) == ("concurrent", 4, 12)
    assert presets.configure("ppo", "CartPole-v1", {"system": "hts", "lanes": 2}).lanes == 2
    with pytest.raises(ConfigError, match="unknown system 'htz'"):
        presets.configure("ppo", "CartPole-v1", {"system": "htz"})


def test_paac_has_its_own_update_on_the_games_it_was_published_with() -> None:
    """Clemente et al., 2017: 32 environments, 0.0007 for each, RMSProp with an epsilon of 0.1, norm 40."""
    config = presets.configure("a2c", "ALE/Pong-v5", {"system": "paac"})
    algo = config.algo
    assert isinstance(algo, A2C)
    assert (config.schedule, config.lanes, config.num_envs, config.unroll, config.net.init) == (
        "sync",
        1,
        32,
        5,
        "paac",
    )
    assert (algo.lr, algo.lr_scaling, algo.eps, algo.max_grad_norm, algo.ent_coef) == (
        7e-4,
        "num_envs",
        0.1,
        40.0,
        0.01,
    )
    flags = typed.configuration("a2c", {}, {"env": "ALE/Pong-v5", "algo.ent_coef": 0.02}, "paac").algo
    assert isinstance(flags, A2C)
    assert (flags.eps, flags.ent_coef) == (0.1, 0.02)
    assert presets.configure("a2c", "CartPole-v1", {"system": "paac"}).num_envs == 8


def test_the_epsilon_rainbow_of_accelerated_methods() -> None:
    config = presets.configure("rainbow", "ALE/Pong-v5", {"system": "alternating"})
    algo = config.algo
    assert isinstance(algo, Rainbow)
    assert (config.schedule, config.lanes) == ("sync", 2)
    assert not algo.noisy
    assert algo.optimizer_eps == pytest.approx(0.005 / 512)
    assert algo.replay.ratio * algo.batch_size == 8
    assert (algo.v_min, algo.v_max, algo.exploration.steps) == (-10.0, 10.0, 62_500)


def test_impala_has_the_papers_update_by_the_name_of_the_system() -> None:
    """Espeholt et al., 2018: RMSProp with an epsilon of 0.01, sums over 32 unrolls of 20 rows, norm 40."""
    config = presets.configure("impala", "ALE/Pong-v5", {"system": "impala"})
    algo = config.algo
    assert isinstance(algo, IMPALA)
    assert (config.schedule, config.lanes, config.num_envs, config.unroll) == ("async", 4, 32, 20)
    assert (algo.optimizer, algo.eps, algo.lr, algo.anneal_lr) == ("rmsprop_tf", 0.01, 6e-4, True)
    assert (algo.gae_lambda, algo.ent_coef, algo.vf_coef) == (1.0, 0.01, 0.5)
    assert (algo.loss_scale, algo.max_grad_norm) == (32 * 20, 40.0)
    preset = presets.configure("impala", "ALE/Pong-v5").algo
    assert isinstance(preset, IMPALA)
    assert preset.optimizer == "adam"


@pytest.mark.parametrize("algo", ["c51", "rainbow"])
@pytest.mark.parametrize(
    ("env", "least", "most"),  # discounted returns, of who falls and breaks the rules once at most
    [
        ("CartPole-v1", 0.0, 50.0),
        ("Acrobot-v1", -50.0, 0.0),
        ("MountainCar-v0", -50.0, 0.0),
        ("CliffWalking-v1", -100.0, 0.0),
        ("Taxi-v4", -50.0, 20.0),
        ("toy:catch", -1.0, 1.0),
    ],
)
def test_atoms_hold_the_returns(algo: str, env: str, least: float, most: float) -> None:
    rule = presets.configure(algo, env).algo
    assert isinstance(rule, C51 | Rainbow)
    assert rule.v_min <= least
    assert rule.v_max >= most


def test_one_setting_by_two_names_must_have_one_value() -> None:
    assert presets.configure("ppo", "CartPole-v1", {"lr": 0.1, "algo.lr": 0.1}).algo.lr == 0.1
    with pytest.raises(ConfigError, match=r"algo\.lr is given twice, as 0\.1 and, by the name lr, as 0\.2"):
        presets.configure("ppo", "CartPole-v1", {"algo.lr": 0.1, "lr": 0.2})


@pytest.mark.parametrize(("total", "every"), [(500, 1_000), (20_000, 2_000), (100_000, 10_000), (10**7, 50_000)])
def test_short_runs_have_checkpoints_too(total: int, every: int) -> None:
    assert presets.configure("ppo", "CartPole-v1", {"total_steps": total}).log.checkpoint_every == every
    assert (
        presets.configure("ppo", "CartPole-v1", {"total_steps": total, "log.checkpoint_every": 7}).log.checkpoint_every
        == 7
    )
