"""Published weights: immutable snapshots of what acting needs, and replicas of the policy that follow them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from slipstream.nets.policy import Policy
from slipstream.types import Weights

_KEPT = 2


class Bulletin:
    """The newest snapshots, for readers in any thread of this process.

    A snapshot is never written to, and a reader takes the whole of it by one reference: it can't be torn.

    Args:
        mirrors: Told of every new snapshot, to carry it to other processes.
    """

    def __init__(self, mirrors: Sequence[Callable[[Weights], None]] = ()) -> None:
        self._snapshots: tuple[Weights, ...] = ()
        self._mirrors = mirrors

    def publish(self, weights: Weights) -> None:
        """Makes `weights` the newest; the one before it is kept as well."""
        self._snapshots = (*self._snapshots[1 - _KEPT :], weights)
        for mirror in self._mirrors:
            mirror(weights)

    def latest(self) -> Weights:
        """The newest snapshot.

        Raises:
            LookupError: Nothing has been published.
        """
        if not self._snapshots:
            raise LookupError("no weights have been published")
        return self._snapshots[-1]

    def version(self, number: int) -> Weights:
        """One of the two newest snapshots.

        Raises:
            LookupError: It is not one of them.
        """
        for weights in self._snapshots:
            if weights.version == number:
                return weights
        raise LookupError(f"weights {number} are not kept; there are {[kept.version for kept in self._snapshots]}")


class Replica:
    """A policy of its own memory that follows a bulletin.

    Args:
        policy: Overwritten by `refresh`; nobody else may use it meanwhile.
        bulletin: What to follow.
    """

    def __init__(self, policy: Policy, bulletin: Bulletin) -> None:
        self.policy = policy
        self._bulletin = bulletin
        self._version: int | None = None

    def refresh(self) -> int:
        """Takes over the newest weights, if they are new, and returns their version."""
        weights = self._bulletin.latest()
        if weights.version != self._version:
            copy_into(self.policy, weights.tensors)
            self._version = weights.version
        return weights.version


@torch.no_grad()
def copy_into(policy: Policy, tensors: Mapping[str, Tensor]) -> None:
    """Overwrites the policy's parameters and buffers, in place, with those of the same names."""
    for name, value in policy.state_dict().items():
        value.copy_(tensors[name])
