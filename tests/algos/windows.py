"""Rows of a few made-up slots in a replay, windows of them, and where a window leads by a walk from row to row."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from slipstream import slab, tree
from slipstream.algos.replaying import Loss, Networks, ReplayAlgorithm, Replayed
from slipstream.crew import Crew
from slipstream.loader import Loader
from slipstream.nets.policy import Policy
from slipstream.nets.trunk import Network
from slipstream.replay import rows
from slipstream.replay.items import Index
from slipstream.replay.options import ReplayOptions
from slipstream.replay.windows import Windows
from slipstream.replay_learner import ReplayLearner
from slipstream.rewards import TrainingReward
from slipstream.tree import Tree
from slipstream.types import EnvSpec, Trajectory

SLOTS, UNROLL, ROWS = 3, 5, 65
ACTIONS, FEATURES, N = 7, 4, 13
SMALL = Network(hidden=(11, 6), init="default")
FEATURE_SPACE = gymnasium.spaces.Box(-10.0, 10.0, (FEATURES,), np.float32)
MASKED = gymnasium.spaces.Dict({"action_mask": gymnasium.spaces.MultiBinary(ACTIONS), "features": FEATURE_SPACE})
DISCRETE = EnvSpec("made-up", MASKED, gymnasium.spaces.Discrete(ACTIONS), SLOTS)
MANY_CHOICES = EnvSpec("made-up", FEATURE_SPACE, gymnasium.spaces.MultiDiscrete([2, 3]), SLOTS)


def bounded(*bounds: tuple[float, float]) -> EnvSpec:
    """Continuous actions, an entry for each of the bounds."""
    low, high = np.array(bounds, np.float32).T
    return EnvSpec("made-up", FEATURE_SPACE, gymnasium.spaces.Box(low, high), SLOTS)


LOPSIDED = bounded((-2.0, 2.0), (-1.0, 3.0))


@dataclass(frozen=True)
class Past:
    """What happened in the slots; all rows from the start of the run on, `[ROWS, SLOTS]`.

    Attributes:
        slabs: As they were collected.
        rows: The replay that holds them.
        obs: Tree `[ROWS+1, SLOTS, *O]`.
        state0: Tree `[ROWS / UNROLL, SLOTS, ...]`, of every unroll.
    """

    slabs: list[Trajectory]
    rows: rows.Rows
    obs: Tree
    action: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    valid: Tensor
    state0: Tree

    def seen(self, slot: int, row: int) -> Tree:
        """An observation, `[1, *O]`."""
        return tree.map(lambda leaf: leaf[row, slot][None], self.obs)

    def allowed(self, slot: int, row: int) -> list[int]:
        """Actions that are allowed there."""
        return self.obs["action_mask"][row, slot].nonzero().flatten().tolist()


@dataclass(frozen=True)
class Draw:
    """Windows that were drawn: the numbers of their first rows, importance weights over N, and dice."""

    slots: Index
    starts: Index
    weight: Tensor
    dice: Tensor


def past(spec: EnvSpec, policy: Policy, seed: int = 0) -> Past:
    """Rows with ends of all kinds, lost lives among them; dead rows hold nonsense."""
    random = np.random.default_rng(seed)
    terminated, truncated = np.zeros((ROWS, SLOTS), np.bool_), np.zeros((ROWS, SLOTS), np.bool_)
    valid = np.ones((ROWS, SLOTS), np.bool_)
    for row, slot in np.ndindex(ROWS, SLOTS):
        if not valid[row, slot]:
            continue
        kind = random.choice(["", "terminated", "truncated", "life"], p=[0.76, 0.08, 0.08, 0.08])
        terminated[row, slot], truncated[row, slot] = kind in ("terminated", "life"), kind == "truncated"
        if kind in ("terminated", "truncated") and row + 1 < ROWS:
            valid[row + 1, slot] = False
    reward = np.where(valid, 1.2 * random.normal(size=valid.shape), 50.0)
    columns: dict[str, Any] = {
        "action": _actions(spec, random),
        "reward": torch.from_numpy(reward.astype(np.float32)),
        "terminated": torch.from_numpy(terminated),
        "truncated": torch.from_numpy(truncated),
        "valid": torch.from_numpy(valid),
    }
    obs = _observations(spec, random)
    state0 = tree.map(
        lambda leaf: torch.from_numpy(random.normal(size=(ROWS // UNROLL, *leaf.shape)).astype(np.float32)),
        policy.initial_state(SLOTS),
    )
    empty = slab.allocate(spec, policy, UNROLL)
    slabs = [copy.deepcopy(empty) for _ in range(ROWS // UNROLL)]
    for number, each in enumerate(slabs):
        begin, end = number * UNROLL, (number + 1) * UNROLL
        for name, column in columns.items():
            getattr(each, name).copy_(column[begin:end])
        tree.map(lambda to, leaf, begin=begin, end=end: to.copy_(leaf[begin : end + 1]), each.obs, obs)
        tree.map(lambda to, leaf, number=number: to.copy_(leaf[number]), each.state0, state0)
    stored = _replay(spec, policy)
    for each in slabs:
        stored.append(each)
    return Past(slabs, stored, obs, state0=state0, **columns)


def draw(algorithm: ReplayAlgorithm, shown: Past, spec: EnvSpec, seed: int = 0) -> Draw:
    """N different windows with weights of all sizes."""
    random = np.random.default_rng([seed, 1])
    stride = algorithm.stride(UNROLL)
    beginnings = [
        (slot, row)
        for slot, row in np.ndindex(SLOTS, ROWS)
        if row % stride == 0 and row + algorithm.span <= ROWS and (stride > 1 or shown.valid[row, slot])
    ]
    slots, starts = random.permutation(beginnings)[:N].astype(np.int64).T.copy()
    weight = torch.from_numpy(random.uniform(0.2, 1.0, N).astype(np.float32)) / N
    dice = random.integers(2**23, size=(N, algorithm.loss_dice(spec))).astype(np.float32) * np.float32(2.0**-23)
    return Draw(slots, starts, weight, torch.from_numpy(dice))


def training(reward: Tensor) -> Tensor:
    """Rewards as the targets see them."""
    return reward.clamp(-1.0, 1.0)


def gathered(algorithm: ReplayAlgorithm, shown: Past, drawn: Draw, picks: slice = slice(None)) -> Replayed[Any]:
    """A shard."""
    items = algorithm.gather(shown.rows, drawn.slots[picks], drawn.starts[picks], training)
    return Replayed(items, drawn.weight[picks], drawn.dice[picks], 1 / N)


def networks(
    algorithm: ReplayAlgorithm, spec: EnvSpec, network: Network = SMALL, seed: int = 0
) -> Networks[Any, nn.Module]:
    """Networks with opinions: heads of actors begin near 0, and biases at 0."""
    made = Networks(
        algorithm.make_policy(spec, network, None, seed), algorithm.make_critic(spec, network, None, seed + 100)
    )
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in (made.policy, made.critic):
            for name, parameter in module.named_parameters():
                if not name.endswith("log_alpha"):
                    parameter.add_(0.4 * torch.randn(parameter.shape, generator=random))
    return made


def outlook(shown: Past, slot: int, row: int, n: int, gamma: float) -> tuple[float, float, int]:
    """What n steps bring: `sum_k gamma^k r_k`, the discount of what follows, and the row to bootstrap from."""
    total = 0.0
    for k in range(n):
        total += gamma**k * min(max(shown.reward[row + k, slot].item(), -1.0), 1.0)
        if shown.terminated[row + k, slot]:
            return total, 0.0, row + k + 1
        if shown.truncated[row + k, slot]:
            return total, gamma ** (k + 1), row + k + 1
    return total, gamma**n, row + n


def kinds(shown: Past, drawn: Draw, n: int) -> set[str]:
    """How windows of n steps end: in a `termination`, in a `truncation` (cut short if n > 1), or not (`whole`)."""
    found: set[str] = set()
    for slot, start in zip(drawn.slots.tolist(), drawn.starts.tolist(), strict=True):
        _, discount, then = outlook(shown, slot, start, n, 0.5)
        last = then - 1
        found.add("termination" if discount == 0 else "truncation" if shown.truncated[last, slot] else "whole")
    return found


def in_shards(loss: Callable[[Replayed[Any]], Loss], algorithm: ReplayAlgorithm, shown: Past, drawn: Draw) -> Loss:
    """The sum over two shards, of 6 windows and 7; errors one after the other."""
    parts = [loss(gathered(algorithm, shown, drawn, picks)) for picks in (slice(0, 6), slice(6, N))]
    metrics = {name: parts[0].metrics[name] + parts[1].metrics[name] for name in parts[0].metrics}
    errors = [part.error for part in parts if part.error is not None]
    return Loss(parts[0].loss + parts[1].loss, metrics, torch.cat(errors) if errors else None)


def assert_same(got: Loss, expected: Loss) -> None:
    """Loss, metrics and errors."""
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert got.metrics.keys() == expected.metrics.keys()
    for name, value in expected.metrics.items():
        assert not got.metrics[name].requires_grad, name
        torch.testing.assert_close(got.metrics[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert (got.error is None) == (expected.error is None)
    if got.error is not None:
        assert not got.error.requires_grad
        torch.testing.assert_close(got.error, expected.error, rtol=1e-5, atol=1e-6)


def assert_same_gradient(got: Tensor, expected: Tensor, module: nn.Module) -> None:
    """Of two losses by every parameter of `module` that wants one; none is zero throughout."""
    wanted = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    names, parameters = zip(*wanted, strict=True)
    one = torch.autograd.grad(got, parameters, retain_graph=True)
    other = torch.autograd.grad(expected, parameters)
    for name, mine, its in zip(names, one, other, strict=True):
        assert its.any(), name
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-5, msg=name)


def gets_gradient(loss: Tensor, *modules: nn.Module) -> list[bool]:
    """Whether the loss depends on any parameter of each module."""
    found: list[bool] = []
    for module in modules:
        gradients = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True)
        found.append(any(gradient is not None and bool(gradient.any()) for gradient in gradients))
    return found


def learned(
    algorithm: Any, spec: EnvSpec, gradient_steps: int, network: Network = SMALL
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All parameters before and after some gradient steps of a learner, by their names in a checkpoint.

    Those are `policy.*` and `critic.*`, and the same behind `target.`.
    """
    made = networks(algorithm, spec, network)
    shown = past(spec, made.policy)
    options = ReplayOptions(ratio=gradient_steps, learning_starts=int(shown.valid.sum()) - 1)
    with closing(Crew(1)) as crew, closing(Loader(0, torch.device("cpu"))) as loader:
        learner = ReplayLearner(
            replace(algorithm, replay=options),
            made,
            Windows(_replay(spec, made.policy), algorithm.stride(UNROLL), algorithm.span),
            crew,
            loader,
            num_envs=SLOTS,
            shards=1,
            loss_dice=algorithm.loss_dice(spec),
            total_steps=10**6,
            seed=1,
            reward=TrainingReward("clip", SLOTS, algorithm.gamma),
        )
        before = _parameters(learner, made)
        for each in shown.slabs[:-1]:
            learner.skip(each)
        metrics = learner.step(shown.slabs[-1])
        assert metrics["train/gradient_steps"] == gradient_steps
        return before, _parameters(learner, made)


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of parameters that are not what they were."""
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def _parameters(learner: ReplayLearner, made: Networks[Any, nn.Module]) -> dict[str, Tensor]:
    tensors, _ = learner.state()
    own = [f"policy.{name}" for name, _ in made.policy.named_parameters()]
    own += [f"critic.{name}" for name, _ in made.critic.named_parameters()]
    return {f"{kind}{name}": tensors[f"{kind}{name}"].clone() for kind in ("", "target.") for name in own}


def _replay(spec: EnvSpec, policy: Policy) -> rows.Rows:
    """Room for more than all rows: the oldest row makes room for the observation after the newest."""
    like = slab.layout(spec, policy, UNROLL)
    names = ("state0",) if policy.recurrent else ()
    memory = rows.layout(like, SLOTS * (ROWS + UNROLL), 1, names)
    return rows.Rows(rows.allocate(memory), UNROLL, like["obs"])


def _observations(spec: EnvSpec, random: np.random.Generator) -> Tree:
    features = torch.from_numpy(random.normal(size=(ROWS + 1, SLOTS, FEATURES)).astype(np.float32))
    if spec.observation_space is not MASKED:
        return features
    mask = random.random((ROWS + 1, SLOTS, ACTIONS)) < 0.6
    mask[..., 2] |= ~mask.any(-1)
    return {"action_mask": torch.from_numpy(mask.astype(np.int8)), "features": features}


def _actions(spec: EnvSpec, random: np.random.Generator) -> Tensor:
    space = spec.action_space
    if isinstance(space, gymnasium.spaces.Box):
        return torch.from_numpy(random.uniform(space.low, space.high, (ROWS, SLOTS, *space.shape)).astype(np.float32))
    return torch.from_numpy(random.integers(ACTIONS, size=(ROWS, SLOTS)))
