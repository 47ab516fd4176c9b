"""Arguments and flags of the verbs of the command line; `slipstream VERB --help` is made of these docstrings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from slipstream import ranges

PLACEMENTS = ("thread:1", "thread:2", "thread:4", "process:1", "process:2", "process:4")
"""What `verify` compares with inline."""


@dataclass(frozen=True)
class TrainFlags:
    """Flags of `train` beside the settings.

    Attributes:
        config: Settings over the preset: a YAML file with some or all of them, or a run directory.
        system: Schedule of a published system: paac, alternating, hts, impala or appo.
        print_config: Print the whole configuration and stop.
    """

    config: str = ""
    system: str = ""
    print_config: bool = False


@dataclass(frozen=True)
class VerifyFlags:
    """Runs a configuration inline and under other placements with random delays, and compares all bits.

    ALGO, --env ENV and every other setting are typed as for `train`.

    Attributes:
        config: As for `train`.
        system: As for `train`.
        updates: Updates to compare.
        placements: Placements to compare with inline: thread:N, process:N or ray:N collectors, with as many threads
            that gather batches, learners:N, shards:N of the replay on Ray, or graphs, with placement.cuda_graphs.
        delay: Longest random delay before a lane's step or a worker's or loader's task, in seconds.
    """

    config: str = ""
    system: str = ""
    updates: int = 20
    placements: tuple[str, ...] = PLACEMENTS
    delay: float = 0.002

    def __post_init__(self) -> None:
        """Refuses numbers that mean nothing."""
        ranges.at_least(self, "", 1, "updates")
        ranges.between(self, "", 0, 60, "delay")
        if not self.placements:
            raise ValueError("placements must name one at least, such as thread:2")


@dataclass(frozen=True)
class BenchFlags:
    """Measures how fast algorithms train under schedules and placements, and the limit that they are held against.

    ALGO (one or more), --env ENV and every setting are typed as for `train`.

    Attributes:
        config: As for `train`, for one algorithm.
        system: As for `train`.
        schedules: Schedules to measure; those that an algorithm can't have are left out. None named: its own.
        placements: `default` for the configured one, thread:N, process:N, ray:N, learners:N, shards:N, inline, graphs.
        rounds: Alternating rounds.
        seconds: Length of each training; the stages are measured for a quarter of it.
        output: JSON file for the result, with machine, versions and command.
    """

    config: str = ""
    system: str = ""
    schedules: tuple[str, ...] = ()
    placements: tuple[str, ...] = ("default",)
    rounds: int = 3
    seconds: float = 20.0
    output: str = ""

    def __post_init__(self) -> None:
        """Refuses numbers that mean nothing."""
        ranges.above(self, "", 0, "seconds")
        ranges.at_least(self, "", 1, "rounds")
        for name in self.schedules:
            if name not in ("sync", "concurrent", "async"):
                raise ValueError(f"unknown schedule {name!r}: expected sync, concurrent or async")


@dataclass(frozen=True)
class DoctorFlags:
    """Measures what a step costs on this machine, names the bottleneck, and looks for a faster placement.

    ENV and every setting are typed as for `train`.

    Attributes:
        config: As for `train`.
        system: As for `train`.
        seconds: Length of each of some twenty measurements.
        rounds: Alternating rounds in which a faster placement must win.
        schedules: Try lanes, environments and schedules as well, which change the result.
        apply: File to write the faster placement into, for `train --config`; its other settings stay as they are.
        plan: Numbers of nodes like this machine; says how the configuration would do with its collectors there, from
            what a step costs here and a model of network and learner, in place of all trials.
        gigabits: Per second, of the driver's network, each way, for `plan`.
    """

    config: str = ""
    system: str = ""
    plan: tuple[int, ...] = ()
    gigabits: float = 10.0
    seconds: float = 4.0
    rounds: int = 3
    schedules: bool = True
    apply: str = ""

    def __post_init__(self) -> None:
        """Refuses numbers that mean nothing."""
        ranges.above(self, "", 0, "seconds", "gigabits")
        ranges.at_least(self, "", 1, "rounds")
        if min(self.plan, default=1) < 1:
            raise ValueError(f"plan must be numbers of at least 1 node, got {min(self.plan)}")


@dataclass(frozen=True)
class ResumeOptions:
    """Train a run on from its newest whole checkpoint.

    Other settings may be typed too, as for `train`, if the bits of a run that met no fault do not depend on them:
    `--placement.*`, `--log.*`, `--skip-gradients`, `--env-options.non-finite`. So may `--stop-at-return`, and `--env`
    with another environment of the same spaces, to go on there.

    Attributes:
        run: Run directory.
        total_steps: New total of agent decisions; 0 keeps the run's own.
        latest: RUN is a directory of runs, of which the newest is meant; it is no error if that is finished. For jobs
            that are started again and again until they succeed.
    """

    run: str
    total_steps: int = 0
    latest: bool = False


@dataclass(frozen=True)
class EvalOptions:
    """Mean return of a run's policy over whole episodes.

    Attributes:
        run: Run directory, or what `Agent.save` wrote.
        episodes: Episodes to play.
        checkpoint: last, best, or a number of steps.
        greedy: Take the most probable actions instead of drawn ones.
        seed: Another seed than the run's.
    """

    run: str
    episodes: int = 30
    checkpoint: str = "last"
    greedy: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuses numbers that mean nothing."""
        _refuse(self, "episodes")


@dataclass(frozen=True)
class WatchOptions:
    """Record episodes of a run's policy as videos.

    Attributes:
        run: Run directory, or what `Agent.save` wrote.
        episodes: Episodes to record, one file each.
        checkpoint: last, best, or a number of steps.
        greedy: Take the most probable actions instead of drawn ones.
        seed: Another seed than the run's.
        format: gif, or mp4 (needs the extra `video`); auto is mp4 where it is installed.
        max_steps: Steps after which a recording ends.
        reconstruct: Show what the policy sees and what the run's auto-encoder draws of it beside the game.
    """

    run: str
    episodes: int = 1
    checkpoint: str = "last"
    greedy: bool = False
    seed: int | None = None
    format: Literal["auto", "gif", "mp4"] = "auto"
    max_steps: int = 5_000
    reconstruct: bool = False

    def __post_init__(self) -> None:
        """Refuses numbers that mean nothing."""
        _refuse(self, "episodes", "max_steps")

    def stem(self, steps: int, episode: int) -> str:
        """Name of an episode's file without its ending: what is recorded otherwise does not take another's place."""
        manner = {
            "greedy": self.greedy,
            f"seed{self.seed}": self.seed is not None,
            f"max{self.max_steps}": self.max_steps != WatchOptions.max_steps,
            "reconstructed": self.reconstruct,
        }
        return "-".join([str(steps), str(episode), *(word for word, told in manner.items() if told)])


@dataclass(frozen=True)
class EnvsOptions:
    """List environments; those of toys with what `--env-options.kwargs.NAME VALUE` sets of them.

    Attributes:
        word: Show only ids that contain this.
    """

    word: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[WORD]")] = ""


@dataclass(frozen=True)
class CheckOptions:
    """Test an environment for the contract.

    Attributes:
        env: Its id, such as CartPole-v1.
    """

    env: str


def _refuse(options: EvalOptions | WatchOptions, *counts: str) -> None:
    """Refuses numbers that mean nothing."""
    ranges.at_least(options, "", 1, *counts)
    if options.seed is not None:
        ranges.at_least(options, "", 0, "seed")
