"""The acting forward, kept: a gradient at the parameters that acted needs no second one.

    collector    forward of row 0 | forward of row 1 | ... | forward of row T-1        (of one lane, with its graph)
    learner                                                                    | one backward through all of them

An algorithm whose gradient is taken where its rows come from asks for it with `reuse_forward`. The gradient is then
the sum over lanes of one backward each. Where the collectors are in other processes, and graphs can't travel,
`RowByRow` runs the same forwards again, of the same shapes, so that the bits are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slipstream import slab, tree
from slipstream.nets.actor_critic import ActorCritic
from slipstream.nets.policy import Outputs
from slipstream.nets.trunk import Encoded
from slipstream.tree import Tree


class Tape:
    """Who acts for a slab, and what was said there, by lane and row.

    One collector writes a lane, one shard of the learner reads it, after the barrier.

    Args:
        policy: Acts; its parameters stay as they are from the first row to the gradient.
        lanes: Number of lanes.

    Attributes:
        policy: As given.
        version: Of the policy's parameters.
        lanes: For each lane, what the policy said of its rows, with graphs.
    """

    def __init__(self, policy: ActorCritic, lanes: int) -> None:
        self.policy = policy
        self.version = 0
        self.lanes: list[list[Outputs]] = [[] for _ in range(lanes)]


class Told:
    """What was said of the rows `[T, b]` of a lane, for a loss that asks a policy."""

    def __init__(self, rows: Sequence[Outputs]) -> None:
        self._rows = rows

    def unroll(self, obs: Tree, state0: Tree = (), first: Tensor | None = None) -> Outputs:
        """The rows one after the other, whatever is asked."""
        return _joined(self._rows)


class RowByRow:
    """A policy that judges rows `[T, b]` as a collector has it judge them: one forward per row."""

    def __init__(self, policy: ActorCritic) -> None:
        self._policy = policy

    def unroll(self, obs: Tree, state0: Tree = (), first: Tensor | None = None) -> Outputs:
        """What the policy says; arguments as of `ActorCritic.unroll`, rows `[T, b]`."""
        rows, state = list[Outputs](), state0
        for t in range(len(tree.leaves(obs)[0])):
            if t and first is not None and self._policy.recurrent:
                state = slab.keep(state, ~first[t])
            out, state = self._policy.judge(tree.map(lambda leaf, t=t: leaf[t], obs), state)
            rows.append(out)
        return _joined(rows)


def _joined(rows: Sequence[Outputs]) -> Outputs:
    """Outputs `[b]` of T rows as `[T, b]`."""
    params = torch.stack([row.distribution.params() for row in rows])
    encoded = [row.encoded for row in rows if row.encoded is not None]
    return Outputs(
        rows[0].distribution.like(params),
        torch.stack([row.value for row in rows]),
        Encoded(*(torch.cat(parts) for parts in zip(*encoded, strict=True))) if encoded else None,
    )
