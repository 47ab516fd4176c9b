"""A learner that differentiates shards for another one, whatever ties the two together.

    first learner                                   teammate r
    told(order, parts), and what has changed     -> gradients of its shards
    adds, clips, applies, says what changed      <- gradients, shard by shard, or added up

Parameters and optimisers are the first learner's: a teammate can be replaced at any time, and nothing is lost. Tensors
go through torch.distributed; that there is something to receive is said on the tie.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from slipstream import parcel
from slipstream.crew import Crew
from slipstream.descent import Gradient, added
from slipstream.device import exact_kernels
from slipstream.jitter import Jitter
from slipstream.loader import mapped
from slipstream.objective import Objective, differentiated
from slipstream.parcel import Letter
from slipstream.team import Reduction

MEETING_SECONDS = 60.0
"""To wait for all to meet, and for what one of them sends to come through."""

_EVER = 365 * 86_400.0  # seconds; the end of the first learner is the end of this process in any case
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
        delay: Longest random delay before a shard, in seconds.
    """

    objective: Objective
    threads: int
    devices: Sequence[str]
    reduction: Reduction
    delay: float = 0.0


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

    def join(self, rank: int) -> Channel:
        """Waits for all, as number `rank`; the first is 0.

        Raises:
            Broken: They did not come in time.
        """
        limit, parts = timedelta(seconds=self.seconds), urlsplit(self.url)
        host, port = str(parts.hostname), parts.port or 0
        # On one machine nobody else can connect; on several, what a host's name stands for may be the loopback.
        interface = _LOOPBACK if parts.scheme == "file" else _interface_towards(host, port)
        kind: Any = dist.ProcessGroupGloo
        options = kind._Options()  # the documented way is a variable of the environment, which other threads read
        options._timeout = limit
        options._devices = [kind.create_device(interface=interface) if interface else kind.create_default_device()]
        with _breaking():
            store: Any
            if parts.scheme == "file":
                store = dist.FileStore(unquote(parts.path), self.size)  # pyright: ignore[reportPrivateImportUsage]
            else:
                store = dist.TCPStore(host, port, self.size, rank == 0, limit)  # pyright: ignore[reportPrivateImportUsage]
            return Channel(kind(store, rank, self.size, options))


class Channel:
    """The way to the other learners, for numbers; not torch's default group, which may be the program's own.

    Args:
        group: Of torch.distributed.
    """

    def __init__(self, group: Any) -> None:
        self._group: Any = group

    def send(self, numbers: Tensor, rank: int) -> Pending:
        """Begins to send; it is done when the other has taken it."""
        with _breaking():
            return Pending(self._group.send([numbers], rank, 0))

    def receive(self, size: int, rank: int) -> Tensor:
        """Waits for `size` bytes, uint8 `[size]`."""
        numbers = torch.empty(size, dtype=torch.uint8)
        with _breaking():
            self._group.recv([numbers], rank, 0).wait()
        return numbers

    def broadcast(self, numbers: Tensor) -> Pending:
        """Begins to send all what the first has."""
        with _breaking():
            return Pending(self._group.broadcast([numbers]))

    def reduce(self, numbers: Tensor) -> Pending:
        """Begins to add up what all have, at the first."""
        options = dist.ReduceOptions()
        options.rootRank = 0
        with _breaking():
            return Pending(self._group.reduce([numbers], options))

    def close(self) -> None:
        """Leaves the group, also if somebody holds on to this."""
        self._group = None


class Pending:
    """What a channel has begun.

    Args:
        work: Of torch.distributed.
    """

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self, seconds: float | None = None) -> None:
        """Waits until it is done, for so long, or as long as for the others to come to a meeting."""
        with _breaking():
            self._work.wait() if seconds is None else self._work.wait(timedelta(seconds=seconds))


class Broken(Exception):  # noqa: N818 - what it says
    """The way to another learner broke off, whoever's fault that is."""


@contextmanager
def _breaking() -> Generator[None]:
    """Makes `Broken` of what torch.distributed raises."""
    try:
        yield
    except RuntimeError as error:
        raise Broken(str(error)) from None


class MeetingPlace:
    """Folders of this machine, each for one meeting and no longer."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def meeting(self, size: int) -> Meeting:
        """Where nobody has met before."""
        self.close()
        self._folder = tempfile.TemporaryDirectory(prefix="slipstream-")
        return Meeting(Path(self._folder.name, "meeting").as_uri(), size, MEETING_SECONDS)

    def close(self) -> None:
        """Removes the folder of the last meeting, which is over."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


class Teammate:
    """What a teammate holds.

    Args:
        duty: What it is to do.
        rank: Its number, from 1 on.
    """

    def __init__(self, duty: Duty, rank: int) -> None:
        self._objective, self._reduction = duty.objective, duty.reduction
        self._device = torch.device(duty.devices[rank - 1])
        exact_kernels(self._device)
        for name in duty.objective.modules:
            duty.objective.module(name).to(self._device)
        self._crew = Crew(duty.threads, before=Jitter(duty.delay) if duty.delay else None)
        self._rank, self._numbers = rank, torch.empty(0)
        self._channel: Channel | None = None
        self._sum: Tensor | None = None

    def join(self, meeting: Meeting) -> None:
        """Meets the others."""
        self._channel = meeting.join(self._rank)

    def differentiate(self, wanted: Letter, news: Letter | None) -> Letter:
        """Receives parts of a minibatch and differentiates them; `deliver` is to follow.

        Args:
            wanted: Of the order with its parts, and what has changed.
            news: Of what has changed, which all are sent at once; None for nothing.

        Returns:
            Of what there is to deliver.
        """
        channel = self._joined
        (order, parts), changes = parcel.unpack(wanted, channel.receive(wanted.size, 0))
        if news is not None:
            numbers = torch.empty(news.size, dtype=torch.uint8)
            channel.broadcast(numbers).wait()
            changes = parcel.unpack(news, numbers)
        self._take(changes)
        parts = mapped(lambda leaf: leaf.to(self._device), parts)
        found = differentiated(self._crew, self._objective, order, parts)
        if self._reduction != "ordered":
            found = [added(found)]
        if self._reduction == "all_reduce":
            self._sum = flat(found[0]).cpu()
            found = [found[0]._replace(tensors=())]
        letter, self._numbers = parcel.pack(found)
        return letter

    def deliver(self) -> None:
        """Sends what was found, and waits until it is taken: the first learner may be busy for long."""
        self._joined.send(self._numbers, 0).wait(_EVER)
        if self._sum is not None:
            self._joined.reduce(self._sum).wait(_EVER)

    def close(self) -> None:
        """Ends its threads."""
        self._crew.close()

    @property
    def _joined(self) -> Channel:
        assert self._channel is not None, "it has not met the others"
        return self._channel

    @torch.no_grad()
    def _take(self, changed: dict[str, list[Tensor]]) -> None:
        for name, values in changed.items():
            for mine, value in zip(section(self._objective, name), values, strict=True):
                mine.copy_(value)


def _interface_towards(host: str, port: int) -> str | None:
    """The name of the network interface that leads to a host; None where it can't be found out."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # nothing is sent
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
