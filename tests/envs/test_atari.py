"""ALE's vector environment: threads, seeds, lives, time limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from slipstream.envs import AtariOptions, EnvOptions, make_envs
from slipstream.envs.atari import atari_game
from slipstream.envs.slot import random_start

from .playing import Played, assert_equal, assert_rule, play

# A seed with which slot 0 draws no step and slot 1 draws one, out of [0, 1].
ZERO_AND_ONE = next(seed for seed in range(99) if [random_start(seed, slot, 1)[0] for slot in (0, 1)] == [0, 1])


def options(decorrelate_steps: int = 0, **atari: Any) -> EnvOptions:
    return EnvOptions(AtariOptions(**atari), decorrelate_steps=decorrelate_steps)


def pong(lanes: int = 1, threads: int = 1, seed: int = 5, steps: int = 41, **choices: Any) -> Played:
    return play(make_envs("ALE/Pong-v5", 4, lanes, options(**choices), threads=threads), steps, seed)


def test_threads_and_lanes_change_no_bit() -> None:
    one = pong(sticky_actions=0.25)
    assert_equal(pong(lanes=2, threads=2, sticky_actions=0.25), one)
    assert_equal(pong(lanes=4, threads=3, sticky_actions=0.25), one)


def test_seed_decides_and_slots_differ() -> None:
    one, other = pong(), pong(seed=6)
    assert (one.obs[-1] != other.obs[-1]).any()
    assert len({one.obs[:, slot].tobytes() for slot in range(4)}) == 4


def test_reset_starts_over_and_drops_what_was_due() -> None:
    envs = make_envs("ALE/Breakout-v5", 2)
    first = play(envs, 13, close=False)
    envs.send(np.zeros(2, np.int64), 0)
    assert_equal(play(envs, 13), first)


def test_observations_and_spec() -> None:
    envs = make_envs("ALE/Pong-v5", 2, 1, options(grayscale=False, screen_size=21, frame_stack=3, full_action_set=True))
    assert envs.spec.observation_space.shape == (3, 21, 21, 3)
    assert envs.spec.action_space.n == 18
    assert (envs.spec.frames_per_step, envs.spec.family, envs.spec.deterministic) == (4, "atari", True)
    played = play(envs, 7)
    assert played.obs.dtype == np.uint8
    assert (played.obs[1, :, :2] == played.obs[0, :, 1:]).all()  # a stack moves by one frame per step
    assert (played.obs[0, :, :2] == 0).all()


def test_frames_per_step_follows_the_frame_skip() -> None:
    assert make_envs("ALE/Pong-v5", 1, 1, options(frame_skip=2)).spec.frames_per_step == 2


@pytest.mark.parametrize("life_loss", [True, False])
def test_a_lost_life_terminates_the_target_only(life_loss: bool) -> None:
    played = play(make_envs("ALE/Breakout-v5", 6, 2, options(life_loss=life_loss)), 401)
    assert_rule(played, life_loss)
    lost = played.terminated & ~played.ended
    over = played.ended.sum()
    assert over >= 3
    assert not played.truncated.any()
    if life_loss:
        # Five lives: four losses that go on before each game over, and some of the games still running.
        assert 4 * over <= lost.sum() <= 4 * (over + 6)
        assert not (lost[:-1] & played.ended[1:]).any()
    else:
        assert not lost.any()


def test_life_loss_changes_nothing_but_the_flag() -> None:
    with_flag, without = (
        play(make_envs("ALE/Breakout-v5", 3, 1, options(life_loss=flag)), 301) for flag in (True, False)
    )
    assert (with_flag.obs == without.obs).all()
    assert (with_flag.reward == without.reward).all()
    assert (with_flag.ended == without.ended).all()
    assert (with_flag.terminated != without.terminated).any()


def test_the_frame_limit_truncates() -> None:
    played = pong(max_frames=88, steps=71)
    assert_rule(played)
    assert not played.terminated.any()
    assert np.flatnonzero(played.ended[:, 0]).tolist() == [22, 45, 68]
    steps = play(make_envs("ALE/Pong-v5", 2, 1, EnvOptions(max_episode_steps=22)), 47)
    assert np.flatnonzero(steps.truncated[:, 1]).tolist() == [22, 45]


def test_rewards_are_raw() -> None:
    played = play(make_envs("ALE/MsPacman-v5", 2), 141)
    assert set(np.unique(played.reward)) >= {0.0, 10.0}
    assert played.reward.dtype == np.float32


def test_noop_starts_are_random_and_can_be_switched_off() -> None:
    def starts(noop_max: int) -> int:
        played = play(make_envs("ALE/Breakout-v5", 6, 1, options(noop_max=noop_max, fire_on_reset=True)), 3)
        return len({played.obs[0, slot].tobytes() for slot in range(6)})

    assert starts(30) > 1
    assert starts(0) == 1


def test_decorrelation_is_keyed_and_starts_alive() -> None:
    def run(lanes: int, threads: int) -> Played:
        chosen = options(decorrelate_steps=37, max_frames=48)
        return play(make_envs("ALE/Pong-v5", 4, lanes, chosen, threads=threads), 17)

    one = run(1, 1)
    assert_equal(run(4, 2), one)
    first_ends = [int(np.flatnonzero(one.ended[:, slot])[0]) for slot in range(4)]
    assert len(set(first_ends)) > 1
    assert min(first_ends) >= 1
    assert max(first_ends) <= 12
    assert_rule(one)


def test_decorrelation_of_zero_steps_is_a_plain_start() -> None:
    plain = play(make_envs("ALE/Pong-v5", 2), 7, seed=ZERO_AND_ONE)
    spread = play(make_envs("ALE/Pong-v5", 2, 1, options(decorrelate_steps=1)), 7, seed=ZERO_AND_ONE)
    assert (spread.obs[0, 0] == plain.obs[0, 0]).all()
    assert (spread.obs[0, 1] != plain.obs[0, 1]).any()


def test_bad_actions_never_reach_the_emulator() -> None:
    envs = make_envs("ALE/Pong-v5", 2)
    envs.reset(0)
    with pytest.raises(ValueError, match=r"ALE/Pong-v5: expected actions in \[0, 6\), got \[6, 0\]"):
        envs.send(np.array([6, 0]), 0)
    envs.close()
    envs.close()


@pytest.mark.parametrize(
    ("id", "game"),
    [
        ("ALE/MsPacman-v5", "ms_pacman"),
        ("BreakoutNoFrameskip-v4", "breakout"),
        ("CartPole-v1", None),
        ("Pong-v4", None),
        ("ALE/Nothing-v5", None),
    ],
)
def test_roms_behind_ids(id: str, game: str | None) -> None:
    assert atari_game(id) == game
