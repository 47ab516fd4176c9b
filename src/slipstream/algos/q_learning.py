"""What the algorithms of Q-learning share: everything but the network's head and the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from slipstream import ranges
from slipstream.algos.algorithm import Correction, anneal
from slipstream.algos.exploring import Exploration, LrScaling, scaled_lr
from slipstream.algos.replaying import Index, Loss, Networks, Phase, Replayed
from slipstream.nets.q_policy import QPolicy
from slipstream.nets.trunk import Network
from slipstream.ops import q_learning
from slipstream.replay.items import Transform, transitions
from slipstream.replay.options import ReplayOptions
from slipstream.replay.rows import Rows
from slipstream.tree import Tree
from slipstream.types import EnvSpec

QNetworks = Networks[QPolicy, nn.Module]


class QLearning(Protocol):
    """Q-learning with a target network and epsilon-greedy exploration, as a rule from transitions of n steps."""

    correction: ClassVar[Correction] = "off_policy"
    max_lag: ClassVar[int | None] = None
    replays: ClassVar[Literal[True]] = True

    lr: float
    anneal_lr: bool
    lr_scaling: LrScaling
    gamma: float
    n_step: int
    batch_size: int
    target_every: int
    tau: float
    exploration: Exploration
    replay: ReplayOptions
    eps: float
    scale_eps: bool

    @property
    def parts(self) -> tuple[str, ...]:
        """One optimiser for the whole network."""
        return ("policy",)

    @property
    def span(self) -> int:
        """Rows of a return: `n_step`."""
        return self.n_step

    def stride(self, unroll: int) -> int:
        """1: any row."""
        return 1

    @property
    def optimizer_eps(self) -> float:
        """Epsilon, over the batch if so told."""
        return self.eps / self.batch_size if self.scale_eps else self.eps

    def make_critic(self, spec: EnvSpec, network: Network, torso: nn.Module | None, seed: int) -> nn.Module:
        """Nothing: the policy is all there is."""
        return nn.Module()

    def loss_dice(self, spec: EnvSpec) -> int:
        """0: the loss does not draw."""
        return 0

    def gather(self, rows: Rows, slots: Index, starts: Index, transform: Transform) -> Any:
        """Transitions of n steps."""
        return transitions(rows, slots, starts, self.n_step, self.gamma, transform)

    def phases(self, gradient_step: int) -> Sequence[Phase]:
        """One: the loss."""
        return (Phase("policy", self.loss),)

    def loss(self, online: QNetworks, target: QNetworks, batch: Replayed[Any], progress: float) -> Loss:
        """The algorithm's own."""
        ...

    def target_mix(self, gradient_step: int, before: float, now: float) -> float:
        """Tau, every `target_every` collected steps."""
        return self.tau if ranges.crossed(before, now, self.target_every) else 0.0

    def exploration_rates(self, steps: int, num_envs: int) -> NDArray[np.float32]:
        """Epsilon of every slot."""
        return self.exploration.rates(steps - self.replay.learning_starts, num_envs)

    def learning_rate(self, progress: float, num_envs: int) -> float:
        """Scaled with the batch; constant, or linear to 0."""
        return anneal(scaled_lr(self.lr, self.batch_size, self.lr_scaling), progress, self.anneal_lr)


def feed_forward(name: str, network: Network) -> Network:
    """The network, for an algorithm that learns from single transitions.

    Raises:
        ValueError: It has a memory.
    """
    if network.core != "none":
        raise ValueError(
            f"net.core={network.core}: {name} learns from single transitions; use --net.core none, or r2d2, which has "
            "sequences for it"
        )
    return network


def best_following(online: QNetworks, target: QNetworks, next_obs: Tree, double: bool) -> Tensor:
    """What the target network says of the best action at `next_obs`: its atoms or its quantiles, float32 `[N, ...]`.

    Args:
        online: The networks that are learned.
        target: The target networks.
        next_obs: Tree `[N, *O]`.
        double: Whether the online network says which action is best.
    """
    following = target.policy.unroll(next_obs)
    chooser = online.policy if double else target.policy
    judged = online.policy.unroll(next_obs) if double else following
    return q_learning.chosen(following, chooser.values(judged, next_obs).argmax(-1))
