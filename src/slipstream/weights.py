"""Published weights: immutable snapshots of what acting needs, and replicas of the policy that follow them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from slipstream.nets.policy import Policy
from slipstream.tree import Tree
from slipstream.types import Weights

_RING = 3  # snapshots in shared memory


class Bulletin:
    """The newest snapshot, for readers in any thread of this process.

    A snapshot is never written to, and a reader takes the whole of it by one reference: it can't be torn.

    Args:
        mirrors: Told of every new snapshot, to carry it to other processes.
    """

    def __init__(self, mirrors: Sequence[Callable[[Weights], None]] = ()) -> None:
        self._newest: Weights | None = None
        self._mirrors = mirrors

    def publish(self, weights: Weights) -> None:
        """Makes `weights` the newest."""
        self._newest = weights
        for mirror in self._mirrors:
            mirror(weights)

    def latest(self) -> Weights:
        """The newest snapshot.

        Raises:
            LookupError: Nothing has been published.
        """
        if self._newest is None:
            raise LookupError("no weights have been published")
        return self._newest


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
            received(weights)
            copy_into(self.policy, weights.tensors)
            self._version = weights.version
        return weights.version


class Ring:
    """The newest snapshots in shared memory: one process publishes, any number of others follow.

    Publication n goes to place n % 3. Its place is marked with n before anything is written there, and n becomes the
    newest when all is written. A reader takes the newest, and believes it if its place is still marked with n after
    the last byte was read: nobody had begun to overwrite it. Otherwise it takes the newest once more, which only
    happens if two whole publications and the beginning of a third fell into one reading. Nobody waits for anybody.

    It relies on stores becoming visible in their order, as x86 promises.

    Args:
        memory: Tensors as `Ring.layout` has them, in memory that processes share.
    """

    def __init__(self, memory: Tree) -> None:
        self._newest = memory["newest"].numpy()
        self._marks, self._versions = memory["marks"].numpy(), memory["versions"].numpy()
        self._places: tuple[dict[str, Tensor], ...] = memory["places"]

    @staticmethod
    def layout(policy: Policy) -> Tree:
        """What the ring consists of, for weights like the policy's, as tensors without memory."""

        def meta(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int64, device="meta")

        tensors = {
            name: torch.empty(value.shape, dtype=value.dtype, device="meta")
            for name, value in policy.state_dict().items()
        }
        return {"newest": meta(1), "marks": meta(_RING), "versions": meta(_RING), "places": (tensors,) * _RING}

    def publish(self, weights: Weights) -> None:
        """Makes `weights` the newest; to be called by one process only."""
        number = int(self._newest[0]) + 1
        place = number % _RING
        self._marks[place] = number
        self._versions[place] = weights.version
        for name, value in self._places[place].items():
            value.copy_(weights.tensors[name])
        self._newest[0] = number

    def newest(self) -> int:
        """Number of the newest publication; 0 if there is none."""
        return int(self._newest[0])

    def read(self, policy: Policy) -> tuple[int, int]:
        """Overwrites the policy with the newest weights, and returns their publication and version.

        Raises:
            LookupError: Nothing has been published.
        """
        while number := self.newest():
            place = number % _RING
            version = int(self._versions[place])
            copy_into(policy, self._places[place])
            if int(self._marks[place]) == number:
                return number, version
        raise LookupError("no weights have been published")


class RingReplica:
    """A policy that follows a ring, as `Replica` follows a bulletin.

    Args:
        policy: Overwritten by `refresh`; nobody else may use it meanwhile.
        ring: What to follow.
    """

    def __init__(self, policy: Policy, ring: Ring) -> None:
        self.policy = policy
        self._ring = ring
        self._number = self._version = 0

    def refresh(self) -> int:
        """Takes over the newest weights, if they are new, and returns their version."""
        if self._number == 0 or self._ring.newest() != self._number:
            self._number, self._version = self._ring.read(self.policy)
        return self._version


def snapshot(policy: Policy, version: int) -> Weights:
    """A copy of the policy's parameters and buffers, `ready` when the current stream of a GPU has made it."""
    tensors = {name: value.clone() for name, value in policy.state_dict().items()}
    gpus = [value.device for value in tensors.values() if value.is_cuda]
    return Weights(version, tensors, torch.cuda.current_stream(gpus[0]).record_event() if gpus else None)


def received(weights: Weights) -> None:
    """Has the current stream of a GPU wait until the tensors have their values, and keeps their memory for it."""
    if weights.ready is None:
        return
    there = [value for value in weights.tensors.values() if value.is_cuda]
    stream = torch.cuda.current_stream(there[0].device)
    stream.wait_event(weights.ready)
    for value in there:
        value.record_stream(stream)


@torch.no_grad()
def copy_into(policy: Policy, tensors: Mapping[str, Tensor]) -> None:
    """Overwrites the policy's parameters and buffers, in place, with those of the same names."""
    for name, value in policy.state_dict().items():
        value.copy_(tensors[name])
