"""Learning: a policy, an optimiser and a version; one `step` per slab."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from slipstream import dice, tree
from slipstream.algos.algorithm import Algorithm, Batch, Evaluation, ShardShape, acted
from slipstream.crew import Crew
from slipstream.nets.policy import Policy
from slipstream.ops.normalize import ReturnScale
from slipstream.optimizers import make_optimizer
from slipstream.types import Trajectory, Weights
from slipstream.weights import copy_into

RewardTransform = Literal["raw", "clip", "sign", "scale"]

Gradient = tuple[tuple[Tensor, ...], dict[str, Tensor]]
"""Gradients in the order of the parameters, and metrics; both are parts of a sum over shards."""


class Learner:
    """Turns slabs into better parameters.

    The gradient of a minibatch is the sum, in shard order, of one gradient per shard, each computed by one math thread.
    The crew's size decides how fast that goes and nothing else. The learner waits for its crew only.

    Args:
        algorithm: Decides targets, minibatches and loss.
        policy: Updated in place.
        crew: Threads that differentiate the shards.
        num_envs: Columns of the slabs.
        shards: Number of shards S; divides `num_envs`.
        total_steps: Agent decisions of the whole run, the scale of all anneals.
        seed: The run's seed, for the order of rows in minibatches.
        reward: The training reward: as it is, clipped to [-1, 1], its sign, or divided by the running standard
            deviation of the discounted return. Reported returns are raw in any case.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        policy: Policy,
        crew: Crew,
        *,
        num_envs: int,
        shards: int,
        total_steps: int,
        seed: int,
        reward: RewardTransform = "raw",
    ) -> None:
        if shards < 1 or num_envs % shards:
            raise ValueError(f"shards={shards} must divide num_envs={num_envs}")
        self.policy = policy
        self.version = 0
        self.steps = 0
        self._algorithm, self._crew, self._num_envs, self._seed = algorithm, crew, num_envs, seed
        self._total_steps, self._reward = total_steps, reward
        self._pace = 1.0
        self._return_scale = ReturnScale(num_envs, algorithm.gamma)
        width = num_envs // shards
        self._shards = [slice(shard * width, (shard + 1) * width) for shard in range(shards)]
        self._parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        self._device = self._parameters[0].device
        self._optimizer = make_optimizer(algorithm.optimizer, self._parameters, lr=algorithm.lr, eps=algorithm.eps)
        self._target = copy.deepcopy(policy) if algorithm.target_period > 1 else None

    def weights(self) -> Weights:
        """A snapshot of the policy, for collectors that do not share its memory."""
        return Weights(self.version, {name: value.clone() for name, value in self.policy.state_dict().items()})

    def check(self, rows: int) -> None:
        """Makes sure that slabs of `rows` rows can be shared out, so that a run fails before it collects anything.

        Raises:
            ValueError: If they can't; the message names what fits.
        """
        for picks in self._minibatches(rows):
            next(picks)

    def step(
        self, trajectory: Trajectory, behaviour: Policy | None = None, fresh: Tensor | None = None
    ) -> dict[str, Tensor | float]:
        """One update from one slab: every minibatch the algorithm asks for, then the normalisers.

        Args:
            trajectory: The slab.
            behaviour: The policy that acted, to evaluate the gradient at (it is applied to the newer parameters); None
                evaluates it at the parameters it is applied to.
            fresh: bool `[B]`, the columns to learn from; None for all. The steps of the others count as taken, and the
                normalisers see them.

        Returns:
            `train/*` metrics, averaged over the minibatches.

        Raises:
            ValueError: If the algorithm can't share out the slab's rows.
            FloatingPointError: If a gradient is not finite; the parameters are as before that minibatch.
        """
        progress = min(self.steps / self._total_steps, 1.0)
        lr = self._algorithm.learning_rate(progress, self._num_envs) * self._pace
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if self._target is not None and self.version % self._algorithm.target_period == 0:
            copy_into(self._target, self.policy.state_dict())
        reward = self._training_reward(trajectory)
        valid = trajectory.valid if fresh is None else trajectory.valid & fresh
        evaluate = partial(self._evaluate, trajectory)
        prepared = self._algorithm.prepare(replace(trajectory, valid=valid), reward, evaluate)
        bootstraps, recurrent = self._algorithm.bootstraps, self.policy.recurrent
        rows = _Rows(trajectory, valid, prepared.columns, recurrent, bootstraps, self._device)
        policy = behaviour or self.policy
        sums: dict[str, Tensor] = {}
        minibatches = 0
        for picks in zip(*self._minibatches(trajectory.rows), strict=True):
            gradients, metrics = self._gradient(policy, rows, picks, progress)
            if self._algorithm.stop(metrics):
                break
            metrics["grad_norm"] = self._apply(gradients)
            minibatches += 1
            for name, value in metrics.items():
                sums[name] = sums[name] + value if name in sums else value
        self.policy.observe(tree.map(lambda leaf: leaf[:-1], trajectory.obs), trajectory.valid)
        self.steps += int(trajectory.valid.sum())
        self.version += 1
        means = {name: value / max(minibatches, 1) for name, value in sums.items()}
        if minibatches:
            self._pace = self._algorithm.pace(self._pace, means)
        means |= prepared.metrics
        return {f"train/{name}": value for name, value in means.items()} | {
            "train/learning_rate": lr,
            "train/minibatches": float(minibatches),
        }

    def skip(self, trajectory: Trajectory) -> None:
        """Takes note of a slab that is not learned from: its steps count, and the reward scale sees it."""
        self._training_reward(trajectory)
        self.steps += int(trajectory.valid.sum())

    @property
    def shards(self) -> int:
        """Parts whose gradients are summed in order."""
        return len(self._shards)

    def restart_episodes(self) -> None:
        """Tells the reward scale that all slots are about to start an episode."""
        self._return_scale.ret.zero_()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a later `load` needs: tensors by name, and plain JSON facts."""
        tensors = {f"policy.{name}": value for name, value in self.policy.state_dict().items()}
        tensors |= {f"return_scale.{name}": value for name, value in self._return_scale.state_dict().items()}
        if self._target is not None:
            tensors |= {f"target.{name}": value for name, value in self._target.state_dict().items()}
        for index, slots in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in slots.items()}
        facts = {"version": self.version, "steps": self.steps, "shards": self.shards, "pace": self._pace}
        return tensors, facts

    def load(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Continues from what `state` returned.

        Raises:
            RuntimeError: If names or shapes of the policy's tensors differ (PyTorch lists them).
        """
        self.policy.load_state_dict(_under("policy.", tensors))
        self._return_scale.load_state_dict(_under("return_scale.", tensors))
        if self._target is not None:
            self._target.load_state_dict(_under("target.", tensors))
        slots: dict[int, dict[str, Tensor]] = {}
        for path, value in _under("optimizer.", tensors).items():
            index, name = path.split(".", 1)
            parameter = self._parameters[int(index)]
            # A checkpoint does not keep memory layouts, and the fused optimiser relies on them.
            slots.setdefault(int(index), {})[name] = _like(parameter, value) if value.dim() else value
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": slots, "param_groups": groups})
        self.version, self.steps = int(facts["version"]), int(facts["steps"])
        self._pace = float(facts.get("pace", 1.0))  # older checkpoints have none

    def _training_reward(self, trajectory: Trajectory) -> Tensor:
        if self._reward == "clip":
            return trajectory.reward.clamp(-1.0, 1.0)
        if self._reward == "sign":
            return trajectory.reward.sign()
        if self._reward == "scale":
            self._return_scale.update(trajectory.reward, trajectory.valid, trajectory.slot)
            return self._return_scale(trajectory.reward)
        return trajectory.reward

    def _minibatches(self, rows: int) -> list[Iterator[Tensor | None]]:
        """One iterator of picks per shard."""

        def permute(shard: int, epoch: int, size: int) -> Tensor:
            return torch.from_numpy(dice.permutation(self._seed, "minibatch", self.version, epoch, shard, size=size))

        shape = ShardShape(rows, self._num_envs // self.shards, self.shards, self.policy.recurrent)
        return [self._algorithm.minibatches(shape, partial(permute, shard)) for shard in range(self.shards)]

    def _evaluate(self, trajectory: Trajectory) -> Evaluation:
        """The slab under the target policy, shard by shard; as it was stored if that policy acted."""
        if self._target is None and bool((trajectory.version == self.version).all()):
            return acted(trajectory)
        policy = self._target or self.policy
        rows = _Rows(trajectory, trajectory.valid, {}, self.policy.recurrent, True, self._device)

        @torch.no_grad()
        def evaluate(part: slice) -> tuple[Tensor, Tensor]:
            batch = _Pick(rows, part, None).gather(1)
            out = policy.unroll(batch.obs, batch.state0, batch.first)
            # The action of row T is not known yet; any one will do for a log-probability that is not looked at.
            action = torch.cat([batch.action, batch.action[-1:]])
            return out.distribution.log_prob(action)[:-1].cpu(), out.value.cpu()

        parts = self._crew.run([partial(evaluate, part) for part in self._shards])
        return Evaluation(*(torch.cat(columns, dim=1) for columns in zip(*parts, strict=True)))

    def _gradient(self, policy: Policy, rows: _Rows, picks: Sequence[Tensor | None], progress: float) -> Gradient:
        """Gradient and metrics of one minibatch, summed over the shards in their order."""
        batches = [_Pick(rows, part, pick) for part, pick in zip(self._shards, picks, strict=True)]
        total = sum(int(batch.count) for batch in batches)
        tasks = [partial(self._shard_gradient, policy, batch, max(total, 1), progress) for batch in batches]
        parts = self._crew.run(tasks)
        gradients, metrics = parts[0]
        for more, extra in parts[1:]:
            for total_gradient, part in zip(gradients, more, strict=True):
                total_gradient.add_(part)
            metrics = {name: value + extra[name] for name, value in metrics.items()}
        return gradients, metrics

    def _shard_gradient(self, policy: Policy, pick: _Pick, total: int, progress: float) -> Gradient:
        loss, metrics = self._algorithm.loss(policy, pick.gather(total), progress)
        parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        # Autograd may return views, one tensor for two parameters, or another memory layout; sums and the fused
        # optimiser work on memory, so each gradient gets its own, laid out as its parameter.
        return tuple(_like(p, g) for p, g in zip(self._parameters, gradients, strict=True)), metrics

    def _apply(self, gradients: Sequence[Tensor]) -> Tensor:
        """Clips by global norm and takes the step; returns the norm before clipping."""
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._algorithm.max_grad_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient of update {self.version + 1} is not finite (norm {float(norm)}); parameters are "
                "unchanged. Lower algo.lr, or look for non-finite observations or rewards"
            )
        self._optimizer.step()
        return norm


class _Rows:
    """The rows of a slab, addressed by shard and item; with `bootstraps`, observations have row T as well.

    `valid` says which rows count in the loss; where episodes start is the trajectory's own affair.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        valid: Tensor,
        columns: dict[str, Tensor],
        recurrent: bool,
        bootstraps: bool,
        device: torch.device,
    ) -> None:
        rows, width = trajectory.rows + bootstraps, trajectory.columns
        self.trajectory, self.valid, self.recurrent, self.device = trajectory, valid, recurrent, device
        self.columns = {"action": trajectory.action, "log_prob": trajectory.log_prob, **columns}
        self.obs = tree.map(lambda leaf: leaf[:rows], trajectory.obs)
        # The row after a dead one starts an episode; row 0 needs no mark, since state0 is already zero there.
        self.first = torch.zeros(rows, width, dtype=torch.bool)
        self.first[1:] = ~trajectory.valid[: rows - 1]


class _Pick:
    """Items of one shard, gathered on the thread that differentiates them."""

    def __init__(self, rows: _Rows, part: slice, pick: Tensor | None) -> None:
        self._rows, self._part, self._pick = rows, part, pick
        self._valid = self._take(rows.valid)
        self.count = self._valid.sum()

    def gather(self, total: int) -> Batch:
        """The batch, with weights for a minibatch of `total` valid rows over all shards."""
        rows, device = self._rows, self._rows.device

        def take(leaf: Tensor) -> Tensor:
            return self._take(leaf).to(device, non_blocking=True)

        def state(leaf: Tensor) -> Tensor:
            columns = leaf[self._part]
            return (columns if self._pick is None else columns[self._pick]).to(device, non_blocking=True)

        columns = {name: take(value) for name, value in rows.columns.items()}
        return Batch(
            obs=tree.map(take, rows.obs),
            action=columns.pop("action"),
            log_prob=columns.pop("log_prob"),
            first=take(rows.first),
            state0=tree.map(state, rows.trajectory.state0) if rows.recurrent else (),
            weight=(self._valid.to(torch.float32) / total).to(device, non_blocking=True),
            columns=columns,
        )

    def _take(self, leaf: Tensor) -> Tensor:
        """`[T, b, ...]` for whole columns, `[N, ...]` for picked rows."""
        if self._pick is None:
            return leaf[:, self._part]
        if self._rows.recurrent:
            return leaf[:, self._part.start + self._pick]
        rows, width = leaf.shape[:2]
        size = self._part.stop - self._part.start
        index = (self._pick // size) * width + self._part.start + self._pick % size
        return leaf.reshape(rows * width, *leaf.shape[2:]).index_select(0, index)


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """A copy of `value` in memory of its own, laid out as `parameter`."""
    return torch.empty_like(parameter).copy_(value)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
