"""What is differentiated: the loss of a shard, as a function of networks that every learner has for itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from slipstream.algos.algorithm import Batch, SlabAlgorithm
from slipstream.algos.replaying import Networks, Phase, ReplayAlgorithm, Replayed
from slipstream.crew import Crew
from slipstream.descent import Gradient, ShardLoss, gradients, of_shard
from slipstream.loader import mapped
from slipstream.nets.actor_critic import ActorCritic
from slipstream.nets.policy import ActorCriticPolicy, Policy
from slipstream.reconstruction import Reconstruction
from slipstream.recording import Record, Recording
from slipstream.tape import RowByRow
from slipstream.team import Alone, Order, Team


class Objective(Protocol):
    """Losses of shards and the networks that they are functions of."""

    @property
    def modules(self) -> Sequence[str]:
        """Names of the networks, as `module` takes them."""
        ...

    def module(self, name: str) -> nn.Module:
        """A network, for its parameters and buffers."""
        ...

    def parameters(self, order: Order) -> list[nn.Parameter]:
        """What a gradient is taken by."""
        ...

    def losses(self, order: Order, parts: Sequence[Any]) -> list[Callable[[], ShardLoss]]:
        """The losses of shards, to be called on any thread.

        Args:
            order: Which loss, and when.
            parts: Of a minibatch, one per shard.
        """
        ...


def differentiated(crew: Crew, objective: Objective, order: Order, parts: Sequence[Any]) -> list[Gradient]:
    """The gradients of shards, on the threads of a crew."""
    return gradients(crew, objective.losses(order, parts), objective.parameters(order))


Differentiate = Callable[[Crew, Objective, Order, Sequence[Any]], list[Gradient]]
"""As `differentiated`."""


class Recordings:
    """`differentiated` on a GPU by recordings, one for each loss and size of minibatch, with the same bits.

    Gradients hold until the next call, metrics and errors for good. Losses that are other functions at another
    `progress` can't be recorded; they are given NaN. The crew's threads are not used.

    Args:
        device: The GPU, which all parts are on.
        record: Records there.
    """

    def __init__(self, device: torch.device, record: Record) -> None:
        self._device, self._record = device, record
        self._known: dict[tuple[Any, ...], Recording[list[Gradient]]] = {}

    def __call__(self, crew: Crew, objective: Objective, order: Order, parts: Sequence[Any]) -> list[Gradient]:
        """The gradients of shards, one after the other whatever the size of the crew."""
        by = objective.parameters(order)
        inputs: list[Tensor] = []

        def note(leaf: Tensor) -> Tensor:
            inputs.append(leaf)
            return leaf

        mapped(note, parts)
        shapes = tuple((each.shape, each.dtype) for each in inputs)
        key = (order.phase, order.delayed, tuple(map(id, by)), shapes)
        if key not in self._known:

            def differentiate(leaves: Sequence[Tensor]) -> list[Gradient]:
                rest = iter(leaves)
                same = mapped(lambda _: next(rest), parts)
                losses = objective.losses(order._replace(progress=math.nan), same)
                return [of_shard(loss, by) for loss in losses]

            self._known[key] = Recording(differentiate, inputs, self._device, self._record)
        return [
            Gradient(
                each.tensors,
                {name: value.clone() for name, value in each.metrics.items()},
                None if each.errors is None else each.errors.clone(),
            )
            for each in self._known[key](inputs)
        ]


Hire = Callable[[Objective, int], Team]
"""Finds those who differentiate some of the shards of an objective, given how many shards there are."""


def alone(objective: Objective, shards: int) -> Team:
    """Nobody."""
    return Alone()


class SlabObjective:
    """The loss of an actor-critic, with that of an auto-encoder beside it; satisfies `Objective`.

    Args:
        algorithm: Has the loss.
        policy: Is learned.
        reconstruction: The auto-encoder's part; None for none.

    Attributes:
        behaviour: The policy that acted, for gradients that are taken there.
    """

    def __init__(
        self, algorithm: SlabAlgorithm, policy: ActorCriticPolicy, reconstruction: Reconstruction | None = None
    ) -> None:
        self._algorithm, self._policy, self._reconstruction = algorithm, policy, reconstruction
        self._beside = [] if reconstruction is None else list(reconstruction.decoder.parameters())
        self._learned = self._of(policy)
        self.behaviour: Policy = policy

    @property
    def modules(self) -> Sequence[str]:
        """`policy`, `decoder`; and `behaviour`, once it is another than the policy."""
        decoder = () if self._reconstruction is None else ("decoder",)
        return ("policy", *decoder, *(() if self.behaviour is self._policy else ("behaviour",)))

    def module(self, name: str) -> nn.Module:
        """A network; a behaviour is made when it is first asked for."""
        if name == "decoder":
            assert self._reconstruction is not None
            return self._reconstruction.decoder
        if name == "behaviour" and self.behaviour is self._policy:
            self.behaviour = copy.deepcopy(self._policy)
        found = self.behaviour if name == "behaviour" else self._policy
        assert isinstance(found, nn.Module)
        return found

    def parameters(self, order: Order) -> list[nn.Parameter]:
        """Those of the policy that the gradient is evaluated at, and of the decoder."""
        return self._of(self.behaviour) if order.delayed else self._learned

    def losses(self, order: Order, parts: Sequence[Batch]) -> list[Callable[[], ShardLoss]]:
        """The algorithm's loss of what the policy says of a shard's rows."""
        at = self._at(order)
        judge: Any = at
        if self._algorithm.reuse_forward:
            assert isinstance(at, ActorCritic)
            judge = RowByRow(at)
        return [self.loss(order, judge, part) for part in parts]

    def loss(self, order: Order, judge: Any, part: Batch) -> Callable[[], ShardLoss]:
        """The loss of a shard of whose rows `judge` says what a policy says."""
        return partial(self._loss, judge, part, order.progress)

    def _loss(self, judge: Any, part: Batch, progress: float) -> ShardLoss:
        whole = part if self._reconstruction is None else self._reconstruction.beside(part)
        return *self._algorithm.loss(judge, whole, progress), None

    def _of(self, policy: Policy) -> list[nn.Parameter]:
        return [each for each in (*policy.parameters(), *self._beside) if each.requires_grad]

    def _at(self, order: Order) -> Policy:
        return self.behaviour if order.delayed else self._policy


class ReplayObjective:
    """The losses of an algorithm that replays; satisfies `Objective`.

    Args:
        algorithm: Has the losses.
        online: What is learned.
        target: What follows it.

    Attributes:
        parts: The parameters, by name, of each of the algorithm's parts, `policy`, `critic` or `critic.SUBMODULE`.
    """

    modules: Sequence[str] = ("policy", "critic", "target.policy", "target.critic")

    def __init__(self, algorithm: ReplayAlgorithm, online: Networks[Any, Any], target: Networks[Any, Any]) -> None:
        self._algorithm, self._online, self._target = algorithm, online, target
        self.parts = {part: self._of(part) for part in algorithm.parts}  # once: a gradient may be shorter than that

    def module(self, name: str) -> nn.Module:
        """A network."""
        kind, _, rest = name.rpartition(".")
        return getattr(self._target if kind else self._online, rest)

    def parameters(self, order: Order) -> list[nn.Parameter]:
        """Those of the phase's part."""
        return list(self.parts[self._phase(order).part].values())

    def losses(self, order: Order, parts: Sequence[Replayed[Any]]) -> list[Callable[[], ShardLoss]]:
        """The loss of the phase."""
        phase = self._phase(order)
        return [partial(self._loss, phase, part, order.progress) for part in parts]

    def _loss(self, phase: Phase, part: Replayed[Any], progress: float) -> ShardLoss:
        loss = phase.loss(self._online, self._target, part, progress)
        return loss.loss, loss.metrics, loss.error

    def _of(self, part: str) -> dict[str, nn.Parameter]:
        kind, _, path = part.partition(".")
        named = self.module(kind).get_submodule(path).named_parameters(part)
        return {name: each for name, each in named if each.requires_grad}

    def _phase(self, order: Order) -> Phase:
        return self._algorithm.phases(order.step)[order.phase]
