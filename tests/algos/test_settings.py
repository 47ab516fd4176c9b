"""Hyperparameters out of range are refused where they are set, by the key that the user types."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from slipstream.algos import A2C, APPO, C51, IMPALA, PPO, SAC, Rainbow
from slipstream.nets.trunk import Network
from slipstream.replay.options import ReplayOptions, UnrollReplay

SHARED = [
    ("lr", -1.0, "algo.lr must be at least 0, got -1.0"),
    ("lr", math.nan, "algo.lr must be at least 0, got nan"),
    ("gamma", 1.5, "algo.gamma must be between 0 and 1, got 1.5"),
    ("gamma", -0.1, "algo.gamma must be between 0 and 1, got -0.1"),
    ("gae_lambda", 1.01, "algo.gae_lambda must be between 0 and 1, got 1.01"),
    ("ent_coef", -0.01, "algo.ent_coef must be at least 0, got -0.01"),
    ("vf_coef", -0.5, "algo.vf_coef must be at least 0, got -0.5"),
    ("max_grad_norm", 0.0, "algo.max_grad_norm must be above 0, got 0.0"),
    ("eps", -1e-5, "algo.eps must be at least 0, got -1e-05"),
]


@pytest.mark.parametrize("algorithm", [A2C(), APPO(), IMPALA(), PPO()], ids=["a2c", "appo", "impala", "ppo"])
@pytest.mark.parametrize(("name", "value", "message"), SHARED)
def test_shared_ranges(algorithm: A2C | APPO | IMPALA | PPO, name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        replace(algorithm, **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs", 0, "algo.epochs must be at least 1, got 0"),
        ("batch_size", -128, "algo.batch_size must be at least 1, got -128"),
        ("clip_range", 0.0, "algo.clip_range must be above 0, got 0.0"),
        ("clip_range_vf", -0.2, "algo.clip_range_vf must be at least 0, got -0.2"),
        ("target_kl", -0.01, "algo.target_kl must be at least 0, got -0.01"),
    ],
)
def test_ranges_of_ppo(name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        replace(PPO(), **{name: value})


VTRACE = [
    ("rho_bar", 0.0, "algo.rho_bar must be above 0, got 0.0"),
    ("c_bar", -1.0, "algo.c_bar must be above 0, got -1.0"),
    ("rho_pg_bar", math.nan, "algo.rho_pg_bar must be above 0, got nan"),
]


@pytest.mark.parametrize("algorithm", [APPO(), IMPALA()], ids=["appo", "impala"])
@pytest.mark.parametrize(("name", "value", "message"), VTRACE)
def test_ranges_of_vtrace(algorithm: APPO | IMPALA, name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        replace(algorithm, **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs", 0, "algo.epochs must be at least 1, got 0"),
        ("batch_size", 0, "algo.batch_size must be at least 1, got 0"),
        ("target_period", 0, "algo.target_period must be at least 1, got 0"),
        ("ratio_cap", 0.5, "algo.ratio_cap must be at least 1, got 0.5"),
        ("kl_coef", -0.1, "algo.kl_coef must be at least 0, got -0.1"),
        ("clip_range", 0.0, "algo.clip_range must be above 0, got 0.0"),
    ],
)
def test_ranges_of_appo(name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        replace(APPO(), **{name: value})


def test_ranges_of_impala() -> None:
    with pytest.raises(ValueError, match=r"^algo\.loss_scale must be above 0, got 0\.0$"):
        IMPALA(loss_scale=0.0)


def test_ranges_of_a2c() -> None:
    with pytest.raises(ValueError, match=r"^algo\.loss_scale must be above 0, got -5\.0$"):
        A2C(loss_scale=-5.0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden", (64, 0), "net.hidden must be sizes of at least 1, got (64, 0)"),
        ("core_size", 0, "net.core_size must be at least 1, got 0"),
        ("log_std_init", math.inf, "net.log_std_init must be a finite number, got inf"),
    ],
)
def test_ranges_of_the_network(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        replace(Network(), **{name: value})


@pytest.mark.parametrize("algorithm", [C51(), Rainbow()], ids=["c51", "rainbow"])
@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (1.0, 1.0, "algo.v_min=1.0 must be below algo.v_max=1.0"),
        (math.nan, 1.0, "algo.v_min must be a finite number, got nan"),
        (0.0, math.inf, "algo.v_max must be a finite number, got inf"),
    ],
)
def test_ranges_of_atoms(algorithm: C51 | Rainbow, low: float, high: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        replace(algorithm, v_min=low, v_max=high)


def test_a_target_entropy_and_a_ratio_are_finite() -> None:
    with pytest.raises(ValueError, match=r"^algo\.target_entropy must be a finite number, got -inf$"):
        SAC(target_entropy=-math.inf)
    with pytest.raises(ValueError, match=r"^algo\.replay\.ratio must be a finite number, got inf$"):
        ReplayOptions(ratio=math.inf)


@pytest.mark.parametrize("name", ["proportion", "clone_policy", "clone_value"])
@pytest.mark.parametrize(
    ("value", "message"),
    [(-1.0, "must be at least 0, got -1.0"), (math.inf, "must be a finite number, got inf")],
)
def test_ranges_of_the_replay_of_unrolls(name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'algo.replay.{name} {message}')}$"):
        replace(UnrollReplay(proportion=1.0), **{name: value})


def test_the_ends_of_the_ranges_are_allowed() -> None:
    UnrollReplay(proportion=0.0, trust_region=math.inf)
    PPO(lr=0.0, gamma=1.0, gae_lambda=0.0, epochs=1, batch_size=1, ent_coef=0.0, vf_coef=0.0, max_grad_norm=math.inf)
    A2C(lr=0.0, gamma=0.0, gae_lambda=1.0, eps=0.0)
    Network(hidden=(1,), core_size=1)
