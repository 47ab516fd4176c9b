"""How a run would do on many machines: a model of collectors, network and learner, simulated event by event.

    collector   collects an unroll of its lane -> sends it -> takes the newest weights -> ...
    network     one link of the driver's: unrolls come in one after the other, weights go out node by node
    learner     takes a slab (an unroll of every lane) -> next version of the weights

The collectors wait and go on as the schedules have it: in turn with the learner (`sync`), a barrier per slab
(`concurrent`), or freely for as long as there is a place in the ring of slabs (`async`). What it takes for granted:

- an unroll takes the measured CPU time of its steps on a core of its own, give or take `SPREAD`; environments that wait
  without computing take longer than that;
- the learner's gradients share out over its cores without loss, and nothing else runs on them;
- the network has its bandwidth and no other traffic; its latency, and what Ray itself does per unroll, are nothing
  beside an unroll;
- nothing fails.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from slipstream import dice, slab, tree
from slipstream.envs.make import env_spec
from slipstream.nets.policy import Policy
from slipstream.run.config import Config
from slipstream.run.limit import Stages
from slipstream.types import EnvSpec

SPREAD = 0.1
"""Standard deviation of the time of an unroll, over its mean."""
_WARM_UP, _COUNTED = 10, 30  # updates
_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Times:
    """What takes how long, in seconds.

    Attributes:
        unroll: Collecting an unroll of a lane, in the mean.
        transfer: Its way through the driver's link.
        learn: An update from a slab, of an unroll of every lane.
        broadcast: The way of the weights through the driver's link to all nodes.
        spread: Standard deviation of `unroll` over its mean.
    """

    unroll: float
    transfer: float
    learn: float
    broadcast: float
    spread: float = SPREAD


@dataclass(frozen=True)
class Forecast:
    """How the run would do.

    Attributes:
        slabs_per_second: Updates per second.
        lag: Updates by which rows are older than the learner, in the mean.
        collecting: Share of the time that a collector collects.
        receiving: Share of the time that the driver's link brings rows.
        learning: Share of the time that the learner computes.
    """

    slabs_per_second: float
    lag: float
    collecting: float
    receiving: float
    learning: float

    @property
    def bottleneck(self) -> str:
        """What keeps the others waiting."""
        shares = {"collectors": self.collecting, "network": self.receiving, "learner": self.learning}
        return max(shares, key=lambda name: shares[name])


def forecast(schedule: str, lanes: int, times: Times, max_lag: int = 1) -> Forecast:
    """Simulates some updates of a run with one collector per lane.

    Args:
        schedule: `sync`, `concurrent` or `async`.
        lanes: Lanes.
        times: What takes how long.
        max_lag: As of the configuration, for `async`.
    """
    if schedule == "async":
        seconds, lag = _asynchronous(lanes, times, max_lag)
    else:
        seconds, lag = _in_step(lanes, times, schedule == "concurrent")
    return Forecast(
        slabs_per_second=1.0 / seconds,
        lag=lag,
        collecting=times.unroll / seconds,
        receiving=lanes * times.transfer / seconds,
        learning=times.learn / seconds,
    )


def plan(config: Config, stages: Stages, nodes: Sequence[int], gigabits: float) -> Iterator[str]:
    """Lines that say how `config` would do with collectors on more and more nodes like this machine.

    Args:
        config: The schedule, unroll and lanes' size count; there is one lane per core of the nodes.
        stages: What a step costs here.
        nodes: Numbers of nodes, beside the driver's.
        gigabits: Per second, of the driver's network, each way.
    """
    spec = env_spec(config.env, config.num_envs, config.lanes, config.env_options)
    policy = config.algo.make_policy(spec, config.net, None, config.seed)
    steps = spec.lane_size * config.unroll
    row, weights = row_bytes(config, spec, policy), sum(value.nbytes for value in policy.state_dict().values())
    rate = 1e9 / 8 * gigabits
    yield (
        f"{config.schedule}, a lane of {spec.lane_size} environments per core of a node of {stages.cores} cores, "
        f"unroll {config.unroll}; the learner on {stages.cores} cores of its own; {gigabits:g} Gbit/s; {row:,.0f} "
        f"bytes per step, {weights / 1e6:.1f} MB of weights per version and node"
    )
    yield "nodes   lanes   steps per update     steps/s    lag   collecting   receiving   learning   bottleneck"
    for number in nodes:
        lanes = number * stages.cores
        times = Times(
            unroll=steps * (stages.env + stages.infer),
            transfer=steps * row / rate,
            learn=lanes * steps * stages.learn / (1 if stages.gpu else stages.cores),
            broadcast=number * weights / rate,
        )
        found = forecast(config.schedule, lanes, times, config.max_lag)
        shares = f"{found.collecting:10.0%}   {found.receiving:9.0%}   {found.learning:8.0%}"
        yield (
            f"{number:5,}   {lanes:5,}   {lanes * steps:16,}   {found.slabs_per_second * lanes * steps:9,.0f}   "
            f"{found.lag:4.2f}   {shares}   {found.bottleneck}"
        )


def row_bytes(config: Config, spec: EnvSpec, policy: Policy) -> float:
    """Bytes of a row of a slot on its way to the learner, each frame of a stack once."""
    rows = slab.layout(spec, policy, config.unroll)
    obs = sum(leaf[0, 0].nbytes for leaf in tree.leaves(rows.pop("obs"))) / spec.frame_stack
    return obs + sum(leaf.nbytes for leaf in tree.leaves(rows)) / (config.unroll * spec.num_envs)


def _in_step(lanes: int, times: Times, overlapping: bool) -> tuple[float, float]:
    """Seconds per update and lag where all lanes wait at a barrier."""
    draws = _unrolls(lanes, times, _COUNTED)
    collected = np.sort(draws, axis=1)
    # Unroll i is through the link once it and those before it are: a queue of one server.
    arrived = (collected - times.transfer * np.arange(lanes)).max(axis=1) + times.transfer * lanes
    cycle = np.maximum(arrived, times.learn) if overlapping else arrived + times.learn
    return float(cycle.mean()) + times.broadcast, float(overlapping)


def _asynchronous(lanes: int, times: Times, max_lag: int) -> tuple[float, float]:
    """Seconds per update and lag where collectors wait for places only (`schedules.asynchronous`)."""
    updates = _WARM_UP + _COUNTED
    slabs = updates + max_lag + 1
    draws = iter(_unrolls(lanes, times, slabs).ravel())
    filled = [0] * slabs  # unrolls of each slab
    versions = [0] * slabs  # the sum of those that they were acted with
    events: list[tuple[float, int, str, int, int]] = []  # when, a number to keep order, what, slab, version
    numbers = count()
    now = begun = arrival = link_free = lag = 0.0
    idle, claimed, learned = lanes, 0, 0
    learning = False

    def follow(seconds: float, what: str, place: int = 0, version: int = 0) -> None:
        heapq.heappush(events, (now + seconds, next(numbers), what, place, version))

    while learned < updates:
        while idle and claimed // lanes <= learned + max_lag:
            idle -= 1
            follow(max(arrival - now, 0.0) + float(next(draws)), "collected", claimed // lanes, learned)
            claimed += 1
        if not learning and filled[learned] == lanes:
            learning = True
            lag += learned - versions[learned] / lanes if learned >= _WARM_UP else 0.0
            follow(times.learn, "learned")
        now, _, what, place, version = heapq.heappop(events)
        if what == "collected":
            link_free = max(link_free, now) + times.transfer
            follow(link_free - now, "received", place, version)
        elif what == "received":
            filled[place] += 1
            versions[place] += version
            idle += 1
        else:
            learned, learning = learned + 1, False
            arrival = now + times.broadcast  # of the weights, at the last node
            begun = now if learned == _WARM_UP else begun
    return (now - begun) / _COUNTED, lag / _COUNTED


def _unrolls(lanes: int, times: Times, count: int) -> _Floats:
    """Times of unrolls, `[count, lanes]`, drawn evenly from around the mean."""
    width = np.sqrt(12.0) * times.spread
    return times.unroll * (1.0 + width * (dice.generator(1, "plan").random((count, lanes)) - 0.5))
