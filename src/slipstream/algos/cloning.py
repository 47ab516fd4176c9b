"""What actor-critics make of replayed unrolls beyond V-trace: cloning of what was, and a bound on how far it may be.

CLEAR (Rolnick et al., 2019) adds on replayed rows, mu being the policy that acted and V_mu its values,

    clone_policy KL(mu || pi) + clone_value (V - V_mu)^2

so that what was learned once is not forgotten. After LASER (Schmitt et al., 2020) rows whose KL(mu || pi) exceeds a
bound are not learned from, since V-trace's truncated weights bias them most: their ratio counts as 0, so that the
policy gets no gradient from them and their value is its own target. The bonus for entropy counts them like all rows.

Deviation: LASER's relevance has the divergence in the other direction; that of mu is what the stored rows tell of.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.algos.algorithm import Batch
from slipstream.replay.mixer import REPLAYED
from slipstream.replay.options import UnrollReplay
from slipstream.types import Trajectory


def stored(options: UnrollReplay, trajectory: Trajectory) -> dict[str, Tensor]:
    """Columns `[T, B]` that the loss wants, as far as `options` have a use for them."""
    columns: dict[str, Tensor] = {}
    if options.remembers:
        columns["params"] = trajectory.extras["params"][:-1]
    if options.clones:
        columns |= {"old_value": trajectory.extras["value"][:-1], REPLAYED: trajectory.extras[REPLAYED][:-1]}
    return columns


def cloning_loss(
    options: UnrollReplay, kl: Tensor | None, value: Tensor, old_value: Tensor, replayed: Tensor
) -> Tensor:
    """CLEAR's two terms, float32, one per row; 0 on fresh rows.

    Args:
        options: Weights.
        kl: float32 `[...]`, KL(mu || pi); None if its weight is 0.
        value: float32 `[...]`, under the parameters being trained.
        old_value: float32 `[...]`, when the row was collected.
        replayed: float32 `[...]`, 1 on replayed rows.
    """
    loss = options.clone_value * (value - old_value).square()
    if kl is not None:
        loss = loss + options.clone_policy * kl
    return replayed * loss


def cloned(
    options: UnrollReplay, batch: Batch, kl: Tensor | None, value: Tensor
) -> tuple[Tensor | float, dict[str, Tensor]]:
    """A shard's part of `cloning_loss`, of the columns that `stored` gave a batch, and the same as metric `clone_loss`.

    It is 0, and no metric, where `options` want none.
    """
    if not options.clones:
        return 0.0, {}
    loss = batch.mean(cloning_loss(options, kl, value, batch.columns["old_value"], batch.columns[REPLAYED]))
    return loss, {"clone_loss": loss.detach()}


def within_region(log_ratio: Tensor, kl: Tensor | None, bound: float) -> Tensor:
    """The log-ratio of rows within the trust region, minus infinity outside; `bound` 0 is none."""
    return log_ratio if not bound or kl is None else torch.where(kl <= bound, log_ratio, -torch.inf)


def outside_region(kl: Tensor, bound: float) -> Tensor:
    """1.0 on rows outside of the trust region, 0.0 within it; their mean is the metric `outside_region`."""
    return (~(kl <= bound)).float()
