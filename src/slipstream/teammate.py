"""A learner that differentiates shards for another one, whatever ties the two together.

    first learner                                   teammate r
    told(order, parts), and what has changed     -> gradients of its shards
    adds, clips, applies, says what changed      <- gradients, shard by shard, or added up

Parameters and optimisers are the first learner's: a teammate can be replaced at any time, and nothing is lost. Tensors
go through torch.distributed; that there is something to receive is said on the tie.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from slipstream import parcel
from slipstream.crew import Crew
from slipstream.descent import Gradient, added, gradients
from slipstream.loader import mapped
from slipstream.objective import Objective
from slipstream.parcel import Letter
from slipstream.team import Reduction

MEETING_SECONDS = 60.0
"""To wait for all to meet, and for what one of them sends to come through."""

_INTERFACE = "GLOO_SOCKET_IFNAME"
_ADDRESS_OF = 0x8915  # Linux, SIOCGIFADDR; Python does not name it
_LOOPBACK = "lo" if sys.platform == "linux" else "lo0"


@dataclass(frozen=True)
class Duty:
    """What a teammate is told once.

    Attributes:
        objective: What is differentiated, with networks of any weights: they come with what is first asked.
        threads: That differentiate.
        devices: Where networks live, by rank from 1 on.
        reduction: Whether gradients travel shard by shard, or are added up on the way.
    """

    objective: Objective
    threads: int
    devices: Sequence[str]
    reduction: Reduction


@dataclass(frozen=True)
class Meeting:
    """Where learners meet.

    Attributes:
        url: `file://...` on one machine, `tcp://HOST:PORT` of the first learner elsewhere.
        size: Learners.
        seconds: To wait for the others, and for a message to come through.
    """

    url: str
    size: int
    seconds: float

    def join(self, rank: int) -> None:
        """Waits for all, as number `rank`; the first is 0.

        Raises:
            RuntimeError: They did not come in time.
        """
        before = os.environ.get(_INTERFACE)
        # On one machine nobody else can connect; on several, what a host's name stands for may be the loopback.
        interface = _LOOPBACK if self.url.startswith("file:") else _interface_towards(self.url)
        if interface:
            os.environ[_INTERFACE] = interface
        try:
            limit = timedelta(seconds=self.seconds)
            dist.init_process_group("gloo", self.url, timeout=limit, world_size=self.size, rank=rank)
        finally:
            os.environ.pop(_INTERFACE, None)
            if before is not None:
                os.environ[_INTERFACE] = before


class MeetingPlace:
    """A folder of this machine with a file for every meeting."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="slipstream-")
        self._numbers = count()

    def meeting(self, size: int) -> Meeting:
        """Where nobody has met before."""
        file = Path(self._folder.name, str(next(self._numbers)))
        return Meeting(file.as_uri(), size, MEETING_SECONDS)

    def close(self) -> None:
        """Removes the folder; the second call does nothing."""
        self._folder.cleanup()


def require_nobody() -> None:
    """Makes sure that there is no other group of processes.

    Raises:
        RuntimeError: There is.
    """
    if dist.is_initialized():
        raise RuntimeError(
            "several learners need torch.distributed to themselves, and this process has a process group already: "
            "call torch.distributed.destroy_process_group() before, or use placement.learners=1"
        )


class Teammate:
    """What a teammate holds.

    Args:
        duty: What it is to do.
        rank: Its number, from 1 on.
    """

    def __init__(self, duty: Duty, rank: int) -> None:
        self._objective, self._reduction = duty.objective, duty.reduction
        self._device = torch.device(duty.devices[rank - 1])
        for name in duty.objective.modules:
            duty.objective.module(name).to(self._device)
        self._crew = Crew(duty.threads)
        self._numbers = torch.empty(0)
        self._sum: Tensor | None = None

    def differentiate(self, wanted: Letter, news: Letter | None) -> Letter:
        """Receives parts of a minibatch and differentiates them; `deliver` is to follow.

        Args:
            wanted: Of the order with its parts, and what has changed.
            news: Of what has changed, which all are sent at once; None for nothing.

        Returns:
            Of what there is to deliver.
        """
        numbers = torch.empty(wanted.size, dtype=torch.uint8)
        dist.recv(numbers, 0)
        (order, parts), changes = parcel.unpack(wanted, numbers)
        if news is not None:
            numbers = torch.empty(news.size, dtype=torch.uint8)
            dist.broadcast(numbers, 0)
            changes = parcel.unpack(news, numbers)
        self._take(changes)
        parts = mapped(lambda leaf: leaf.to(self._device), parts)
        by = self._objective.parameters(order)
        found = gradients(self._crew, self._objective.losses(order, parts), by)
        if self._reduction != "ordered":
            found = [added(found)]
        if self._reduction == "all_reduce":
            self._sum = flat(found[0]).cpu()
            found = [found[0]._replace(tensors=())]
        letter, self._numbers = parcel.pack(found)
        return letter

    def deliver(self) -> None:
        """Sends what was found."""
        dist.send(self._numbers, 0)
        if self._sum is not None:
            dist.reduce(self._sum, 0)

    def close(self) -> None:
        """Ends its threads."""
        self._crew.close()

    @torch.no_grad()
    def _take(self, changed: dict[str, list[Tensor]]) -> None:
        for name, values in changed.items():
            for mine, value in zip(section(self._objective, name), values, strict=True):
                mine.copy_(value)


def _interface_towards(url: str) -> str | None:
    """The name of the network interface that leads to a host; None where it can't be found out."""
    parts = urlsplit(url)
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port))  # nothing is sent
        own = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                if fcntl.ioctl(probe, _ADDRESS_OF, struct.pack("256s", name.encode()))[20:24] == own:
                    return name
    return None


def section(objective: Objective, name: str) -> list[Any]:
    """The tensors of `MODULE.parameters` or `MODULE.buffers`."""
    module, _, kind = name.rpartition(".")
    return list(getattr(objective.module(module), kind)())


def flat(gradient: Gradient) -> Tensor:
    """All numbers of a gradient, `[n]`, in the order of the parameters' memory."""
    return torch.cat([parcel.in_memory_order(tensor) for tensor in gradient.tensors])
