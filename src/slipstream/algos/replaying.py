"""The contract between an algorithm that learns from a replay and the learner that runs it.

The loop that calls it, once per slab, after the slab has gone into the replay:

    for every gradient step that is due (`replay.ratio` of them per collected step, fractions carried):
        items = algorithm.gather(windows that were drawn)                   # once per shard, ahead of time
        for phase in algorithm.phases(number of the step):                  # e.g. critic, then actor
            for each shard, on any thread: loss = phase.loss(online, target, batch, progress); differentiate loss by
            the parameters of `phase.part` only
            add the gradients in shard order, clip, step
        mix the online networks into the targets by `algorithm.target_mix`
        give the windows that were drawn their new priorities
    policy.exploration = algorithm.exploration_rates(steps collected)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from slipstream.algos.algorithm import Algorithm, SlabAlgorithm
from slipstream.nets.policy import ExploringPolicy
from slipstream.nets.trunk import Network
from slipstream.replay.items import Transform
from slipstream.replay.options import ReplayOptions
from slipstream.replay.rows import Rows
from slipstream.types import EnvSpec

Index = NDArray[np.int64]

PolicyT = TypeVar("PolicyT", bound=ExploringPolicy)
CriticT = TypeVar("CriticT", bound=nn.Module)
ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Networks(Generic[PolicyT, CriticT]):
    """What is learned: the policy, which acts and is published, and what only the learner needs.

    Attributes:
        policy: The policy.
        critic: All else: critics, a temperature; a module without parameters where the policy is all.
    """

    policy: PolicyT
    critic: CriticT


@dataclass(frozen=True)
class Replayed(Generic[ItemT]):
    """One shard's part of a batch.

    Attributes:
        items: The windows, as the algorithm gathers them; N of them.
        weight: float32 `[N]`, importance weights over the number of windows in the whole batch.
        dice: float32 `[N, D]`, uniform in `[0, 1)`, for losses that draw; the same for all phases.
        share: One over the number of windows in the whole batch.
    """

    items: ItemT
    weight: Tensor
    dice: Tensor
    share: float

    def mean(self, rows: Tensor) -> Tensor:
        """This shard's part of the weighted mean of `rows[N]` over the batch, a scalar."""
        return (rows * self.weight).sum()

    def average(self, rows: Tensor) -> Tensor:
        """This shard's part of the plain mean of `rows[N]`, or of one value for all, over the batch; for metrics."""
        return self.share * rows.expand(len(self.weight)).sum()


class Loss(NamedTuple):
    """What a loss function answers for one shard.

    Attributes:
        loss: The shard's part of the loss, to be minimised; a sum over shards is the loss of the batch.
        metrics: Detached parts of means, which add up likewise.
        error: float32 `[N]`, detached: the new priorities, before their exponent; None where a phase has none.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    error: Tensor | None = None


class Phase(NamedTuple):
    """One step of one optimiser.

    Attributes:
        part: One of the algorithm's `parts`.
        loss: `loss(online, target, batch, progress)`.
    """

    part: str
    loss: Callable[[Any, Any, Any, float], Loss]


class ReplayAlgorithm(Algorithm, Protocol):
    """An algorithm that learns from a replay."""

    replays: ClassVar[Literal[True]]

    @property
    def parts(self) -> tuple[str, ...]:
        """Parameters with an optimiser of their own: prefixes of names in `policy.*` and `critic.*`."""
        ...

    @property
    def replay(self) -> ReplayOptions:
        """Size and use of the replay."""
        ...

    @property
    def batch_size(self) -> int:
        """Windows that one gradient step sees, over all shards (N)."""
        ...

    @property
    def optimizer_eps(self) -> float:
        """Epsilon of the optimisers, as it is used."""
        ...

    @property
    def span(self) -> int:
        """Rows of a window."""
        ...

    def stride(self, unroll: int) -> int:
        """Rows between the beginnings of two windows: 1, or `unroll` to begin with the recurrent state stored there.

        Raises:
            ValueError: If some rows of such unrolls would never be learned from.
        """
        ...

    def make_policy(self, spec: EnvSpec, network: Network, torso: nn.Module | None, seed: int) -> ExploringPolicy:
        """A policy with initial weights drawn from `seed`.

        Raises:
            ValueError: If the algorithm can't act in these environments.
        """
        ...

    def make_critic(self, spec: EnvSpec, network: Network, torso: nn.Module | None, seed: int) -> nn.Module:
        """What else is learned, with initial weights drawn from `seed`."""
        ...

    def loss_dice(self, spec: EnvSpec) -> int:
        """D, uniform numbers that the losses want per window."""
        ...

    def gather(self, rows: Rows, slots: Index, starts: Index, transform: Transform) -> Any:
        """The windows that begin at rows `starts` of `slots`, int64 `[N]` each; `transform` is that of rewards."""
        ...

    def phases(self, gradient_step: int) -> Sequence[Phase]:
        """What is to be done in the gradient step with this number, counted from 0."""
        ...

    def target_mix(self, gradient_step: int, before: float, now: float) -> float:
        """Share tau of the online networks in the targets, `target <- (1-tau) target + tau online`.

        Args:
            gradient_step: Number of the gradient step that was taken, counted from 0.
            before: Collected steps at which the gradient step before it was due, when they are evenly spread.
            now: Collected steps at which it was due.
        """
        ...

    def exploration_rates(self, steps: int, num_envs: int) -> NDArray[np.float32]:
        """Probability of a uniformly random action, by slot, float32 `[num_envs]`, after `steps` collected steps."""
        ...


AnyAlgorithm = SlabAlgorithm | ReplayAlgorithm
