"""Collecting: lanes x policy -> trajectory. The same code in every placement, and the sole author of `valid`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from slipstream import dice, slab, tree
from slipstream.nets.policy import Policy
from slipstream.tree import Tree
from slipstream.types import BoolArray, Envs, EnvStep, Episode, FloatArray, Trajectory


@dataclass(frozen=True)
class Collected:
    """What filling a slab's columns brought.

    Attributes:
        steps: Valid rows written.
        episodes: Episodes that ended.
        env_seconds: Time spent sending to and waiting for environments.
        infer_seconds: Time spent in the policy and in writing its answers.
    """

    steps: int
    episodes: tuple[Episode, ...]
    env_seconds: float
    infer_seconds: float


class Collector:
    """Steps some lanes and writes their columns into slabs.

    Within a row the lanes take turns, so that the environments of one lane step (in native threads or processes)
    while another lane is inferred. Lanes never see each other: the bits of a lane's columns depend on the policy, the
    seed and the lane alone. It waits only for the environments of its own lanes.

    Args:
        envs: The environments, already reset.
        lanes: Lanes of this collector.
        policy: Acts; its parameters must not change during `collect`.
        slabs: The slabs that `collect` may be told to fill.
        seed: The run's seed.
        row: Rows that every slot has collected before (after a resume).
        device: Where the policy lives.
    """

    def __init__(
        self,
        envs: Envs,
        lanes: Sequence[int],
        policy: Policy,
        slabs: Sequence[Trajectory],
        seed: int,
        row: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self._policy = policy
        self._lanes = [_Lane(envs, lane, policy, slabs, seed, row, device or torch.device("cpu")) for lane in lanes]
        self._rows = slabs[0].rows

    def collect(self, index: int, version: int) -> Collected:
        """Fills the columns of this collector's lanes in slab `index`, acting with weights `version`."""
        env_seconds = infer_seconds = 0.0
        for lane in self._lanes:
            lane.open(index, version)
        for t in range(self._rows):
            for lane in self._lanes:
                start = time.perf_counter()
                if t:
                    lane.receive(t - 1)
                received = time.perf_counter()
                action = lane.decide(t)
                decided = time.perf_counter()
                lane.send(action)
                env_seconds += (received - start) + (time.perf_counter() - decided)
                infer_seconds += decided - received
        for lane in self._lanes:
            start = time.perf_counter()
            lane.receive(self._rows - 1)
            received = time.perf_counter()
            lane.bootstrap()
            env_seconds += received - start
            infer_seconds += time.perf_counter() - received
        return Collected(
            steps=sum(lane.steps for lane in self._lanes),
            episodes=tuple(episode for lane in self._lanes for episode in lane.episodes),
            env_seconds=env_seconds,
            infer_seconds=infer_seconds,
        )


class _Lane:
    """One lane's place in time: its last observation, recurrent state and running episodes."""

    def __init__(
        self,
        envs: Envs,
        lane: int,
        policy: Policy,
        slabs: Sequence[Trajectory],
        seed: int,
        row: int,
        device: torch.device,
    ) -> None:
        part = envs.spec.slots(lane)
        size = part.stop - part.start
        self._envs, self._lane, self._policy, self._device = envs, lane, policy, device
        self._first_slot = part.start
        self._views = [slab.columns(trajectory, part) for trajectory in slabs]
        self._arrays = [_Arrays.of(view) for view in self._views]
        self._keys = dice.keys(seed, "act", range(part.start, part.stop))
        self._row = row
        self._state: Tree = slab.tensors(policy.initial_state(size), device)
        self._step: EnvStep | None = None
        self._dead: BoolArray = np.zeros(size, np.bool_)
        self._return = np.zeros(size, np.float64)
        self._length = np.zeros(size, np.int64)
        self.steps = 0
        self.episodes: list[Episode] = []

    def open(self, index: int, version: int) -> None:
        """Starts a slab: row 0 holds the last observation, `state0` the state before it."""
        self._view, self._array = self._views[index], self._arrays[index]
        rows = self._view.rows
        self._dice = torch.from_numpy(dice.uniform(self._keys, self._row, rows + 1, self._policy.dice_width))
        self.steps, self.episodes = 0, []
        if self._step is None:
            self._step = self._envs.recv(self._lane)
        _write(self._array.obs, 0, self._step.obs)
        tree.map(lambda to, state: to.copy_(state), self._view.state0, self._state)
        self._view.version.fill_(version)

    @torch.no_grad()
    def decide(self, t: int) -> NDArray[np.generic]:
        """Chooses and records the actions of row t."""
        act = self._policy.act(self._obs(t), self._state, self._dice[t].to(self._device, non_blocking=True))
        self._view.action[t] = act.action
        self._view.log_prob[t] = act.log_prob
        for name, value in act.extras.items():
            self._view.extras[name][t] = value
        self._state = act.state
        if self._policy.recurrent and self._dead.any():
            alive = torch.from_numpy(~self._dead).to(self._device)
            self._state = slab.keep(self._state, alive)
        return self._array.action[t]

    def send(self, action: NDArray[np.generic]) -> None:
        """Hands the actions to the environments."""
        self._envs.send(action, self._lane)

    def receive(self, t: int) -> None:
        """Waits for what the actions of row t caused and records it, with the observation of row t+1."""
        step = self._step = self._envs.recv(self._lane)
        arrays, valid = self._array, ~self._dead
        _write(arrays.obs, t + 1, step.obs)
        arrays.reward[t] = step.reward
        arrays.terminated[t] = step.terminated
        arrays.truncated[t] = step.truncated
        arrays.valid[t] = valid
        self.steps += int(valid.sum())
        self._return += np.where(valid, step.reward, 0.0)
        self._length += valid
        self._row += 1
        if step.ended.any():
            self._finish(step)
        self._dead = step.ended.copy()

    @torch.no_grad()
    def bootstrap(self) -> None:
        """Evaluates the extras of row T, the observation after the last action."""
        if not self._view.extras:
            return
        rows = self._view.rows
        act = self._policy.act(self._obs(rows), self._state, self._dice[rows].to(self._device))
        for name, value in act.extras.items():
            self._view.extras[name][rows] = value

    def _obs(self, t: int) -> Tree:
        return tree.map(lambda leaf: leaf[t].to(self._device, non_blocking=True), self._view.obs)

    def _finish(self, step: EnvStep) -> None:
        for column in np.flatnonzero(step.ended):
            self.episodes.append(
                Episode(
                    slot=self._first_slot + int(column),
                    row=self._row,
                    length=int(self._length[column]),
                    reward=float(self._return[column]),
                    truncated=bool(step.truncated[column]),
                )
            )
        self._return[step.ended] = 0.0
        self._length[step.ended] = 0


@dataclass(frozen=True)
class _Arrays:
    """NumPy views of the columns that environments write."""

    obs: Tree
    action: NDArray[np.generic]
    reward: FloatArray
    terminated: BoolArray
    truncated: BoolArray
    valid: BoolArray

    @staticmethod
    def of(view: Trajectory) -> _Arrays:
        return _Arrays(
            obs=tree.map(lambda leaf: leaf.numpy(), view.obs),
            action=view.action.numpy(),
            reward=view.reward.numpy(),
            terminated=view.terminated.numpy(),
            truncated=view.truncated.numpy(),
            valid=view.valid.numpy(),
        )


def _write(rows: Tree, t: int, obs: Tree) -> None:
    """Copies an observation into row t, the one copy between environment and gradient."""

    def copy(row: NDArray[np.generic], leaf: NDArray[np.generic]) -> None:
        row[t] = leaf

    tree.map(copy, rows, obs)
