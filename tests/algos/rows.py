"""Batches of made-up rows, for tests of losses and of the learner."""

from __future__ import annotations

import gymnasium
import numpy as np
import torch
from torch import Tensor

from slipstream import slab, tree
from slipstream.algos.algorithm import Batch, Evaluate, Evaluation, SlabAlgorithm
from slipstream.crew import Crew
from slipstream.learner import Learner
from slipstream.loader import Loader
from slipstream.nets.actor_critic import ActorCritic, make_actor_critic
from slipstream.nets.policy import ActorCriticPolicy
from slipstream.nets.trunk import Network
from slipstream.rewards import RewardTransform, TrainingReward
from slipstream.types import EnvSpec, Trajectory

ROWS, COLUMNS = 7, 6


def spec(action_space: gymnasium.Space[object] | None = None) -> EnvSpec:
    """Slots of an environment that nobody steps."""
    observation = gymnasium.spaces.Box(-1.0, 1.0, (3,), np.float32)
    return EnvSpec("made-up", observation, action_space or gymnasium.spaces.Discrete(5), COLUMNS)


def policy(network: Network | None = None, action_space: gymnasium.Space[object] | None = None) -> ActorCritic:
    return make_actor_critic(spec(action_space), network or Network(hidden=(11,)), None, 3)


def learner(
    algorithm: SlabAlgorithm,
    policy: ActorCriticPolicy,
    crew: Crew,
    shards: int = 1,
    reward: RewardTransform = "raw",
    total_steps: int = 10_000,
) -> Learner:
    return Learner(
        algorithm,
        policy,
        crew,
        Loader(0, torch.device("cpu")),
        num_envs=COLUMNS,
        shards=shards,
        total_steps=total_steps,
        seed=1,
        reward=TrainingReward(reward, COLUMNS, algorithm.gamma),
    )


def unused() -> Evaluation:
    """For algorithms that do not look at the target policy."""
    raise AssertionError("the target policy is not to be evaluated")


def trajectory(actor: ActorCritic, action_space: gymnasium.Space[object] | None = None, seed: int = 0) -> Trajectory:
    """A slab with random observations and rewards, ends of all kinds, and actions that `actor` really chose."""
    random = torch.Generator().manual_seed(seed)
    filled = slab.allocate(spec(action_space), actor, ROWS)
    filled.obs.copy_(torch.rand(filled.obs.shape, generator=random) * 2 - 1)
    filled.reward.copy_(torch.randn(filled.reward.shape, generator=random))
    filled.valid.fill_(True)
    for row, column, flag in ((1, 0, "terminated"), (3, 2, "truncated"), (4, 4, "terminated")):
        getattr(filled, flag)[row, column] = True
        filled.valid[row + 1, column] = False
        filled.reward[row + 1, column] = 0.0
    state = actor.initial_state(COLUMNS)
    for row in range(ROWS + 1):
        dice = torch.rand(COLUMNS, actor.dice_width, generator=random)
        act = actor.act(filled.obs[row], state, dice)
        filled.extras["value"][row] = act.extras["value"]
        if row < ROWS:
            filled.action[row], filled.log_prob[row] = act.action, act.log_prob
            alive = filled.valid[row].unsqueeze(-1)
            state = tree.map(lambda leaf, alive=alive: leaf * alive, act.state)
    return filled


def off_policy(actor: ActorCritic, action_space: gymnasium.Space[object] | None = None, seed: int = 0) -> Trajectory:
    """A slab whose acting policy was another one, row by row, and with a life loss; dead rows hold nonsense."""
    filled = trajectory(actor, action_space, seed)
    noise = torch.randn(filled.log_prob.shape, generator=torch.Generator().manual_seed(seed + 100))
    filled.log_prob.add_(0.7 * noise)
    values = filled.extras["value"]
    values.add_(torch.randn(values.shape, generator=torch.Generator().manual_seed(seed + 200)))
    filled.terminated[2, 3] = True
    assert filled.valid[3, 3]
    dead = ~filled.valid
    assert dead.any()
    filled.log_prob[dead], filled.reward[dead] = -3.0, 50.0
    return filled


def evaluation(target: ActorCritic, shown: Trajectory) -> Evaluation:
    """The slab under `target`, in one piece."""
    with torch.no_grad():
        rows = whole(shown, {}, bootstraps=True)
        out = target.unroll(rows.obs, rows.state0, rows.first)
        action = torch.cat([shown.action, shown.action[-1:]])
        return Evaluation(out.distribution.log_prob(action)[:-1], out.value)


def whole(shown: Trajectory, columns: dict[str, Tensor], *, bootstraps: bool) -> Batch:
    """All of the slab as one minibatch."""
    first = torch.zeros(ROWS + 1, COLUMNS, dtype=torch.bool)
    first[1:] = ~shown.valid
    last = ROWS + 1 if bootstraps else ROWS
    weight = shown.valid / shown.valid.sum()
    return Batch(shown.obs[:last], shown.action, shown.log_prob, first[:last], shown.state0, weight, columns)


def gradient(
    algorithm: SlabAlgorithm, student: ActorCritic, shown: Trajectory, evaluate: Evaluate = unused
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradient by parameter, and metrics, of the whole slab as one minibatch."""
    prepared = algorithm.prepare(shown, shown.reward, evaluate)
    batch = whole(shown, prepared.columns, bootstraps=algorithm.bootstraps)
    loss, metrics = algorithm.loss(student, batch, 0.0)
    names, parameters = zip(*student.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return dict(zip(names, gradients, strict=True)), metrics | prepared.metrics
