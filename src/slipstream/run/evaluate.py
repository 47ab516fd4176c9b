"""Evaluation: raw returns of whole episodes in environments of their own, with seeds that training never uses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from slipstream import dice, slab
from slipstream.arithmetic import adopted
from slipstream.envs import EnvError
from slipstream.nets.policy import Policy
from slipstream.ranges import crossed
from slipstream.run.progress import Progress, Spread, spread
from slipstream.types import Envs, Report

SLOTS = 10
"""Environments that evaluate in parallel, at most."""

_ROLE = "eval"


@dataclass(frozen=True)
class Evaluation:
    """Episodes of one evaluation, in the order of (slot, episode), which no timing can change.

    Attributes:
        returns: Raw returns.
        lengths: Agent decisions.
    """

    returns: tuple[float, ...]
    lengths: tuple[int, ...]

    @property
    def reward(self) -> Spread:
        """Mean, standard deviation, least and greatest return."""
        return spread(self.returns)

    def metrics(self) -> dict[str, float]:
        """`eval/*` in Stable-Baselines3's names."""
        reward = self.reward
        return {
            "eval/mean_reward": reward.mean,
            "eval/std_reward": reward.std,
            "eval/min_reward": reward.least,
            "eval/max_reward": reward.greatest,
            "eval/mean_ep_length": spread(self.lengths).mean,
            "eval/episodes": float(len(self.returns)),
        }


def slots(episodes: int) -> int:
    """How many environments evaluate `episodes` episodes: at most `SLOTS`, with nearly equal shares."""
    rounds = math.ceil(episodes / SLOTS)
    return math.ceil(episodes / rounds)


@adopted()
@torch.no_grad()
def evaluate(
    policy: Policy, envs: Envs, episodes: int, seed: int, index: int = 0, greedy: bool = False, limit: int = 10**6
) -> Evaluation:
    """Plays `episodes` episodes with a policy that is only read: normalisers do not move.

    How many episodes each slot plays is fixed in advance. Taking whichever end first would favour short episodes.

    Args:
        policy: Acts, on whatever device its parameters are.
        envs: Environments with one lane, used by nobody else; they are reset here.
        episodes: Episodes over all slots.
        seed: The run's seed; environments and actions draw from its `eval` branch.
        index: Number of this evaluation: another one, other episodes.
        greedy: Whether to take the most probable action instead of a drawn one.
        limit: Steps after which an episode is given up.

    Raises:
        EnvError: If an episode does not end within `limit` steps.
    """
    size = envs.spec.num_envs
    device = next(policy.parameters()).device
    quota = np.array([episodes // size + (slot < episodes % size) for slot in range(size)])
    finished: list[list[tuple[float, int]]] = [[] for _ in range(size)]
    branch = dice.env_seed(seed, _ROLE, index)
    keys = dice.keys(branch, _ROLE, range(size))
    envs.reset(branch)
    step = envs.recv(0)

    state = slab.tensors(policy.initial_state(size), device)
    dead = np.zeros(size, np.bool_)
    total, length = np.zeros(size, np.float64), np.zeros(size, np.int64)
    row = 0
    while any(len(played) < count for played, count in zip(finished, quota, strict=True)):
        draws = dice.uniform(keys, row, 1, policy.dice_width)[0]
        act = policy.act(slab.tensors(step.obs, device), state, slab.tensors(draws, device), greedy)
        state = slab.keep(act.state, slab.tensors(~dead, device))
        envs.send(act.action.cpu().numpy(), 0)
        step = envs.recv(0)
        total += np.where(dead, 0.0, step.reported)
        length += ~dead
        for slot in np.flatnonzero(step.ended):
            if len(finished[slot]) < quota[slot]:
                finished[slot].append((float(total[slot]), int(length[slot])))
            total[slot] = length[slot] = 0
        if length.max() > limit:
            raise EnvError(f"{envs.spec.id}: an episode has not ended after {limit:,} steps; set a time limit")
        dead = step.ended.copy()
        row += 1
    flat = [episode for played in finished for episode in played]
    return Evaluation(tuple(reward for reward, _ in flat), tuple(steps for _, steps in flat))


class Evaluator:
    """Observer that evaluates at fixed distances in steps and puts the result into the progress.

    Args:
        policy: The policy in training.
        envs: Environments of its own with one lane; closed with this observer.
        progress: The run's counters.
        every: Steps between two evaluations.
        episodes: Episodes of each.
        seed: The run's seed.
    """

    def __init__(self, policy: Policy, envs: Envs, progress: Progress, every: int, episodes: int, seed: int) -> None:
        self._policy, self._envs, self._progress = policy, envs, progress
        self._every, self._episodes, self._seed = every, episodes, seed

    def __call__(self, report: Report) -> None:
        """Evaluates if it is time to."""
        progress = self._progress
        if crossed(progress.before, progress.steps, self._every) or progress.finished:
            result = evaluate(self._policy, self._envs, self._episodes, self._seed, index=report.update)
            progress.evaluation, progress.evaluated_at = result.metrics(), progress.steps

    def close(self) -> None:
        """Closes the environments."""
        self._envs.close()
