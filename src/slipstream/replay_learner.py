"""Learning from a replay: slabs go in, and gradient steps are taken in a fixed proportion to what has come."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slipstream import dice, tree
from slipstream.algos.replaying import Networks, ReplayAlgorithm, Replayed
from slipstream.crew import Crew
from slipstream.descent import Descent, Gradient, under
from slipstream.loader import Loader
from slipstream.nets.policy import ExploringPolicy, Policy
from slipstream.objective import Differentiate, Hire, ReplayObjective, alone, differentiated
from slipstream.rejects import Rejects
from slipstream.replay.options import LEAST_RATIO
from slipstream.replay.windows import Drawn, Windows
from slipstream.rewards import TrainingReward
from slipstream.tape import Tape
from slipstream.team import KINDS, Ask, Order
from slipstream.types import Trajectory, Weights
from slipstream.weights import snapshot


class ReplayLearner:
    """Puts slabs into a replay and learns from draws.

    After `s` collected steps `floor((s - begins) * ratio)` gradient steps have been taken, whatever the slabs that
    brought them; what a slab has due is taken when it has gone in, so every schedule keeps the ratio. It begins after
    `learning_starts` steps, or after as many as there are rows before the slab that makes a batch of windows whole, if
    they are more. (The steps that `load` makes a learner collect first don't count.) The draws of an update are a
    function of (seed, version) and of what the slabs up to it brought.

    Each gradient is the sum, in shard order, of one gradient per shard: equal parts of the batch. The learner waits for
    its crew and its loader only.

    Args:
        algorithm: Decides what is gathered, losses, targets and exploration.
        networks: Updated in place; the policy acts.
        windows: The replay, empty.
        crew: Threads that differentiate the shards.
        loader: Gathers batches ahead.
        num_envs: Slots.
        shards: Number of shards S; divides the batch.
        loss_dice: Uniform numbers per window that the losses want.
        total_steps: Agent decisions of the whole run, the scale of all anneals.
        seed: The run's seed.
        reward: The training reward.
        rejects: What becomes of gradients that are not finite.
        hire: Finds those who differentiate some of the shards.
        differentiate: Differentiates the shards that are left.
    """

    def __init__(
        self,
        algorithm: ReplayAlgorithm,
        networks: Networks[ExploringPolicy, nn.Module],
        windows: Windows,
        crew: Crew,
        loader: Loader,
        *,
        num_envs: int,
        shards: int,
        loss_dice: int,
        total_steps: int,
        seed: int,
        reward: TrainingReward,
        rejects: Rejects | None = None,
        hire: Hire = alone,
        differentiate: Differentiate = differentiated,
    ) -> None:
        if algorithm.batch_size % shards:
            raise ValueError(
                f"algo.batch_size={algorithm.batch_size} does not share out equally over {shards} shards; use "
                f"{algorithm.batch_size // shards * shards or shards} or {-(-algorithm.batch_size // shards) * shards}"
            )
        if windows.most < algorithm.batch_size:
            raise ValueError(
                f"algo.replay.capacity={algorithm.replay.capacity} keeps no more than {windows.most} windows, and "
                f"algo.batch_size={algorithm.batch_size} are wanted at once; raise the one or lower the other"
            )
        self.policy = networks.policy
        self.version = self.steps = 0
        self._algorithm, self._networks, self._windows = algorithm, networks, windows
        self._follower = _Follower(networks)
        self._target = self._follower.networks
        self._loader, self._num_envs, self._shards, self._loss_dice = loader, num_envs, shards, loss_dice
        self._total_steps, self._seed, self._reward = total_steps, seed, reward
        self._ratio = Fraction(algorithm.replay.ratio).limit_denominator(round(1 / LEAST_RATIO))
        self.rejects = rejects or Rejects()
        self._gradient_steps = 0
        filling = windows.rows_to(algorithm.batch_size) - windows.rows.unroll * windows.rows.slots
        self._first = max(algorithm.replay.learning_starts, filling)
        self._begins = Fraction(self._first)  # steps that gradient steps are counted from
        eps = algorithm.optimizer_eps
        self._objective = ReplayObjective(algorithm, networks, self._target)
        self._descents = {part: Descent(algorithm, by, eps) for part, by in self._objective.parts.items()}
        self._crew, self._team = crew, hire(self._objective, shards)
        self._gradients_of = differentiate
        self._explore()

    @property
    def shards(self) -> int:
        """Parts whose gradients are summed in order."""
        return self._shards

    @property
    def waits_for_batch(self) -> bool:
        """Whether the first gradient step comes later than `learning_starts` has it, for want of a batch."""
        return self._first > self._algorithm.replay.learning_starts

    @property
    def due_at(self) -> int:
        """Collected steps at which the next gradient step is due."""
        return math.ceil(self._begins + (self._gradient_steps + 1) / self._ratio)

    @property
    def windows(self) -> Windows:
        """The replay."""
        return self._windows

    @property
    def decoder(self) -> None:
        """There is none."""

    def weights(self) -> Weights:
        """A snapshot of the policy, for collectors that do not share its memory."""
        return snapshot(self.policy, self.version)

    def step(
        self, trajectory: Trajectory, behaviour: Policy | Tape | None = None, fresh: Tensor | None = None
    ) -> dict[str, Tensor | float]:
        """Takes in a slab and takes the gradient steps that are due.

        Args:
            trajectory: The slab; rows of any age are welcome.
            behaviour: None: the gradient is evaluated at the parameters that it is applied to.
            fresh: None: all columns are learned from.

        Returns:
            `train/*` metrics, each averaged over the gradient steps that had it, and `replay/*`.

        Raises:
            FloatingPointError: If a gradient is not finite, and is not to be left out; the parameters of its part are
                as before that step.
        """
        assert behaviour is None, "gradients of a replay are evaluated at the parameters they are applied to"
        assert fresh is None, "a replay has rows of all ages"
        progress = min(self.steps / self._total_steps, 1.0)
        self.skip(trajectory)
        lr = self._algorithm.learning_rate(progress, self._num_envs)
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        due = self._due()
        waited = self._loader.waited
        if due:
            drawn, first = self._draw(due, progress), self._gradient_steps
            with ExitStack() as stack:
                batches = stack.enter_context(closing(self._loader.load(self._gathers(drawn))))
                asks = self._asks(batches, first, progress)
                found = stack.enter_context(closing(self._team.gradients(asks, self._differentiate, all_now=True)))
                for ask, gradient in found:
                    for name, value in self._apply(ask, gradient, drawn, ask.order.step - first, lr).items():
                        sums[name] = sums[name] + value if name in sums else value
                        counts[name] = counts.get(name, 0) + 1
        self.policy.observe(tree.map(lambda leaf: leaf[:-1], trajectory.obs), trajectory.valid)
        self._team.changed("policy.buffers")
        self.version += 1
        self._explore()
        means: dict[str, Tensor | float] = {f"train/{name}": value / counts[name] for name, value in sums.items()}
        if due:
            means |= {"train/learning_rate": lr, "wait/loader_seconds": self._loader.waited - waited}
        return means | {
            "train/gradient_steps": float(self._gradient_steps),
            "train/exploration_rate": float(self.policy.exploration.mean()),
            "replay/rows": float((self._windows.rows.head - self._windows.rows.oldest).sum()),
            "replay/windows": float(self._windows.count),
            "faults/skipped_gradients": float(self.rejects.count),
            **self._team.metrics(),
            **self._windows.rows.metrics(),
        }

    def skip(self, trajectory: Trajectory) -> None:
        """Takes in a slab without learning: what is due comes with the next."""
        self._reward.observe(trajectory)
        self._windows.append(trajectory)
        self.steps += int(trajectory.valid.sum())

    def restart_episodes(self) -> None:
        """Tells replay and reward scale that all slots are about to start an episode."""
        self._windows.restart()
        self._reward.restart_episodes()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a later `load` needs but for the replay: tensors by name, and plain JSON facts."""
        tensors = {f"return_scale.{name}": value for name, value in self._reward.scale.state_dict().items()}
        for kind, networks in (("", self._networks), ("target.", self._target)):
            tensors |= {f"{kind}policy.{name}": value for name, value in networks.policy.state_dict().items()}
            tensors |= {f"{kind}critic.{name}": value for name, value in networks.critic.state_dict().items()}
        for part, descent in self._descents.items():
            tensors |= descent.state(f"optimizer.{part}")
        facts = {
            "version": self.version,
            "steps": self.steps,
            "shards": self.shards,
            "gradient_steps": self._gradient_steps,
            "begins": str(self._begins),
            "rejects": self.rejects.state(),
        }
        return tensors, facts

    def load(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Continues from what `state` returned; the replay is loaded before, or stays empty.

        With an empty one, as many steps as before the first gradient step are collected before the next one; they are
        not made up for.

        Raises:
            RuntimeError: If names or shapes of a network's tensors differ (PyTorch lists them).
        """
        self._team.changed()
        for kind, networks in (("", self._networks), ("target.", self._target)):
            networks.policy.load_state_dict(under(f"{kind}policy.", tensors))
            networks.critic.load_state_dict(under(f"{kind}critic.", tensors))
        self._reward.scale.load_state_dict(under("return_scale.", tensors))
        for part, descent in self._descents.items():
            descent.load(f"optimizer.{part}", tensors)
        self.version, self.steps = int(facts["version"]), int(facts["steps"])
        self._gradient_steps = int(facts["gradient_steps"])
        self.rejects.load(facts.get("rejects", {}))
        if self._windows.rows.head.any():
            self._begins = Fraction(facts["begins"])
            return
        # As if all gradient steps so far had been due, and the next steps were the first of all.
        self._begins = self.steps + self._first - self._gradient_steps / self._ratio

    def _due(self) -> int:
        """Gradient steps that have not been taken yet; none while there is not a batch of windows.

        That happens where a shard of the replay was lost, and in runs of older versions, which began sooner.
        """
        if self._windows.count < self._algorithm.batch_size:
            return 0
        return max(int((self.steps - self._begins) * self._ratio) - self._gradient_steps, 0)

    def _draw(self, batches: int, progress: float) -> Drawn:
        options = self._algorithm.replay
        generator = dice.generator(self._seed, "replay", self.version)
        beta = options.beta + (1.0 - options.beta) * progress
        return self._windows.draw(generator, batches, self._algorithm.batch_size, beta)

    def _gathers(self, drawn: Drawn) -> Iterator[Callable[[], Sequence[Replayed[Any]]]]:
        """What gathers the batches, each in one part per shard."""
        size, width = self._algorithm.batch_size // self._shards, self._loss_dice
        keys, first = dice.keys(self._seed, "loss", range(self._shards)), self._gradient_steps
        gathers = partial(self._algorithm.gather, transform=self._reward)

        def gather(number: int) -> Sequence[Replayed[Any]]:
            uniform = dice.uniform(keys, first + number, 1, size * width)[0]
            return [part(number, shard, uniform[shard]) for shard in range(self._shards)]

        def part(number: int, shard: int, uniform: Any) -> Replayed[Any]:
            mine = slice(shard * size, (shard + 1) * size)
            slots, rows = drawn.slot[number, mine], drawn.row[number, mine]
            items = self._windows.rows.gathered(gathers, slots, rows)
            weight = torch.from_numpy(drawn.weight[number, mine]) / self._algorithm.batch_size
            share = 1.0 / self._algorithm.batch_size
            return Replayed(items, weight, torch.from_numpy(uniform).view(size, width), share)

        return (partial(gather, number) for number in range(len(drawn.slot)))

    def _asks(self, batches: Iterator[Sequence[Replayed[Any]]], first: int, progress: float) -> Iterator[Ask]:
        """All phases of all batches, whose gradient steps are numbered from `first` on."""
        for number, batch in enumerate(batches, first):
            self._renoise("learn", number)
            for place in range(len(self._algorithm.phases(number))):
                yield Ask(Order(progress, self.version, number, place), batch)

    def _differentiate(self, order: Order, parts: Sequence[Replayed[Any]]) -> Sequence[Gradient]:
        """The gradients of shards."""
        return self._gradients_of(self._crew, self._objective, order, parts)

    def _apply(self, ask: Ask, gradient: Gradient, drawn: Drawn, number: int, lr: float) -> dict[str, Tensor]:
        """The step of one phase, and priorities of the windows; after the last one targets. Returns metrics."""
        phases = self._algorithm.phases(ask.order.step)
        part = phases[ask.order.phase].part
        apply = partial(self._descents[part].apply, gradient, lr)
        norm = self.rejects.take(apply, self.version + 1, self._networks, ask.parts, part)
        metrics: dict[str, Tensor] = {}
        if norm is not None:
            self._team.changed(f"{part.partition('.')[0]}.parameters")
            metrics = {**gradient.metrics, f"grad_norm/{part}": norm, f"idle_units/{part}": gradient.idle_units()}
            if gradient.errors is not None and self._algorithm.replay.alpha > 0:
                self._windows.reprioritise(drawn.slot[number], drawn.row[number], gradient.errors.cpu().numpy())
        if ask.order.phase == len(phases) - 1:
            self._end_step()
        return metrics

    def _end_step(self) -> None:
        """Counts a gradient step, and has the targets follow."""
        pace = 1 / self._ratio
        before, now = (float(self._begins + (self._gradient_steps + ahead) * pace) for ahead in (0, 1))
        mix = self._algorithm.target_mix(self._gradient_steps, before, now)
        if mix > 0:
            self._follower.follow(mix)
            self._team.changed(*(f"target.{name}.{kind}" for name in ("policy", "critic") for kind in KINDS))
        self._gradient_steps += 1

    def _renoise(self, role: str, number: int) -> None:
        """Draws the noise of noisy layers anew: for every gradient, and for the acting of every slot and version."""
        width = self.policy.noise_width
        if not width:
            return
        if role == "act":
            keys = dice.keys(self._seed, "noise act", range(self._num_envs))
            self.policy.renoise(torch.from_numpy(dice.uniform(keys, number, 1, width)[0]))
        else:
            (drawn,) = dice.uniform(dice.keys(self._seed, "noise learn", [0, 1]), number, 1, width)
            self.policy.renoise(torch.from_numpy(drawn[0]))
            self._target.policy.renoise(torch.from_numpy(drawn[1]))
        self._team.changed("policy.buffers", "target.policy.buffers")

    def _explore(self) -> None:
        """Sets the exploration of the next unroll."""
        rates = self._algorithm.exploration_rates(self.steps, self._num_envs)
        self.policy.exploration.copy_(torch.from_numpy(rates))
        self._renoise("act", self.version)


class _Follower:
    """The target networks, and the tensors of both, found once: a gradient step may be shorter than finding them."""

    def __init__(self, online: Networks[Any, Any]) -> None:
        self.networks = copy.deepcopy(online)
        pairs = [(self.networks.policy, online.policy), (self.networks.critic, online.critic)]
        self._parameters = [pair for to, by in pairs for pair in zip(to.parameters(), by.parameters(), strict=True)]
        self._buffers = [pair for to, by in pairs for pair in zip(to.buffers(), by.buffers(), strict=True)]

    @torch.no_grad()
    def follow(self, tau: float) -> None:
        """`target <- (1 - tau) target + tau online` for parameters, exactly online for tau = 1; buffers are copied."""
        for target, online in self._parameters:
            if tau == 1.0:
                target.copy_(online)
            else:
                target.lerp_(online, tau)
        for target, online in self._buffers:
            target.copy_(online)
