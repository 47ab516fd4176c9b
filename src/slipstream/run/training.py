"""One run put together: environments, policy, learner, collectors and the schedule that drives them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import gymnasium
from torch import Tensor, nn

from slipstream import device, dice, ray_replay, slab, tree
from slipstream.arithmetic import adopted, keep_freed_memory
from slipstream.collector import Assignment, Collected, Stands
from slipstream.crew import Crew
from slipstream.descent import under
from slipstream.envs import make_envs
from slipstream.envs.make import env_spec
from slipstream.envs.recorded import RecordedEnvs, recorded
from slipstream.envs.workers import WorkerEnvs
from slipstream.jitter import Jitter, JitteredEnvs
from slipstream.link import Medium
from slipstream.loader import Loader
from slipstream.local import Locals
from slipstream.nets.actor_critic import ActorCritic
from slipstream.nets.policy import ActorCriticPolicy, Policy
from slipstream.nets.trunk import packed
from slipstream.on_stream import OnStream
from slipstream.outpost import Work
from slipstream.process_link import Processes
from slipstream.ray_cluster import Cluster
from slipstream.ray_link import Actors
from slipstream.ready import group_that_holds, make_collector
from slipstream.recording import recorder
from slipstream.remote import Remotes
from slipstream.replay.rows import SEGMENT
from slipstream.replay.sharded import ShardedRows
from slipstream.run import sizes
from slipstream.run.config import Config, ConfigError
from slipstream.run.learners import Learners
from slipstream.run.learning import make_learner
from slipstream.run.machine import cores, gains_by_bfloat16, processor
from slipstream.schedules import SCHEDULES, Parts
from slipstream.schedules.parts import Barrier
from slipstream.schedules.wake import Wake
from slipstream.standing import Standing
from slipstream.tape import Tape
from slipstream.types import Envs, Report, Weights
from slipstream.weights import Bulletin, Replica

EnvMaker = Callable[[], gymnasium.Env[Any, Any]]


class Training:
    """Everything that a run needs, ready to iterate: one report per update until the step budget is spent.

    Args:
        config: The complete configuration.
        env: Builds one environment, in place of the id `config.env`.
        torso: The user's feature extractor, in place of `config.net.torso`.
        policy: The user's whole policy, in place of `config.net`.
        jitter: Random delays in environments and workers, to show that they change nothing.

    Attributes:
        spec: Spaces and slots of the environments.
        policy: Acts and learns; updated in place.
        learner: Owner of the optimisers and counters.
        envs: The environments; None where collector processes have them.
        slabs: What collectors fill and the learner reads; several where the two overlap.
        device: Where the policy lives.
    """

    def __init__(
        self,
        config: Config,
        env: EnvMaker | None = None,
        torso: nn.Module | None = None,
        policy: ActorCriticPolicy | None = None,
        jitter: Jitter | None = None,
    ) -> None:
        if torso is not None and policy is not None:
            raise ConfigError("a whole policy has its own torso: give torso or policy, not both")
        self._config = config
        place = config.placement
        self.device = device.chosen(place.device)
        remote = place.collectors in ("process", "ray")
        on_cpu = self.device.type == "cpu" or remote
        if config.net.precision == "bfloat16" and on_cpu and gains_by_bfloat16() is False:
            warnings.warn(
                f"net.precision=bfloat16 is slower than float32 on this processor, {processor()}: it has no "
                "instructions for it, or slow ones",
                stacklevel=2,
            )
        lanes = config.lanes
        if remote and self.device.type != "cpu" and config.schedule != "async":
            raise ConfigError(
                f"placement.collectors={place.collectors} acts on the CPU, so that its bits would not be those of a "
                "GPU: use --placement.device cpu, --placement.collectors thread with --placement.env-workers, or "
                "--schedule async, where no two runs are the same"
            )
        self._remotes: Remotes | None = None
        self._recorded: RecordedEnvs | None = None
        self._staff: Remotes | Locals | None = None  # from the first iteration on
        self._running: Generator[Report] | None = None
        self._barrier = Barrier()
        self._env_seed = config.seed
        self._standing: Standing | None = None  # to go on from
        self._wake: Wake | None = None
        self._standing_anew = self._cut = False
        self._exact = "exact"
        self._workers: WorkerEnvs | None = None
        keep_freed_memory()
        with adopted():  # so do threads of native environments
            self.envs: Envs | None = None if remote else self._make_envs(env, jitter)
        inline = place.collectors == "inline"
        self._cluster: Cluster | None = None
        self._shards: ShardedRows | None = None
        self._grows = False
        threads, actors = sizes.threads(config)
        delay = 0.0 if jitter is None else jitter.seconds
        self._learners = Learners(config, self.device, threads, delay)
        self._crew = Crew(threads, before=jitter)
        # Where collecting and learning overlap, both have as many threads as there are cores: the system gives a core
        # that one side leaves idle to the other.
        shared = config.schedule == "sync" and threads == actors
        self._actors = self._crew if shared else Crew(actors, inline=inline, before=jitter)
        self._lanes = sizes.shares(config, self._actors.workers)
        self._loader = Loader(0 if inline else place.loaders, self.device, before=jitter)
        try:
            given = env or config.env
            self.spec = self.envs.spec if self.envs else env_spec(given, config.num_envs, lanes, config.env_options)
            about = config, self.spec, torso, policy
            self.learner = make_learner(*about, self._crew, self._loader, self.device, self._learners.hire)
            self.policy: Policy = self.learner.policy
            stored = None if self.learner.windows is None else self.learner.windows.rows
            self._shards = stored if isinstance(stored, ShardedRows) else None
            self._group = group_that_holds(self.policy, self.spec, config.group, self.device)
            if remote:
                linked = self.learner.windows is not None or config.reward == "scale"
                self._grows = sizes.grows(config, self._lanes) and not linked  # these want unrolls in their order
                self._remotes = Remotes(self._work(given, jitter), self._lanes, self._medium, self._grows)
                self.slabs = self._remotes.slabs
            else:
                pin, count = self.device.type == "cuda", sizes.slabs(config)
                self.slabs = [slab.allocate(self.spec, self.policy, config.unroll, pin=pin) for _ in range(count)]
            if self._cluster is None:
                self._learners.start(None)
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[Report]:
        """Trains, from the start or from what `load` was given.

        Where that does not say how the environments came to where they were, they start afresh, from other seeds.
        """
        config = self._config
        bulletin = self._bulletin()
        tapes = self._tapes()
        staff = self._begin(bulletin, tapes)
        if self._config.schedule == "async" and self.plays_back:
            self._wake = Wake(self.spec, self.slabs, staff.marks, self._standing)
        delayed = config.algo.correction == "delayed_gradient" and config.schedule != "sync" and not tapes
        parts = Parts(
            actors=self._actors,
            collectors=staff.collectors,
            learner=self.learner,
            slabs=self.slabs,
            bulletin=bulletin,
            behaviour=copy.deepcopy(self.policy) if delayed else None,
            lane_size=self.spec.lane_size,
            total_steps=config.total_steps,
            max_lag=config.max_lag,
            stale=config.stale,
            tapes=tapes,
            barrier=self._barrier,
            wake=self._wake,
            staff=staff.metrics,
        )
        self._running = SCHEDULES[config.schedule](parts)
        try:
            for report in self._running:
                if self._cut:  # what was ahead has been learned from
                    self.learner.restart_episodes()
                    self._cut = False
                yield report
                if self._standing_anew:  # as after a resume
                    self._standing_anew, self._env_seed = False, self._seed_anew()
                    self._start(staff)
        finally:
            self._running.close()

    def restart(self) -> None:
        """Has all slots start new episodes before the next unroll, as a run does that goes on from `state` here."""
        self._standing_anew = True

    @property
    def plays_back(self) -> bool:
        """Whether the environments can be brought back to where they were at a checkpoint.

        Not under `async` where collectors fill the places of others, so that a lane's unrolls come in any order.
        """
        return self.spec.seeded_every > 0 and not self._grows

    @property
    def starts_anew(self) -> bool:
        """Whether the environments are to start anew at every checkpoint, since they can't be brought back."""
        return self._config.exact_resume and not self.plays_back

    @property
    def at_rest(self) -> bool:
        """Whether what `state` returns now is what a run goes on from as exactly as it can."""
        return self._barrier.at_rest or not (self.plays_back or self.starts_anew)

    @property
    def caveats(self) -> list[str]:
        """What the same seed does not give, and why, in sentences."""
        found = [] if self._learners.caveat is None else [self._learners.caveat]
        if not self.spec.deterministic:
            found.append(f"{self.spec.id} is not deterministic: the same seed will not give the same run.")
        return found

    @property
    def resumes(self) -> str:
        """How a run that was stopped goes on, in a sentence."""
        if self.learner.windows is not None and not self._config.log.save_replay:
            return "with an empty replay, so that bits will differ (--log.save-replay saves it)"
        if not self.spec.deterministic:
            return f"with new episodes; {self.spec.id} is not deterministic"
        if self._learners.asynchronous:
            return "with learners that are asynchronous; no two runs are the same"
        if self.plays_back and self._config.schedule == "async":
            return "environments are played back to where they were; under async no two runs are the same"
        if self.plays_back:
            return f"{self._exact}; environments are played back to where they were"
        if self.starts_anew:
            anew = "environments start new episodes at every checkpoint, in runs that are not stopped too"
            return f"{self._exact}; {anew}"
        if self._config.schedule == "async":
            return "with new episodes; under async no two runs are the same"
        return (
            f"with new episodes, so that bits will differ; {self.spec.id} can't be brought back to where it was "
            "(--exact-resume has it start anew at every checkpoint)"
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that must be saved for a resume but the replay; to be called between two updates."""
        tensors, facts = self.learner.state()
        facts["device"] = self.device.type
        facts["resumes"] = self.resumes
        if self._config.reduction == "all_reduce":
            facts["learners"] = self._config.placement.learners
        barrier = self._barrier
        if not (self.plays_back or self.starts_anew):
            return tensors, facts
        if not self.at_rest:
            facts["resumes"] = "with new episodes, so that bits will differ; environments had failed, or just begun"
            return tensors, facts
        if self.plays_back:
            assert self._staff is not None
            standing = self._staff.state() if self._wake is None else self._wake.standing()
            tensors |= _named("standing.", standing.tensors())
            facts["env_seed"] = self._env_seed
        if barrier.ahead is not None:
            tensors |= _named("ahead.", dict(tree.items(vars(self.slabs[barrier.ahead]))))
            facts["ahead"] = [asdict(collected) for collected in barrier.collected]
        if barrier.behaviour is not None:
            tensors |= _named("behaviour.", barrier.behaviour.tensors)
            facts["behaviour"] = barrier.behaviour.version
        return tensors, facts

    def load(
        self,
        tensors: dict[str, Tensor],
        facts: dict[str, Any],
        replay: Iterable[Mapping[str, Tensor]] | None = None,
        fitting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Continues from what `state` returned; call before iterating.

        With the segments of a `replay`, `tensors` hold its state, named `replay.*`; without them it stays empty. What
        belongs to networks is loaded in the context `fitting`.

        Another kind of device, or another number of shards or of learners whose gradients are all-reduced, is a
        warning: the run goes on with other rounding, which `resumes` tells too.
        """
        learners = self._config.placement.learners
        here = {"device": self.device.type, "shards": self.learner.shards, "learners": learners}
        other = [name for name, value in here.items() if facts.get(name, value) != value]  # old checkpoints lack some
        if other:
            before, now = (", ".join(f"{name}={values[name]}" for name in other) for values in (facts, here))
            warnings.warn(f"this run had {before}, here it has {now}: bits will differ", stacklevel=2)
            self._exact = f"exact, but only from here on ({before} until now)"
        windows = self.learner.windows
        if replay is not None and windows is not None:
            windows.load(under("replay.", tensors), replay)
        with fitting():
            self.learner.load(tensors, facts)
        version = self.learner.version
        self._env_seed = self._seed_anew() if version else self._config.seed
        if self.plays_back and "env_seed" in facts:
            self._env_seed = int(facts["env_seed"])
            self._standing = Standing.of(under("standing.", tensors))
        elif self.plays_back:
            self._exact = f"exact, but only from here on (new episodes after step {self.learner.steps})"
            return
        elif not self.starts_anew:
            return
        if "ahead" in facts:
            for name, leaf in tree.items(vars(self.slabs[0])):
                leaf.copy_(tensors[f"ahead.{name}"])
            self._barrier.ahead, self._barrier.collected = 0, [Collected.of(told) for told in facts["ahead"]]
        if "behaviour" in facts:
            self._barrier.behaviour = Weights(facts["behaviour"], under("behaviour.", tensors))

    def close(self) -> None:
        """Ends environments, processes and threads; an iteration under way ends where it is."""
        pieces = (
            self._running,  # first, since it stops the collectors
            self._learners,
            self._shards,
            self._loader,  # before the cluster is left: what gathers may be waiting for it
            self._remotes,
            self._actors,  # before the environments: nobody must step what is closed
            self.envs,
            self._crew,
        )
        with ExitStack() as stack:  # closes the last that it was given first, and all of them, though one may fail
            for piece in reversed(pieces):
                if piece is not None:
                    stack.callback(piece.close)

    def awaited(self) -> list[str]:
        """Processes that have environments, are waited for, and what they are busy with; called by any thread."""
        if self._remotes is not None:
            return self._remotes.awaited()
        return [] if self._workers is None else self._workers.awaited()

    def _make_envs(self, env: EnvMaker | None, jitter: Jitter | None) -> Envs:
        """The environments of a run whose collectors are in this process."""
        config, place = self._config, self._config.placement
        envs = make_envs(
            env or config.env,
            config.num_envs,
            config.lanes,
            config.env_options,
            workers=place.env_workers,
            threads=place.env_threads,
        )
        self._workers = envs if isinstance(envs, WorkerEnvs) else None
        envs = envs if jitter is None else JitteredEnvs(envs, jitter)
        self._recorded = recorded(envs, place.restarts)
        return self._recorded or envs

    def _work(self, env: str | EnvMaker, jitter: Jitter | None) -> Work:
        """What collector processes are to do."""
        config, policy = self._config, self.policy
        if self.device.type != "cpu":
            policy = copy.deepcopy(policy)
            assert isinstance(policy, nn.Module)
            policy.cpu()
        return Work(
            env=env,
            options=config.env_options,
            workers=config.placement.env_workers,
            threads=config.placement.env_threads,
            spec=self.spec,
            policy=policy,
            rows=config.unroll,
            slabs=sizes.slabs(config),
            seed=config.seed,
            group=self._group,
            every_row=sizes.every_row(config),
            graphs=config.reuses_forward,
            delay=0.0 if jitter is None else jitter.seconds,
            restarts=config.placement.restarts,
            ahead=sizes.ahead(config),
        )

    def _medium(self, work: Work, parts: Sequence[Work]) -> Medium:
        """What ties collectors in other processes to this one."""
        if self._config.placement.collectors == "process":
            return Processes(work, parts)
        place, shards = self._config.placement, self._shards
        carried = 0 if shards is None else min(shards.bytes, SEGMENT)
        others = self._learners.cpus + place.replay_shards
        actors = Actors(work, parts, place.address, cores(), others, carried, elastic=self._grows)
        self._cluster = actors.cluster
        self._learners.start(actors.cluster)  # these first: without them nothing is learned, whoever collects
        if shards is not None:
            shards.start(ray_replay.shards(actors.cluster, place.replay_shards, self.spec.frame_stack))
        return actors

    def _bulletin(self) -> Bulletin | None:
        """Where collectors find weights, unless they act with the learner's own policy."""
        if self._remotes is not None:
            return Bulletin([self._remotes.publish])
        return None if self._config.schedule == "sync" or self._keeps_forwards else Bulletin()

    def _tapes(self) -> list[Tape]:
        """One per slab, if forwards are kept; they have policies of their own to act with."""
        if not self._keeps_forwards:
            return []
        own, lanes = self.policy, self.spec.lanes
        assert isinstance(own, ActorCritic)
        return [Tape(own if len(self.slabs) == 1 else copy.deepcopy(own), lanes) for _ in self.slabs]

    @property
    def _keeps_forwards(self) -> bool:
        """Whether gradients go back through the forwards of acting; between processes these are made again instead."""
        return self._config.reuses_forward and self._remotes is None and self._config.placement.learners == 1

    def _begin(self, bulletin: Bulletin | None, tapes: Sequence[Tape]) -> Remotes | Locals:
        """Who collects, with all environments reset, or brought back to where they were."""
        if self._remotes is not None:
            staff = self._remotes
        else:
            assert self.envs is not None
            staff = Locals(self.envs, self._recorded, self._lanes, partial(self._collector, bulletin, tapes))
        self._staff = staff
        if self._standing is None:
            self._start(staff)
        elif lost := staff.restore(self._env_seed, self._standing):
            warnings.warn(
                f"after the same actions, slots {lost} show something else than before the run was stopped: "
                f"{self.spec.id} is not deterministic, or not what it was. All start new episodes; bits will differ",
                stacklevel=2,
            )
            self._env_seed, self._standing = self._seed_anew(), None
            self._start(staff)
        return staff

    def _start(self, staff: Remotes | Locals) -> None:
        """Resets all environments: their slots start an episode after the slab that is ahead, if there is one."""
        if self._barrier.ahead is None:
            self.learner.restart_episodes()
        else:
            self._cut = True
        staff.begin(self._env_seed, self._first_row())

    def _seed_anew(self) -> int:
        """For environments that start anew at this version."""
        return dice.env_seed(self._config.seed, "resume", self.learner.version)

    def _collector(self, bulletin: Bulletin | None, tapes: Sequence[Tape], lanes: range, row: int) -> Stands:
        """A collector; where it acts while the learner learns, beside that on a GPU."""
        make = partial(self._acting, bulletin, tapes, lanes, row)
        return make() if bulletin is None or self.device.type == "cpu" else OnStream(make, self.device)

    def _acting(self, bulletin: Bulletin | None, tapes: Sequence[Tape], lanes: range, row: int) -> Stands:
        """A collector that acts with the learner's own policy, or with a copy that follows the bulletin."""
        assert self.envs is not None
        config = self._config
        own = copy.deepcopy if config.reuses_forward else packed
        replica = None if bulletin is None else Replica(own(self.policy), bulletin)
        given = Assignment(
            self.envs,
            lanes,
            replica.policy if replica else self.policy,
            self.slabs,
            config.seed,
            replica.refresh if replica else lambda: self.learner.version,
            every_row=sizes.every_row(config),
            row=row,
            device=self.device,
            graphs=config.reuses_forward,
            tapes=tapes,
            record=recorder(self.device, config.placement.cuda_graphs),
        )
        return make_collector(given, self._group)

    def _first_row(self) -> int:
        """Number of every slot's first row after a start or resume; no row that was learned from has it.

        Under `async` lanes are uneven and rows are dropped, so that a slot may have had more than `unroll` a version.
        """
        unroll = 1 << 32 if self._config.schedule == "async" else self._config.unroll
        return (self.learner.version + (self._barrier.ahead is not None)) * unroll


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}
