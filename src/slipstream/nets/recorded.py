"""Acting on a GPU by a recording of the policy's forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slipstream import tree
from slipstream.nets.policy import Policy
from slipstream.recording import Record, Recording
from slipstream.tree import Tree
from slipstream.types import Act


class RecordedActor:
    """Acts in place of a policy, for slots of one number, with the same bits; satisfies `Acts`.

    What it says holds until it is asked again. It follows what is copied into the policy's parameters, and holds for as
    long as they lie where they are.

    Args:
        policy: The policy, on `device`.
        device: A GPU.
        record: Records there.
    """

    def __init__(self, policy: Policy, device: torch.device, record: Record) -> None:
        self._policy, self._device, self._record = policy, device, record
        self._recording: Recording[Act] | None = None

    def act(self, obs: Tree, state: Tree, dice: Tensor, greedy: bool = False, slot: Tensor | None = None) -> Act:
        """As of `Policy`, of tensors that may be in page-locked memory; draws only."""
        if greedy:
            raise ValueError("a recorded actor draws its actions")
        shown = (obs, state, dice, () if slot is None else slot)
        inputs = tree.leaves(shown)
        if self._recording is None:

            def act(leaves: Sequence[Tensor]) -> Act:
                rest = iter(leaves)
                obs, state, dice, slot = tree.map(lambda _: next(rest), shown)
                return self._policy.act(obs, state, dice, slot=slot if isinstance(slot, Tensor) else None)

            self._recording = Recording(act, inputs, self._device, self._record)
        return self._recording(inputs)
