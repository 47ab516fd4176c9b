"""The limit of a machine: what the stages of training cost alone, and the speed they add up to.

    on a CPU        limit = cores / (cpu-seconds per step of env + inference + learning, each measured alone)
    with a GPU      limit = 1 / (seconds per step of the slowest of the three, each measured alone)

It is what a run would reach if the stages shared the cores without ever waiting for each other; the efficiency of a run
is its speed over this limit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from slipstream import tree
from slipstream.nets.recorded import RecordedActor
from slipstream.nets.small import acting
from slipstream.recording import recorder
from slipstream.run.config import Config, override
from slipstream.run.machine import cores
from slipstream.run.training import Training
from slipstream.types import EnvSpec

STAGES = 3
"""That are measured one after the other."""


@dataclass(frozen=True)
class Stages:
    """Seconds that one step (agent decision) costs in each stage, measured alone.

    On a CPU they are CPU-seconds of all threads, with a GPU seconds on the clock.

    Attributes:
        env: Stepping the environments with random actions.
        infer: The forwards that acting takes, at the shape of one lane, or group of lanes: T+1 per T rows where the
            policy has extras (values), whose last row is the bootstrap.
        learn: All gradients, the sum over shards, the optimiser; and the forward of the target policy, if the schedule
            has rows of older ones and the algorithm asks for it. With a replay: taking rows in, drawing, gathering too.
        cores: Cores that the process may use.
        gpu: Whether the networks run on a GPU.
    """

    env: float
    infer: float
    learn: float
    cores: int
    gpu: bool

    @property
    def limit(self) -> float:
        """Steps per second if no core (or, with a GPU, the slowest stage) ever waited."""
        if self.gpu:
            return 1.0 / max(self.env, self.infer, self.learn)
        return self.cores / (self.env + self.infer + self.learn)

    def metrics(self) -> dict[str, float]:
        """`limit/*` in the names that benchmarks report."""
        return {
            "limit/env_seconds_per_step": self.env,
            "limit/infer_seconds_per_step": self.infer,
            "limit/learn_seconds_per_step": self.learn,
            "limit/steps_per_second": self.limit,
        }


def learning_at_once(config: Config) -> Config:
    """`config` without the steps that a replay collects before its first gradient."""
    return override(config, {"algo.replay.learning_starts": 0}) if config.algo.replays else config


def measure(config: Config, seconds: float = 3.0) -> Stages:
    """Measures the stages of `config` one after the other, about `seconds` each, in environments of its own.

    CPU time of this process is counted, so the environments must not be in worker processes, and everything is done
    here, in turn, whoever collects in the run and when.

    Raises:
        ValueError: If `config.placement.env_workers` is not 0.
    """
    if config.placement.env_workers:
        raise ValueError("the limit is measured with the environments in this process: set placement.env_workers=0")
    placement = replace(config.placement, collectors="thread", replay_shards=0)
    training = Training(replace(learning_at_once(config), schedule="sync", placement=placement))
    try:
        reports = iter(training)
        next(reports)  # warms up, and fills the slab
        spec, size = training.spec, training.spec.lane_size * config.group
        slab, learner = training.slabs[0], training.learner
        valid = int(slab.valid.sum())
        share = valid / slab.valid.numel()  # of the rows are steps; the others only end an episode
        lag = int(config.schedule != "sync")
        actions = _random_actions(spec)

        envs = training.envs
        assert envs is not None

        def step_lanes() -> float:
            for lane in range(spec.lanes):
                envs.send(actions, lane)
            for lane in range(spec.lanes):
                envs.recv(lane)
            return spec.num_envs * share

        device, policy = training.device, training.policy
        obs = tree.map(lambda leaf: leaf[0, :size].to(device), slab.obs)
        state = tree.map(lambda leaf: leaf.to(device), policy.initial_state(size))
        uniform = torch.full((size, policy.dice_width), 0.5, device=device)

        rows = slab.rows
        forwards = rows + bool(slab.extras)

        record = recorder(device, config.placement.cuda_graphs)
        if config.reuses_forward:
            actor = policy
        elif record is not None:
            actor = RecordedActor(policy, device, record)
        else:
            actor = acting(policy, size, device)

        def infer() -> float:
            with torch.no_grad():
                for _ in range(forwards):
                    actor.act(obs, state, uniform)
            return size * rows * share

        def learn() -> int:
            slab.version.fill_(learner.version - lag)
            learner.step(slab)
            return valid

        if config.algo.replays:
            while not learner.step(slab)["train/gradient_steps"]:  # until there is a batch to draw
                pass
        gpu = device.type == "cuda"
        env, infer_cost, learn_cost = (_cost(stage, seconds, gpu) for stage in (step_lanes, infer, learn))
        if config.reuses_forward:
            learn_cost -= infer_cost * rows / forwards  # a learner without tapes made the forwards again
        return Stages(env, infer_cost, learn_cost, cores(), gpu)
    finally:
        training.close()


def _cost(stage: Callable[[], float], seconds: float, gpu: bool) -> float:
    """Seconds per step of a stage that is called for about `seconds` of wall-clock time."""
    clock = _finished if gpu else time.process_time
    stage()
    end, start = time.perf_counter() + seconds, clock()
    steps = stage()  # once at least, also where other programs take all that time
    while time.perf_counter() < end:
        steps += stage()
    return (clock() - start) / steps


def _finished() -> float:
    """The time at which the GPU has done all that it was told."""
    torch.cuda.synchronize()
    return time.perf_counter()


def _random_actions(spec: EnvSpec) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """One random action per slot of a lane."""
    spec.action_space.seed(0)
    return np.stack([np.asarray(spec.action_space.sample()) for _ in range(spec.lane_size)])
