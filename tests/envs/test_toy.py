"""Toys: their optima, and that the obvious policies get what the docstrings say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check

from slipstream.envs.toy import LQR, TOYS, Bandit, Catch, Chain, Recall


def returns(env: gymnasium.Env[Any, Any], policy: Callable[[Any], Any], episodes: int) -> list[float]:
    totals: list[float] = []
    for episode in range(episodes):
        obs, _ = env.reset(seed=episode)
        total, over = 0.0, False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(policy(obs))
            total, over = total + float(reward), terminated or truncated
        totals.append(total)
    return totals


@pytest.mark.parametrize("name", sorted(set(TOYS) - {"chaos", "counter"}))
@pytest.mark.filterwarnings("ignore:.*WARN.*:UserWarning")
def test_toys_keep_the_contract_of_gymnasium(name: str) -> None:
    gymnasium_check(TOYS[name](), skip_render_check=True)


def test_catch() -> None:
    def follow(board: Any) -> int:
        ball = int(board[:-1].sum(0).argmax()) if board[:-1].any() else int(board[-1].argmax())
        return int(np.sign(ball - int(board[-1].argmax()))) + 1

    assert set(returns(Catch(), follow, 20)) == {Catch.optimal_return}
    random = np.random.default_rng(0)
    assert np.mean(returns(Catch(), lambda _: random.integers(3), 400)) < -0.4


def test_chain() -> None:
    assert returns(Chain(), lambda _: 1, 1) == [Chain.optimal_return]
    assert returns(Chain(), lambda _: 0, 1) == [0.1]
    turns = iter([1, 0] * 100)
    assert returns(Chain(), lambda _: next(turns), 1) == [0.0]


def test_bandit() -> None:
    assert [returns(Bandit(), lambda _, arm=arm: arm, 1)[0] for arm in range(5)] == [0, 0.25, 0.5, 0.75, 1.0]


def test_lqr() -> None:
    env = LQR()
    gain = (np.sqrt(5) - 1) / 2
    best = np.mean(returns(env, lambda obs: -gain * obs, 3000))
    idle = np.mean(returns(env, lambda obs: 0 * obs, 3000))
    assert best == pytest.approx(env.optimal_return, abs=0.02)
    assert idle == pytest.approx(-11 / 3, abs=0.15)
    for other in (0.4, 0.9):
        assert np.mean(returns(env, lambda obs, k=other: -k * obs, 3000)) < best


@pytest.mark.parametrize(("cues", "delay"), [(2, 3), (3, 5)])
def test_recall_needs_memory(cues: int, delay: int) -> None:
    env = Recall(cues, delay)
    memory: list[int] = []

    def remember(obs: Any) -> int:
        if obs[:-1].any():
            memory[:] = [int(obs.argmax())]
        return memory[0]

    assert set(returns(env, remember, 20)) == {Recall.optimal_return}
    # When it counts, the observation is always the same: whatever a policy without memory does, the cue is unknown.
    asked = {tuple(_asked(env, seed)) for seed in range(20)}
    assert len(asked) == 1
    assert np.mean(returns(env, lambda _: 0, 600)) == pytest.approx(2 / cues - 1, abs=0.1)


def _asked(env: Recall, seed: int) -> Any:
    obs, _ = env.reset(seed=seed)
    while not obs[-1]:
        obs, *_ = env.step(np.int64(0))
    return obs
