"""The learners of a run beside the first one: how many, where, and what becomes of their gradients."""

from __future__ import annotations

import torch

from slipstream.objective import Objective, alone
from slipstream.ray_cluster import Cluster
from slipstream.ray_team import RayHall
from slipstream.run.config import Config, ConfigError
from slipstream.team import Team
from slipstream.team_group import Group
from slipstream.team_leader import Apart, Leader, Together
from slipstream.team_processes import ProcessHall
from slipstream.teammate import Duty

_SECONDS = 300.0
"""After which a learner that has not answered is given up."""


class Learners:
    """Those who share the work on gradients with the learner of this process.

    Args:
        config: The configuration.
        device: Of this learner.
        threads: That each has.
        delay: Longest random delay to inject before a shard, in seconds.
    """

    def __init__(self, config: Config, device: torch.device, threads: int, delay: float = 0.0) -> None:
        self._config, self._device, self._threads, self._delay = config, device, threads, delay
        self._others = config.placement.learners - 1
        self._leader: Leader | None = None
        self._duty: Duty | None = None

    @property
    def cpus(self) -> int:
        """Cores of a cluster that the others take."""
        return self._others * self._threads

    @property
    def caveat(self) -> str | None:
        """What the same seed does not give because of them, in a sentence; None for nothing."""
        if self._others and self._config.reduction == "all_reduce":
            return "Gradients are all-reduced: another number of learners would round differently."
        if self.asynchronous:
            return "Learners are asynchronous: the same seed will not give the same run."
        return None

    @property
    def asynchronous(self) -> bool:
        """Whether gradients are applied as they come."""
        return self._others > 0 and self._config.reduction == "asynchronous"

    def hire(self, objective: Objective, shards: int) -> Team:
        """Whom the learner asks; they are to be started before it does.

        Raises:
            ConfigError: There are not enough shards or GPUs.
        """
        count, device = self._others + 1, self._device.type
        if count == 1:
            return alone(objective, shards)
        if count > shards and not self.asynchronous:
            raise ConfigError(
                f"placement.learners={count}: each needs a shard of the gradient, and there are {shards}: use --shards "
                f"{count} or more, which changes the result, or --learners {shards}"
            )
        if device == "cuda" and torch.cuda.device_count() < count:
            raise ConfigError(
                f"placement.learners={count}: one GPU each is wanted, and {torch.cuda.device_count()} are here; use "
                "fewer, or --placement.device cpu"
            )
        devices = [f"cuda:{rank}" if device == "cuda" else device for rank in range(1, count)]
        reduction = self._config.reduction
        self._duty = Duty(objective, self._threads, devices, reduction, self._delay)
        group = Group(count, self._config.placement.restarts, _SECONDS)
        self._leader = (
            Apart(objective, group)
            if reduction == "asynchronous"
            else Together(objective, group, shards, reduction == "ordered")
        )
        return self._leader

    def start(self, cluster: Cluster | None) -> None:
        """Starts them; returns at once.

        Args:
            cluster: Where they are; None for processes of this machine.

        Raises:
            NotPortable: The networks can't be sent to another process.
        """
        if self._leader is None or self._duty is None:
            return
        hall = ProcessHall(self._duty, self._others) if cluster is None else RayHall(cluster, self._duty, self._others)
        self._leader.start(hall)

    def close(self) -> None:
        """Ends them; the second call does nothing."""
        if self._leader is not None:
            self._leader.close()
