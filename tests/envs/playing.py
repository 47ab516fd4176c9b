"""Playing environments in tests: the same actions per slot, whatever the lanes and their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream import dice, tree
from slipstream.envs import spaces
from slipstream.tree import Tree
from slipstream.types import Envs


@dataclass(frozen=True)
class Played:
    """Rows `[T+1, N, ...]` of all slots; row 0 is the reset."""

    obs: Tree
    reward: NDArray[np.float32]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    ended: NDArray[np.bool_]

    def fields(self) -> list[tuple[str, NDArray[Any]]]:
        flags = [("terminated", self.terminated), ("truncated", self.truncated), ("ended", self.ended)]
        return [*tree.items(self.obs, "obs"), ("reward", self.reward), *flags]


def random_actions(envs: Envs, steps: int) -> NDArray[Any]:
    """Actions `[T, N, *A]`: those of a slot depend on the slot alone."""
    actions = spaces.Actions(envs.spec.action_space, 1, "test")
    columns: list[NDArray[Any]] = []
    for slot in range(envs.spec.first_slot, envs.spec.first_slot + envs.spec.num_envs):
        generator = np.random.Generator(np.random.Philox(dice.seed_sequence(7, "test", slot)))
        columns.append(np.stack([actions.sample(generator) for _ in range(steps)]))
    return np.stack(columns, axis=1)


def play(envs: Envs, steps: int, seed: int = 5, backwards: bool = False, close: bool = True) -> Played:
    """Resets and plays; lanes take turns, in reverse order if `backwards`."""
    try:
        actions = random_actions(envs, steps)
        lanes = range(envs.spec.lanes)
        order = list(reversed(lanes)) if backwards else list(lanes)
        envs.reset(seed)
        rows = [_row(envs)]
        for action in actions:
            for lane in order:
                envs.send(action[envs.spec.columns(lane)], lane)
            rows.append(_row(envs))
    finally:
        if close:
            envs.close()
    return _stack(rows)


def play_ready(envs: Envs, steps: int, seed: int = 5) -> Played:
    """As `play`, with every lane at its own row: whichever `wait` names goes on."""
    try:
        actions = random_actions(envs, steps)
        spec = envs.spec
        envs.reset(seed)
        lanes: list[list[Any]] = [[] for _ in range(spec.lanes)]
        while under_way := [lane for lane in range(spec.lanes) if len(lanes[lane]) <= steps]:
            ready = envs.wait(under_way)
            assert ready
            assert set(ready) <= set(under_way)
            for lane in ready:
                lanes[lane].append(tree.map(np.copy, tuple(envs.recv(lane)[:5])))
                if len(lanes[lane]) <= steps:
                    part = slice(lane * spec.lane_size, (lane + 1) * spec.lane_size)
                    envs.send(actions[len(lanes[lane]) - 1, part], lane)
    finally:
        envs.close()
    return _stack([_side_by_side(parts) for parts in zip(*lanes, strict=True)])


def assert_equal(one: Played, other: Played) -> None:
    """Same structure, dtypes and bits; the message names the first difference."""
    for (name, a), (other_name, b) in zip(one.fields(), other.fields(), strict=True):
        assert name == other_name
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        where = np.argwhere(a != b)
        assert not len(where), f"{name} differs first at row, slot, ... {where[0].tolist()}"


def assert_rule(played: Played, life_loss: bool = False) -> None:
    """Dead rows hold a reset: no reward, no flag; `ended` is `terminated | truncated` but for lost lives."""
    dead = played.ended[:-1]
    assert dead.any()
    for flag in (played.reward, played.terminated, played.truncated, played.ended):
        assert not flag[1:][dead].any()
    either = played.terminated | played.truncated
    if life_loss:
        assert (played.ended <= either).all()
        assert (played.ended >= played.truncated).all()
    else:
        assert (played.ended == either).all()


def _row(envs: Envs) -> tuple[Any, ...]:
    return _side_by_side([envs.recv(lane)[:5] for lane in range(envs.spec.lanes)])  # none of these has a score


def _side_by_side(parts: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """One row of all slots, from those of the lanes."""
    return tuple(tree.map(lambda *leaves: np.concatenate(leaves), *field) for field in zip(*parts, strict=True))


def _stack(rows: Sequence[tuple[Any, ...]]) -> Played:
    return Played(*(tree.map(lambda *leaves: np.stack(leaves), *field) for field in zip(*rows, strict=True)))


def counter_rows(seed: int, slots: int, steps: int, script: list[tuple[int, str]], reseeded: bool = True) -> Played:
    """What Counter shows, written down without any environment: `reseeded` is whether later episodes get own seeds."""
    shape = (steps + 1, slots)
    obs, reward = np.zeros((*shape, 3), np.int64), np.zeros(shape, np.float32)
    terminated, truncated = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
    for slot in range(slots):
        episode = t = 0
        for row in range(steps + 1):
            obs[row, slot] = dice.env_seed(seed, "env", slot, episode if reseeded else 0), episode, t
            reward[row, slot] = 100 * episode + t if t else 0
            length, how = script[episode % len(script)]
            if t == length:
                terminated[row, slot], truncated[row, slot] = how in "tb", how in "cb"
                episode, t = episode + 1, 0
            else:
                t += 1
    return Played(obs, reward, terminated, truncated, terminated | truncated)
