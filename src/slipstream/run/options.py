"""Arguments and flags of the verbs of the command line; `slipstream VERB --help` is made of these docstrings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class TrainFlags:
    """Flags of `train` beside the settings.

    Attributes:
        config: Settings over the preset: a YAML file with some or all of them, or a run directory.
        print_config: Print the whole configuration and stop.
    """

    config: str = ""
    print_config: bool = False


@dataclass(frozen=True)
class ResumeOptions:
    """Train a run on from its newest whole checkpoint.

    Attributes:
        run: Run directory.
        total_steps: New total of agent decisions; 0 keeps the run's own.
    """

    run: str
    total_steps: int = 0


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
    """

    run: str
    episodes: int = 1
    checkpoint: str = "last"
    greedy: bool = False
    seed: int | None = None
    format: Literal["auto", "gif", "mp4"] = "auto"
    max_steps: int = 5_000


@dataclass(frozen=True)
class EnvsOptions:
    """List environments.

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
