"""What a user sees while a run goes on: a live panel on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import suppress

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from torch import Tensor

from slipstream.ranges import crossed
from slipstream.run.files import discard
from slipstream.run.machine import cores
from slipstream.run.progress import WINDOW, Budget, Mark, Meter, Progress, spread
from slipstream.types import Report

_PLAIN_LINES = 20
_PLAIN_STEPS = 100_000
"""Without a terminal a run has this many lines, or one every so many steps, unless the user sets the distance."""

_STAGES = ("collect", "learn", "env", "infer")

_REFRESH_SECONDS = 0.25
_NODES_SECONDS = 5.0

_SHOWN = ("entropy", "approx_kl", "explained_variance", "value_loss", "policy_loss", "learning_rate")


class Lasting(Console):
    """A console whose reader may go away (`| head`): from then on it is silent, and what was under way goes on."""

    def on_broken_pipe(self) -> None:
        """Has what is written from now on go nowhere, the rest of Python's buffer included."""
        self.quiet = True
        discard(self.file.fileno())
        if not self.stderr:
            with suppress(OSError):
                sys.stderr.write("slipstream: nobody reads the output any more; going on without it\n")


class Display:
    """Observer that shows the progress. It only reads, and the plain lines come by step count, never by the clock.

    Args:
        progress: The run's counters.
        title: One line that names the run.
        every: Steps between two plain lines; 0 for a twentieth of the run, at most 100,000.
        console: Where to write.
    """

    def __init__(self, progress: Progress, title: str, every: int, console: Console) -> None:
        self._progress, self._title, self._console = progress, title, console
        self._every = every or max(1, min(progress.total_steps // _PLAIN_LINES, _PLAIN_STEPS))
        self._shown_at = float("-inf")
        self._meter = Meter(progress, cores())
        self._budget: Budget | None = None
        self._nodes = Nodes()
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(console=console, auto_refresh=False, transient=False)
            self._live.start()
        else:
            self.say(title)

    def __call__(self, report: Report) -> None:
        """Shows one update, if it is time to."""
        progress = self._progress
        if self._live:
            now = time.perf_counter()
            if progress.finished or now - self._shown_at >= _REFRESH_SECONDS:
                self._shown_at = now
                self._budget = self._meter.read() or self._budget
                self._live.update(self._panel(report.metrics), refresh=True)
        elif progress.before == 0 or progress.finished or crossed(progress.before, progress.steps, self._every):
            self.say(plain_line(progress, self._meter.read(), self._nodes.text(report.metrics, progress)))

    def say(self, text: str) -> None:
        """Prints a line above the panel."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leaves the last panel on the screen."""
        if self._live:
            self._live.stop()
            self._live = None

    def _panel(self, metrics: Mapping[str, Tensor | float]) -> Group:
        progress = self._progress
        share = min(1.0, progress.steps / progress.total_steps)
        head = Table.grid(padding=(0, 1))
        head.add_row(
            ProgressBar(total=1.0, completed=share, width=32),
            f"{share:4.0%}",
            f"{progress.steps:,} of {progress.total_steps:,} steps",
            f"{clock(progress.seconds_left())} left",
        )
        body = Table.grid(padding=(0, 2))
        body.add_column(style="cyan", justify="right")
        body.add_row("speed", speed_text(progress))
        body.add_row("return", return_text(progress))
        if progress.evaluation:
            body.add_row("evaluation", _evaluation_text(progress))
        body.add_row("time", stages_text(*progress.recent()))
        if self._budget:
            body.add_row("cores", budget_text(self._budget))
        if cluster := self._nodes.text(metrics, progress):
            body.add_row("cluster", cluster)
        body.add_row("learning", _learning_text(metrics))
        return Group(Text(self._title, style="bold"), head, body)


class Nodes:
    """What the nodes of a Ray cluster bring, from one look at it to the next."""

    def __init__(self) -> None:
        self._steps: Mapping[str, float] | None = None
        self._seconds, self._speeds = 0.0, ""

    def text(self, metrics: Mapping[str, Tensor | float], progress: Progress) -> str:
        """Actors and their nodes, the driver's object store, and the steps per second of each node every few seconds.

        "" without a cluster.
        """
        if "cluster/actors" not in metrics:
            return ""
        prefix, seconds = "cluster/steps_", progress.recent()[1].seconds
        steps = {name.removeprefix(prefix): float(n) for name, n in metrics.items() if name.startswith(prefix)}
        if self._steps is None:
            self._steps, self._seconds = steps, seconds
        elif (passed := seconds - self._seconds) >= _NODES_SECONDS:
            new = {node: (count - self._steps.get(node, 0.0)) / passed for node, count in sorted(steps.items())}
            self._speeds = ", steps/s: " + ", ".join(f"{node} {speed:,.0f}" for node, speed in new.items())
            self._steps, self._seconds = steps, seconds
        actors, nodes = (int(metrics[f"cluster/{name}"]) for name in ("actors", "nodes"))
        return f"actors {actors} on {nodes} node{'s' * (nodes != 1)}{_store_text(metrics)}{self._speeds}"


def _store_text(metrics: Mapping[str, Tensor | float]) -> str:
    """How full the object store is, and what had no room in it."""
    if "cluster/store_used_megabytes" not in metrics:
        return ""
    used, size, spilled = (float(metrics[f"cluster/store_{part}_megabytes"]) for part in ("used", "size", "spilled"))
    return f", store {used:,.0f} of {size:,.0f} MB" + (f" ({spilled:,.0f} MB went to the disk)" if spilled else "")


def plain_line(progress: Progress, budget: Budget | None = None, cluster: str = "") -> str:
    """One line without a terminal: where the run is, how well it does, how fast it goes and where the time goes.

    `budget` is that since the line before, `cluster` is from `Nodes`. The columns are the same in all lines of a run,
    and of the same width but for the last of a cluster, so that the eye can run down them.
    """
    total = f"{progress.total_steps:,}"
    share = min(1.0, progress.steps / progress.total_steps)
    first, last = progress.recent()
    speed = (last.steps - first.steps) / max(last.seconds - first.seconds, 1e-9)
    passed = _shares(first, last)
    mean = std = length = "-"
    if progress.returns:
        returns, lengths = spread(progress.returns), spread(progress.lengths)
        mean, std, length = f"{returns.mean:.4g}", f"{returns.std:.3g}", f"{lengths.mean:,.0f}"
    parts = [
        f"{share:4.0%}",
        f"{progress.steps:>{len(total)},} steps",
        f"{progress.episodes:>7,} episodes",
        f"return {mean:>8} ± {std:<6}",
        f"length {length:>7}",
        f"{speed:>6,.0f} steps/s",
        f"{clock(progress.seconds_left()):>7} left",
        f"env {passed['env']:>3.0%}, infer {passed['infer']:>3.0%}, learn {passed['learn']:>3.0%}",
        f"cores {f'{budget.efficiency:.0%}' if budget else '-':>4} busy",
    ]
    if progress.evaluates:
        result = progress.evaluation
        shown = f"{result['eval/mean_reward']:.4g}" if result else "-"
        parts.insert(5, f"eval {shown:>8}")
    if cluster:
        parts.append(cluster)
    return " | ".join(parts)


def return_text(progress: Progress) -> str:
    """Mean raw return with its standard deviation and the mean length, over the last episodes."""
    if not progress.returns:
        return "no episode has ended yet"
    returns, lengths = spread(progress.returns), spread(progress.lengths)
    count = len(progress.returns)
    last = f"last {count} of {progress.episodes:,} episodes" if count == WINDOW else f"{count} episodes"
    return f"{returns.mean:.4g} ± {returns.std:.3g} ({last}, {lengths.mean:,.0f} steps long)"


def speed_text(progress: Progress) -> str:
    """Recent steps per second, and frames per second where a step is more than one frame."""
    first, last = progress.recent()
    speed = (last.steps - first.steps) / max(last.seconds - first.seconds, 1e-9)
    frames = f", {speed * progress.frames_per_step:,.0f} frames/s" if progress.frames_per_step > 1 else ""
    return f"{speed:,.0f} steps/s{frames}"


def budget_text(budget: Budget) -> str:
    """Share of the cores that is busy, and the speed that there would be if all of them were."""
    return f"{budget.efficiency:.0%} busy; {budget.limit:,.0f} steps/s if none ever waited"


def stages_text(first: Mark, last: Mark) -> str:
    """Shares of the time between two marks; env and infer are how collecting divides up."""
    passed = _shares(first, last)
    collect, learn, env, infer = (passed[name] for name in ("collect", "learn", "env", "infer"))
    split = f" (env {env:.0%}, infer {infer:.0%})" if env + infer > 0 else ""
    return f"collect {collect:.0%}{split}, learn {learn:.0%}, other {max(0.0, 1.0 - collect - learn):.0%}"


def _shares(first: Mark, last: Mark) -> dict[str, float]:
    """Shares of the time between two marks by stage; `env` and `infer` (summed over workers) share out `collect`."""
    elapsed = max(last.seconds - first.seconds, 1e-9)
    passed = {name: last.stages.get(name, 0.0) - first.stages.get(name, 0.0) for name in _STAGES}
    inside = max(passed["env"] + passed["infer"], 1e-9)
    collect, learn = passed["collect"] / elapsed, passed["learn"] / elapsed
    return {
        "collect": collect,
        "learn": learn,
        "env": collect * passed["env"] / inside,
        "infer": collect * passed["infer"] / inside,
    }


def _evaluation_text(progress: Progress) -> str:
    result = progress.evaluation
    return f"{result['eval/mean_reward']:.4g} ± {result['eval/std_reward']:.3g} at {progress.evaluated_at:,} steps"


def _learning_text(metrics: Mapping[str, Tensor | float]) -> str:
    """The few numbers that show whether learning is healthy; reading them waits for the device."""
    shown = {name: metrics.get(f"train/{name}") for name in _SHOWN}
    return "  ".join(f"{name} {float(value):.3g}" for name, value in shown.items() if value is not None)


def clock(seconds: float | None) -> str:
    """Minutes and seconds, with hours where there are any; ? where unknown."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
