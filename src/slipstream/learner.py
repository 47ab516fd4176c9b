"""Learning from slabs: a policy, an optimiser and a version; one `step` per slab."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from slipstream import dice, tree
from slipstream.algos.algorithm import Batch, Evaluation, ShardShape, SlabAlgorithm, acted
from slipstream.crew import Crew
from slipstream.descent import Descent, Gradient, gradients, under
from slipstream.loader import Loader, mapped
from slipstream.minibatches import Pick, SlabRows
from slipstream.nets.autoencoder import Decoder
from slipstream.nets.policy import ActorCriticPolicy, Policy
from slipstream.objective import Differentiate, Hire, SlabObjective, alone, differentiated
from slipstream.reconstruction import Reconstruction
from slipstream.rejects import Rejects
from slipstream.replay.mixer import Mixer
from slipstream.replay.windows import Windows
from slipstream.rewards import TrainingReward
from slipstream.tape import Tape, Told
from slipstream.team import Ask, Order
from slipstream.types import Trajectory, Weights
from slipstream.weights import copy_into, snapshot

_BLOCK = 64
"""Observations in one forward without a gradient on a CPU; with nature_cnn, 520 at once take a third longer each."""


class Learns(Protocol):
    """What a schedule and a run ask of whoever learns.

    Attributes:
        policy: Acts; updated in place.
        version: Updates so far.
        steps: Agent decisions in the slabs so far.
    """

    version: int
    steps: int

    @property
    def policy(self) -> Policy:
        """Acts; updated in place."""
        ...

    @property
    def rejects(self) -> Rejects:
        """What becomes of gradients that are not finite."""
        ...

    @property
    def shards(self) -> int:
        """Parts whose gradients are summed in order."""
        ...

    @property
    def windows(self) -> Windows | None:
        """The replay; None where there is none."""
        ...

    @property
    def decoder(self) -> Decoder | None:
        """Of the auto-encoder; None where there is none."""
        ...

    def weights(self) -> Weights:
        """A snapshot of the policy, for collectors that do not share its memory."""
        ...

    def step(
        self, trajectory: Trajectory, behaviour: Policy | Tape | None = None, fresh: Tensor | None = None
    ) -> dict[str, Tensor | float]:
        """One update from one slab; returns `train/*` metrics.

        Args:
            trajectory: The slab.
            behaviour: The policy that acted, or the tape of its forwards, to evaluate the gradient at (it is applied to
                the newer parameters); None evaluates it at the parameters it is applied to.
            fresh: bool `[B]`, the columns to learn from; None for all. The steps of the others count as taken.
        """
        ...

    def skip(self, trajectory: Trajectory) -> None:
        """Takes note of a slab that is not learned from."""
        ...

    def restart_episodes(self) -> None:
        """Says that all slots are about to start an episode."""
        ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a later `load` needs but for the replay: tensors by name, and plain JSON facts."""
        ...

    def load(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Continues from what `state` returned; a replay is loaded before, or stays empty.

        Raises:
            RuntimeError: If names or shapes of the policy's tensors differ (PyTorch lists them).
        """
        ...


class Learner:
    """Turns slabs into better parameters.

    The gradient of a minibatch is the sum, in shard order, of one gradient per shard, each computed by one math thread.
    The crew's size decides how fast that goes and nothing else. The learner waits for its crew and its loader only.

    Args:
        algorithm: Decides targets, minibatches and loss.
        policy: Updated in place.
        crew: Threads that differentiate the shards.
        loader: Gathers minibatches ahead.
        num_envs: Columns of the slabs.
        shards: Number of shards S; divides `num_envs`.
        total_steps: Agent decisions of the whole run, the scale of all anneals.
        seed: The run's seed, for the order of rows in minibatches.
        reward: The training reward. Reported returns are raw in any case.
        mixer: Puts replayed unrolls beside the fresh ones; None for none.
        reconstruction: An auto-encoder that is learned with the policy; None for none.
        rejects: What becomes of gradients that are not finite.
        hire: Finds those who differentiate some of the shards.
        differentiate: Differentiates the shards that are left.
    """

    def __init__(
        self,
        algorithm: SlabAlgorithm,
        policy: ActorCriticPolicy,
        crew: Crew,
        loader: Loader,
        *,
        num_envs: int,
        shards: int,
        total_steps: int,
        seed: int,
        reward: TrainingReward,
        mixer: Mixer | None = None,
        reconstruction: Reconstruction | None = None,
        rejects: Rejects | None = None,
        hire: Hire = alone,
        differentiate: Differentiate = differentiated,
    ) -> None:
        if shards < 1 or num_envs % shards:
            raise ValueError(f"shards={shards} must divide num_envs={num_envs}")
        self.policy = policy
        self.version = 0
        self.steps = 0
        self._algorithm, self._crew, self._loader = algorithm, crew, loader
        self._gradients_of = differentiate
        self._num_envs, self._seed = num_envs, seed
        self._total_steps, self._reward, self._mixer = total_steps, reward, mixer
        self.rejects = rejects or Rejects()
        self._pace = 1.0
        self._parts = shards
        self._reconstruction = reconstruction
        beside = {} if reconstruction is None else dict(reconstruction.decoder.named_parameters("decoder"))
        self._descent = Descent(algorithm, dict(policy.named_parameters()), algorithm.eps, beside)
        self._objective = SlabObjective(algorithm, policy, reconstruction)
        self._team = hire(self._objective, shards)
        self._device = self._descent.parameters[0].device
        self._target = copy.deepcopy(policy) if algorithm.target_period > 1 else None

    @property
    def shards(self) -> int:
        """Parts whose gradients are summed in order."""
        return self._parts

    @property
    def windows(self) -> Windows | None:
        """The replay; None where there is none."""
        return None if self._mixer is None else self._mixer.windows

    @property
    def decoder(self) -> Decoder | None:
        """Of the auto-encoder; None where there is none."""
        return None if self._reconstruction is None else self._reconstruction.decoder

    def weights(self) -> Weights:
        """A snapshot of the policy, for collectors that do not share its memory."""
        return snapshot(self.policy, self.version)

    def check(self, rows: int) -> None:
        """Makes sure that slabs of `rows` rows can be shared out, so that a run fails before it collects anything.

        Raises:
            ValueError: If they can't; the message names what fits.
        """
        columns = [self._num_envs] + ([self._num_envs + self._mixer.replayed] if self._mixer else [])
        for width in columns:
            if width % self.shards:
                raise ValueError(
                    f"shards={self.shards} must divide the {width} unrolls of an update, fresh and replayed"
                )
            for picks in self._minibatches(rows, width):
                next(picks)

    def step(
        self, trajectory: Trajectory, behaviour: Policy | Tape | None = None, fresh: Tensor | None = None
    ) -> dict[str, Tensor | float]:
        """One update from one slab: every minibatch the algorithm asks for, then the normalisers.

        Args:
            trajectory: The slab.
            behaviour: As in `Learns`.
            fresh: As in `Learns`; the scale of rewards sees the other columns too. None with a mixer.

        Returns:
            `train/*` metrics, averaged over the minibatches.

        Raises:
            ValueError: If the algorithm can't share out the slab's rows.
            FloatingPointError: If a gradient is not finite, and is not to be left out; the parameters are as before
                that minibatch.
        """
        algorithm, progress = self._algorithm, min(self.steps / self._total_steps, 1.0)
        waited = self._loader.waited
        lr = algorithm.learning_rate(progress, self._num_envs) * self._pace
        if self._target is not None and self.version % algorithm.target_period == 0:
            copy_into(self._target, self.policy.state_dict())
        self._reward.observe(trajectory)
        whole, valid = trajectory, trajectory.valid if fresh is None else trajectory.valid & fresh
        if self._mixer is not None:
            assert fresh is None, "nothing is dropped beside a replay"
            whole = self._mixer.mix(trajectory, self.version)
            valid = whole.valid
        seen, reward = replace(whole, valid=valid), self._reward(whole.reward)
        prepared = algorithm.prepare(seen, reward, partial(self._evaluate, whole))
        rows = SlabRows(whole, valid, prepared.columns, self.policy.recurrent, algorithm.bootstraps)
        self._show(behaviour)
        own = partial(self._differentiate, behaviour)
        sums: dict[str, Tensor] = {}
        minibatches = 0
        with ExitStack() as stack:
            batches = stack.enter_context(closing(self._loader.load(self._gathers(rows))))
            order = Order(progress, self.version, delayed=behaviour is not None)
            asks = (Ask(order, batch) for batch in batches)
            for ask, gradient in stack.enter_context(closing(self._team.gradients(asks, own, all_now=False))):
                if ask.order == order and algorithm.stop(gradient.metrics):
                    break
                apply = partial(self._descent.apply, gradient, lr)
                norm = self.rejects.take(apply, self.version + 1, self.policy, ask.parts)
                if norm is None:
                    continue
                self._team.changed("policy.parameters", "decoder.parameters")
                minibatches += 1
                found = {**gradient.metrics, "grad_norm": norm, "idle_units": gradient.idle_units()}
                for name, value in found.items():
                    sums[name] = sums[name] + value if name in sums else value
        learned = trajectory.valid if fresh is None else trajectory.valid & fresh
        self.policy.observe(tree.map(lambda leaf: leaf[:-1], trajectory.obs), learned)
        self._team.changed("policy.buffers")
        self.steps += int(trajectory.valid.sum())
        self.version += 1
        means = {name: value / max(minibatches, 1) for name, value in sums.items()}
        if minibatches:
            self._pace = algorithm.pace(self._pace, means)
        means |= prepared.metrics
        return {f"train/{name}": value for name, value in means.items()} | {
            "train/learning_rate": lr,
            "train/minibatches": float(minibatches),
            "faults/skipped_gradients": float(self.rejects.count),
            "wait/loader_seconds": self._loader.waited - waited,
            **self._team.metrics(),
            **(self._mixer.ages(whole, self.version - 1) | self._mixer.rows.metrics() if self._mixer else {}),
        }

    def skip(self, trajectory: Trajectory) -> None:
        """Takes note of a slab that is not learned from: its steps count, reward scale and replay see it."""
        self._reward.observe(trajectory)
        if self._mixer is not None:
            self._mixer.store(trajectory)
        self.steps += int(trajectory.valid.sum())

    def restart_episodes(self) -> None:
        """Tells reward scale and replay that all slots are about to start an episode."""
        self._reward.restart_episodes()
        if self._mixer is not None:
            self._mixer.restart()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a later `load` needs: tensors by name, and plain JSON facts."""
        tensors = {f"policy.{name}": value for name, value in self.policy.state_dict().items()}
        tensors |= {f"return_scale.{name}": value for name, value in self._reward.scale.state_dict().items()}
        if self._target is not None:
            tensors |= {f"target.{name}": value for name, value in self._target.state_dict().items()}
        if self._reconstruction is not None:
            tensors |= {f"decoder.{name}": value for name, value in self._reconstruction.decoder.state_dict().items()}
        tensors |= self._descent.state("optimizer")
        facts = {
            "version": self.version,
            "steps": self.steps,
            "shards": self.shards,
            "pace": self._pace,
            "rejects": self.rejects.state(),
        }
        return tensors, facts

    def load(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Continues from what `state` returned.

        Raises:
            RuntimeError: If names or shapes of the policy's tensors differ (PyTorch lists them).
        """
        self._team.changed()
        self.policy.load_state_dict(under("policy.", tensors))
        self._reward.scale.load_state_dict(under("return_scale.", tensors))
        if self._target is not None:
            self._target.load_state_dict(under("target.", tensors))
        if self._reconstruction is not None:
            self._reconstruction.decoder.load_state_dict(under("decoder.", tensors))
        self._descent.load("optimizer", tensors)
        self.version, self.steps = int(facts["version"]), int(facts["steps"])
        self._pace = float(facts.get("pace", 1.0))  # older checkpoints have none
        self.rejects.load(facts.get("rejects", {}))

    def _minibatches(self, rows: int, columns: int) -> list[Iterator[Tensor | None]]:
        """One iterator of picks per shard."""

        def permute(shard: int, epoch: int, size: int) -> Tensor:
            return torch.from_numpy(dice.permutation(self._seed, "minibatch", self.version, epoch, shard, size=size))

        shape = ShardShape(rows, columns // self.shards, self.shards, self.policy.recurrent)
        return [self._algorithm.minibatches(shape, partial(permute, shard)) for shard in range(self.shards)]

    def _gathers(self, rows: SlabRows) -> Iterator[Callable[[], Sequence[Batch]]]:
        """What gathers the minibatches of a slab, each in one part per shard."""
        trajectory = rows.trajectory
        parts = self._shards(trajectory)
        for number, picks in enumerate(zip(*self._minibatches(trajectory.rows, trajectory.columns), strict=True)):
            yield partial(self._gather, number, [Pick(rows, *both) for both in zip(parts, picks, strict=True)])
        if self._mixer is not None:  # behind those that are waited for
            self._mixer.look_ahead(self.version + 1)

    def _gather(self, number: int, picks: Sequence[Pick]) -> Sequence[Batch]:
        """The parts of minibatch `number`, with weights that sum to 1."""
        total = max(sum(pick.count for pick in picks), 1)
        batches = [pick.gather(total) for pick in picks]
        if self._reconstruction is None:
            return batches
        drawn = self._reconstruction.with_dice
        return [drawn(batch, self.version, number, shard) for shard, batch in enumerate(batches)]

    def _show(self, behaviour: Policy | Tape | None) -> None:
        """Says which policy acted, if gradients are to be evaluated there."""
        if behaviour is not None:
            self._objective.behaviour = behaviour.policy if isinstance(behaviour, Tape) else behaviour
            self._team.changed("behaviour.parameters", "behaviour.buffers")

    def _differentiate(
        self, behaviour: Policy | Tape | None, order: Order, parts: Sequence[Batch]
    ) -> Sequence[Gradient]:
        """The gradients of shards: through what was said of their rows, if there is a tape of that."""
        if not isinstance(behaviour, Tape):
            return self._gradients_of(self._crew, self._objective, order, parts)
        told = zip((Told(rows) for rows in behaviour.lanes), parts, strict=True)
        losses = [self._objective.loss(order, judge, part) for judge, part in told]
        return gradients(self._crew, losses, self._objective.parameters(order))

    def _shards(self, trajectory: Trajectory) -> list[slice]:
        """Columns of each shard."""
        width = trajectory.columns // self.shards
        return [slice(shard * width, (shard + 1) * width) for shard in range(self.shards)]

    def _evaluate(self, trajectory: Trajectory) -> Evaluation:
        """The slab under the target policy, shard by shard; as it was stored if that policy acted."""
        if self._target is None and bool((trajectory.version == self.version).all()):
            return acted(trajectory)
        policy = self._target or self.policy
        rows = SlabRows(trajectory, trajectory.valid, {}, self.policy.recurrent, True)

        @torch.no_grad()
        def evaluate(part: slice) -> tuple[Tensor, ...]:
            (batch,) = mapped(lambda leaf: leaf.to(self._device), [Pick(rows, part, None).gather(1)])
            # The action of row T is not known yet; any one will do for a log-probability that is not looked at.
            action = torch.cat([batch.action, batch.action[-1:]])

            def told(block: slice) -> tuple[Tensor, ...]:
                obs = tree.map(lambda leaf: leaf[block], batch.obs)
                out = policy.unroll(obs, batch.state0, batch.first[block])
                log_prob, value = out.distribution.log_prob(action[block]).cpu(), out.value.cpu()
                if params is None:
                    return log_prob, value
                acted = out.distribution.like(params[block, part].to(self._device))
                return log_prob, value, acted.kl(out.distribution).cpu()

            log_prob, value, *kl = (torch.cat(rows) for rows in zip(*map(told, self._blocks(batch)), strict=True))
            return log_prob[:-1], value, *(each[:-1] for each in kl)

        params = trajectory.extras.get("params")
        parts = self._crew.run([partial(evaluate, part) for part in self._shards(trajectory)])
        return Evaluation(*(torch.cat(columns, dim=1) for columns in zip(*parts, strict=True)))

    def _blocks(self, batch: Batch) -> list[slice]:
        """Rows of whole columns that are evaluated at once: all, but where smaller blocks stay in a CPU's cache."""
        rows, width = batch.first.shape
        size = rows if self.policy.recurrent or self._device.type != "cpu" else max(1, _BLOCK // width)
        return [slice(start, start + size) for start in range(0, rows, size)]
