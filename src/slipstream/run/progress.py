"""Where a run stands: counters, the last episodes, the speed. The console, metrics and checkpoints read it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from slipstream.run.machine import cpu_seconds
from slipstream.types import Report

WINDOW = 100
"""Episodes behind every reported mean return."""

_MARKS = 32


class Observer(Protocol):
    """Watches a run: called once per update, in a fixed order, in the main thread."""

    def __call__(self, report: Report) -> None:
        """Takes note of one update."""
        ...

    def close(self) -> None:
        """Releases files and displays; may be called twice."""
        ...


class Mark(NamedTuple):
    """The clock at some update: `seconds` since the run began and inside each stage, and the steps by then."""

    seconds: float
    steps: int
    stages: Mapping[str, float]


class Budget(NamedTuple):
    """What the cores did for a stretch of a run.

    Attributes:
        cpu_seconds_per_step: Of all threads and processes of the run.
        limit: Steps per second if no core had ever waited: cores / CPU-seconds per step.
        efficiency: Share of the cores that the run kept busy, which is its speed over that limit.
    """

    cpu_seconds_per_step: float
    limit: float
    efficiency: float


class Spread(NamedTuple):
    """Mean, standard deviation, least and greatest of some numbers."""

    mean: float
    std: float
    least: float
    greatest: float


def spread(values: Any) -> Spread:
    """The spread of a non-empty sequence of numbers."""
    array = np.array(values, np.float64)
    return Spread(float(array.mean()), float(array.std()), float(array.min()), float(array.max()))


class Meter:
    """Measures the budget of a run from one asking to the next.

    Args:
        progress: The run's counters.
        cores: Cores that it may use.
    """

    def __init__(self, progress: Progress, cores: int) -> None:
        self._progress, self._cores = progress, cores
        self._last = self._now()

    def read(self) -> Budget | None:
        """The budget since the last reading; None if no step was taken."""
        before, self._last = self._last, self._now()
        steps, cpu, seconds = (now - then for now, then in zip(self._last, before, strict=True))
        if steps <= 0 or cpu <= 0 or seconds <= 0:
            return None
        return Budget(cpu / steps, self._cores * steps / cpu, cpu / (self._cores * seconds))

    def _now(self) -> tuple[float, float, float]:
        return self._progress.steps, cpu_seconds(), time.perf_counter()


class Progress:
    """The first observer: what all others read.

    Attributes:
        total_steps: Agent decisions to train for.
        stop_at_return: Mean return of a full window at which to end early, or None.
        frames_per_step: Emulator frames per decision.
        evaluates: Whether the run evaluates its policy, which then is what checkpoints are ranked by.
        steps: Agent decisions so far.
        before: Agent decisions at the update before.
        updates: Updates so far.
        episodes: Episodes finished so far.
        returns: Raw returns of the last `WINDOW` episodes.
        shaped: Their sums of raw rewards where scores are reported instead, else empty.
        lengths: Their lengths in steps.
        evaluation: The last evaluation's `eval/*` numbers, empty before there was one.
        evaluated_at: Steps at the last evaluation, -1 before there was one.
        began: The clock when it was set going, in this part of a resumed run.
    """

    def __init__(
        self,
        total_steps: int,
        frames_per_step: int,
        evaluates: bool = False,
        stop_at_return: float | None = None,
    ) -> None:
        self.total_steps, self.frames_per_step, self.evaluates = total_steps, frames_per_step, evaluates
        self.stop_at_return = stop_at_return
        self.steps = self.before = self.updates = self.episodes = 0
        self.returns: deque[float] = deque(maxlen=WINDOW)
        self.shaped: deque[float] = deque(maxlen=WINDOW)
        self.lengths: deque[int] = deque(maxlen=WINDOW)
        self.evaluation: dict[str, float] = {}
        self.evaluated_at = -1
        self._stages: dict[str, float] = {}
        self._earlier_seconds = 0.0
        self.start()

    def start(self) -> None:
        """Sets the clock going; what was set up before does not count as training."""
        self._start = time.perf_counter()
        self.began = self.mark()
        self._marks = deque([self.began], maxlen=_MARKS)

    def __call__(self, report: Report) -> None:
        """Counts one update."""
        self.before, self.steps, self.updates = self.steps, report.steps, report.update
        self.episodes += len(report.episodes)
        self.returns.extend(episode.reward for episode in report.episodes)
        self.shaped.extend(episode.shaped for episode in report.episodes if episode.shaped is not None)
        self.lengths.extend(episode.length for episode in report.episodes)
        for stage, seconds in report.seconds.items():
            self._stages[stage] = self._stages.get(stage, 0.0) + seconds
        self._marks.append(self.mark())

    def close(self) -> None:
        """Nothing to release."""

    @property
    def finished(self) -> bool:
        """Whether the run has taken all its steps, or has reached the return to stop at."""
        return self.steps >= self.total_steps or self.solved

    @property
    def solved(self) -> bool:
        """Whether the mean of a full window of training returns has reached `stop_at_return`."""
        if self.stop_at_return is None or len(self.returns) < WINDOW:
            return False
        return spread(self.returns).mean >= self.stop_at_return

    @property
    def score(self) -> float | None:
        """What a checkpoint taken now is ranked by, or None if nothing is known about these weights.

        In a run that evaluates it is the evaluation of these very weights; in others the mean training return of a full
        window, which lags behind the weights.
        """
        if self.evaluates:
            return self.evaluation["eval/mean_reward"] if self.evaluated_at == self.steps else None
        return spread(self.returns).mean if len(self.returns) == WINDOW else None

    @property
    def just_evaluated(self) -> bool:
        """Whether there was an evaluation after the last update; one that took no steps was not evaluated again."""
        return self.evaluated_at == self.steps != self.before

    def mark(self) -> Mark:
        """The clock now."""
        seconds = self._earlier_seconds + time.perf_counter() - self._start
        return Mark(seconds, self.steps, dict(self._stages))

    def recent(self) -> tuple[Mark, Mark]:
        """Two marks some updates apart, to take speeds and shares from."""
        return self._marks[0], self._marks[-1]

    def seconds_left(self) -> float | None:
        """Estimate from the recent speed; None before the first update."""
        first, last = self.recent()
        if last.steps == first.steps:
            return None
        return max(0, self.total_steps - self.steps) * (last.seconds - first.seconds) / (last.steps - first.steps)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to report as if it had not stopped."""
        return {
            "steps": self.steps,
            "updates": self.updates,
            "episodes": self.episodes,
            "returns": list(self.returns),
            "shaped": list(self.shaped),
            "lengths": list(self.lengths),
            "evaluation": self.evaluation,
            "evaluated_at": self.evaluated_at,
            "seconds": self.mark().seconds,
        }

    def load(self, facts: Mapping[str, Any]) -> None:
        """Continues from `state`."""
        self.steps = self.before = int(facts["steps"])
        self.updates, self.episodes = int(facts["updates"]), int(facts["episodes"])
        self.returns.extend(facts["returns"])
        self.shaped.extend(facts.get("shaped", ()))  # older checkpoints have none
        self.lengths.extend(facts["lengths"])
        self.evaluation, self.evaluated_at = dict(facts["evaluation"]), int(facts["evaluated_at"])
        self._earlier_seconds = float(facts["seconds"])
        self.start()
