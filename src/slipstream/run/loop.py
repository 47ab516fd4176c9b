"""Training from start to end: the loop, its observers, and what a signal, an error or a resume means for them.

    for report in training:             # the schedule: acts, learns, yields
        for observer in observers:      # progress, evaluation, metrics, checkpoints, display; in this order
            observer(report)

SIGINT, SIGTERM and SIGHUP are noted, and obeyed after the update that is under way: a checkpoint is written, then the
run ends. A second signal ends it at once, and the last periodic checkpoint is what remains.
"""

from __future__ import annotations

import copy
import shlex
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium
from gymnasium.vector import VectorEnv
from rich.console import Console
from torch import Tensor, nn

from slipstream.envs import EnvError, make_envs
from slipstream.envs.recorded import recorded
from slipstream.envs.slot import close_all
from slipstream.nets.autoencoder import Decoder
from slipstream.nets.policy import ActorCriticPolicy, Policy
from slipstream.run import checkpoint, metrics
from slipstream.run.checkpoint import Checkpoint
from slipstream.run.concerns import Concerns
from slipstream.run.config import CALLABLE, Config, override
from slipstream.run.console import Display
from slipstream.run.directory import RunDirectory, RunLock, create
from slipstream.run.evaluate import Evaluator, slots
from slipstream.run.files import CheckpointError
from slipstream.run.learning import replay_line
from slipstream.run.machine import versions
from slipstream.run.metrics import Metrics
from slipstream.run.presets import by_key, spelled_out
from slipstream.run.progress import Observer, Progress
from slipstream.run.saving import Checkpoints
from slipstream.run.segments import Segments
from slipstream.run.settings import ConfigError, flatten, plain
from slipstream.run.signals import Interrupted, Signals
from slipstream.run.stall import StallWatch
from slipstream.run.training import Training
from slipstream.run.unused import warn_slow_target, warn_unlearned, warn_unused
from slipstream.types import Envs, EnvSpec

EnvFactory = Callable[[], gymnasium.Env[Any, Any]]

_FREE = ("total_steps", "stop_at_return", "placement.", "log.", "skip_gradients", "env_options.non_finite")
"""Beginnings of settings that may change from one part of a run to the next, as its `env` may: what a run that met no
fault does not depend on."""

_CHECKPOINTS = ("log.checkpoint_every", "log.eval_every")
"""What checkpoints depend on, and so do the bits where environments start anew at every one."""

_ARGUMENTS = "env_options.kwargs"
"""Settings of the environment's own; any may be missing."""

_PATIENCE = 2.0
"""Seconds for the checkpoint that is being written when a run is to end at once."""


@dataclass(frozen=True)
class Trained:
    """What a finished run hands back.

    Attributes:
        run: Its directory.
        spec: Spaces of its environments.
        policy: The trained policy.
        progress: Its counters and last episodes.
        decoder: Its auto-encoder's, if it has one.
    """

    run: RunDirectory
    spec: EnvSpec
    policy: Policy
    progress: Progress
    decoder: Decoder | None


class Finished(ConfigError):  # noqa: N818 - nothing went wrong with the run
    """A run that has no steps left to take."""


@dataclass(frozen=True)
class Own:
    """A user's own pieces of a run, which a configuration file can't hold.

    Attributes:
        env: Makes one environment, in place of the id.
        torso: A network in place of `net.torso`.
        policy: A whole policy in place of `net`.
    """

    env: EnvFactory | None = None
    torso: nn.Module | None = None
    policy: ActorCriticPolicy | None = None


def train(config: Config, own: Own, command: Sequence[str], console: Console) -> Trained:
    """Trains a new run from its first step.

    Args:
        config: The whole configuration.
        own: A user's own pieces.
        command: What was typed, for the run's records.
        console: Where progress is shown.

    Raises:
        Interrupted: After SIGINT or SIGTERM, with the state saved.
    """
    with ExitStack() as locked, closing(_training(config, own, console)) as training:
        warn_unused(config, training.spec, own.torso is not None, own.policy is not None)
        warn_unlearned(config, training.learner)
        warn_slow_target(config)
        run = create(config, command)
        lock = locked.enter_context(run.lock())  # until the training has been closed
        return _drive(_Run(config, own, training, run, lock, _progress(config, training), console), None)


def resume(path: Path, own: Own, changes: Mapping[str, Any], console: Console) -> Trained:
    """Trains on from the newest whole checkpoint of a run: counters, optimiser, anneals and metrics continue.

    Its replay need not be whole where `log.save_replay` is false: the run then goes on with an empty one.

    Args:
        path: The run directory.
        own: The user's own pieces that the run was started with.
        changes: Settings to go on with. A new `total_steps` is taken whatever the return, unless there is a new
            `stop_at_return` too; another `env` is where the run trains from now on.
        console: Where progress is shown.

    Raises:
        Finished: If the run has taken all its steps, or has reached the return to stop at.
        ConfigError: If a setting was changed, here or in its config.yaml, that would make another run of it.
        CheckpointError: If there is no whole checkpoint, it does not fit the environment or the network, or the metrics
            can't be cut to it; the run is left as it was.
        Interrupted: After SIGINT or SIGTERM, with the state saved.
    """
    run = RunDirectory(path)
    before = run.config()
    changes = by_key(before.algo.name, changes)
    if "total_steps" in changes:
        changes = {"stop_at_return": None, **changes}
    config = spelled_out(override(before, changes))
    require_callable(config, own.env, path)
    with ExitStack() as stack:
        lock = stack.enter_context(run.lock())
        saved = checkpoint.newest(run.checkpoints, replay=config.log.save_replay)
        tensors, facts = saved.tensors(), saved.facts()
        if "training" not in facts:
            raise ConfigError(f"{path} holds a saved agent, not a run: there is no optimiser state to train on with")
        _require_same(config, facts.get("config") or plain(before), path)  # older checkpoints have none
        _require_unsolved(config, facts["progress"], path)
        if "total_steps" in changes and saved.steps >= config.total_steps:
            raise Finished(
                f"{path} has taken {saved.steps:,} steps already: give a higher total than {config.total_steps}, such "
                f"as --total-steps {2 * saved.steps}"
            )
        if saved.steps >= config.total_steps:
            raise Finished(
                f"{path} is finished: it has taken {saved.steps:,} of {config.total_steps:,} steps. "
                f"To go on, give a higher total: --total-steps {2 * max(config.total_steps, saved.steps)}"
            )
        training = _training(config, own, console)
        stack.callback(training.close)
        saved.require(training.spec)
        if training.spec.id != saved.manifest["env"]:
            console.print(f"trained on {saved.manifest['env']} so far, on {training.spec.id} from here on")
            facts["training"].pop("env_seed", None)  # it can't be played back on another
        training.load(tensors, facts["training"], _replay(saved, config), saved.fitting)
        warn_unused(config, training.spec, own.torso is not None, own.policy is not None)
        warn_unlearned(config, training.learner)
        _warn_of_versions(run)
        metrics.truncate(run.metrics, saved.steps)
        checkpoint.set_aside(run.checkpoints, saved.steps)
        run.write_config(config)
        run.error.unlink(missing_ok=True)  # it tells of the time before
        return _drive(_Run(config, own, training, run, lock, _progress(config, training), console), saved)


@dataclass(frozen=True)
class _Run:
    """The pieces of one run in progress."""

    config: Config
    own: Own
    training: Training
    run: RunDirectory
    lock: RunLock
    progress: Progress
    console: Console


def _drive(this: _Run, saved: Checkpoint | None) -> Trained:
    """Runs the loop from `saved`, which is loaded into `this.training`, or from the start, to the last step."""
    config, training, run, progress = this.config, this.training, this.run, this.progress
    facts = saved.facts() if saved else None
    if saved and facts:
        progress.load(facts["progress"])
    training.learner.rejects.keep = run.keep
    with ExitStack() as stack:
        rows = Metrics(
            run.metrics, run.tensorboard if config.log.tensorboard else None, progress, config.log.metrics_every
        )
        stack.push(_closing(rows))
        if facts:
            rows.load(facts["metrics"])

        def state() -> tuple[dict[str, Any], dict[str, Any]]:
            tensors, own = training.state()
            more = {"progress": progress.state(), "metrics": rows.state(), "config": plain(config)}
            return tensors, {"training": own, **more}

        windows = training.learner.windows
        segments = None
        if windows is not None and config.log.save_replay:
            segments = Segments(run.checkpoints, windows, saved.segments if saved else ())
        then = training.restart if training.starts_anew else None
        there = saved.steps if saved else -1
        checkpoints = Checkpoints(run, config.log, progress, training.spec, state, segments, then, there)
        stack.callback(lambda: this.lock.outlast(checkpoints.pending))
        evaluators = _evaluators(this)
        for evaluator in evaluators:
            stack.callback(evaluator.close)
        display = Display(progress, _title(config, run, saved), config.log.console_every, this.console)
        stack.callback(display.close)
        if windows is not None:
            display.say(replay_line(config, windows.rows))
        for caveat in training.caveats:
            display.say(caveat)
        display.say(f"resume: {training.resumes}")
        signals = stack.enter_context(Signals(display.say))
        watch = StallWatch(config.log.stall_seconds, run.stacks, display.say, training.awaited)
        stack.callback(watch.close)
        concerns = Concerns(config.env_options.non_finite, progress.steps)
        progress.start()
        try:
            observers = [progress, *evaluators, rows, checkpoints, display, concerns, watch]
            _loop(training, observers, progress, signals)
            if progress.finished or not training.starts_anew:
                checkpoints.save()
            checkpoints.close()
        except Exception as error:
            _keep_traceback(error, run)  # first, however long the disk takes for what comes now
            checkpoints.close()
            # Environments fail while acting, when the learner is between two updates: what it has learned is whole, but
            # for an update that an evaluation interrupts. A checkpoint to go on from exactly is worth more, if there is
            # one: what is learned after it will be learned again.
            exact = training.at_rest or not any(run.checkpoints.glob("[0-9]*"))
            if isinstance(error, EnvError) and progress.steps and checkpoints.whole and exact:
                with suppress(CheckpointError):
                    checkpoints.save()
            if any(run.checkpoints.glob("[0-9]*")):
                error.add_note(f"resume:     {_resumed_by(config, run.path)}")
            raise
        except KeyboardInterrupt as stop:
            checkpoints.close(_PATIENCE)
            stop.add_note(_what_is_saved(this))
            raise
        except SystemExit:  # of whoever trains within a program, which shows no notes of it
            checkpoints.close()
            display.say(_what_is_saved(this))
            raise
        if signals.received is not None and not progress.finished:
            raise Interrupted(signals.received, run.path, _what_is_saved(this))
    return Trained(run, training.spec, training.policy, progress, training.learner.decoder)


def _replay(saved: Checkpoint, config: Config) -> Iterator[dict[str, Tensor]] | None:
    """What the replay is filled with; None if it is to be empty, since that is not saved, or lost and need not be."""
    if not saved.segments:
        return None
    if not config.log.save_replay:
        try:
            saved.check(replay=True)
        except CheckpointError as error:
            warnings.warn(f"{error}; the run goes on with an empty replay", stacklevel=3)
            return None
    return saved.replay()


def _require_same(config: Config, before: Mapping[str, Any], path: Path) -> None:
    """Refuses a configuration that differs where that would make another run of it."""
    was, now = _comparable(before), _comparable(plain(config))
    fixed = _CHECKPOINTS if config.exact_resume else ()
    other = sorted(
        name
        for name in was.keys() & now.keys()
        if was[name] != now[name] and name != "env" and (not name.startswith(_FREE) or name in fixed)
    )
    if other:
        values = "; ".join(f"{name} was {was[name]}, not {now[name]}" for name in other)
        typed = " ".join(f"--{name.replace('_', '-')} {shlex.quote(str(now[name]))}" for name in other)
        raise ConfigError(
            f"{path} can't go on with other settings that change its result: {values}. Leave them as they were (in its "
            f"config.yaml too), or start a new run: slipstream train --config {path} {typed}"
        )


def _comparable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted key, arguments of the environment as one, since any may be missing."""
    flat = {name: value for name, value in flatten(values).items() if not name.startswith(_ARGUMENTS)}
    return flat | {_ARGUMENTS: values.get("env_options", {}).get("kwargs", {})}


def _warn_of_versions(run: RunDirectory) -> None:
    """Warns where libraries have other versions than when the run was started."""
    before, now = run.surroundings().get("versions", {}), versions()
    other = [
        f"{name} {before[name]} is {now[name]} now" for name in before.keys() & now.keys() if before[name] != now[name]
    ]
    if other:
        warnings.warn(f"since this run was started, {', '.join(sorted(other))}: bits may differ", stacklevel=3)


def _require_unsolved(config: Config, facts: Mapping[str, Any], path: Path) -> None:
    """Refuses to train on a run that has reached what it was to stop at."""
    progress = Progress(config.total_steps, 1, stop_at_return=config.stop_at_return)
    progress.load(facts)
    if progress.solved:
        raise Finished(
            f"{path} is finished: its mean return has reached {config.stop_at_return}. "
            f"To go on, give a total: --total-steps {max(config.total_steps, 2 * progress.steps)}"
        )


def _training(config: Config, own: Own, console: Console) -> Training:
    slow = {"process": "collector processes", "ray": "Ray actors"}.get(config.placement.collectors)
    if slow is not None:
        console.print(f"starting {slow}, which takes some seconds")
    # The user's modules stay as they are: a second run with them starts as the first one did.
    return Training(config, own.env, copy.deepcopy(own.torso), copy.deepcopy(own.policy))


def _progress(config: Config, training: Training) -> Progress:
    evaluates = config.log.eval_every > 0
    return Progress(config.total_steps, training.spec.frames_per_step, evaluates, config.stop_at_return)


def _loop(training: Training, observers: Sequence[Observer], progress: Progress, signals: Signals) -> None:
    for report in training:
        for observer in observers:
            observer(report)
        if progress.finished or signals.received is not None:
            break


def _closing(rows: Metrics) -> Callable[[Any, BaseException | None, Any], None]:
    """What closes the metrics at the end: that they can't be written must not hide why the run ends."""

    def close(kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            rows.close()
        except OSError as problem:
            if error is None:
                raise
            error.add_note(f"the last rows of metrics.jsonl are lost: {problem.strerror or problem}")

    return close


def _keep_traceback(error: Exception, run: RunDirectory) -> None:
    """Writes an error's traceback down and adds to it where that is."""
    try:
        run.error.write_text("".join(traceback.format_exception(error)))
        error.add_note(f"traceback:  {run.error}")
    except OSError as problem:
        error.add_note(f"traceback:  not written, {problem.strerror or problem}")


def _what_is_saved(this: _Run) -> str:
    try:
        saved = checkpoint.newest(this.run.checkpoints)
    except CheckpointError:
        return "there is no checkpoint yet"
    return f"the last checkpoint is that of step {saved.steps}\nresume:  {_resumed_by(this.config, this.run.path)}"


def _resumed_by(config: Config, path: Path) -> str:
    """What to type to go on; in Python where the command line can't know the environment."""
    if config.env.startswith(CALLABLE):
        return f'slipstream.resume("{path}", env={config.env.removeprefix(CALLABLE)})'
    return f"slipstream resume {path}"


def _evaluators(this: _Run) -> list[Evaluator]:
    log = this.config.log
    if not log.eval_every:
        return []
    envs = evaluation_envs(this.config, log.eval_episodes, this.own.env)
    policy = this.training.policy
    return [Evaluator(policy, envs, this.progress, log.eval_every, log.eval_episodes, this.config.seed)]


def require_callable(config: Config, env: EnvFactory | None, owner: Path) -> None:
    """Refuses a run whose environment was a Python callable when the callable is not given again.

    Raises:
        ConfigError: If it is missing.
    """
    if config.env.startswith(CALLABLE) and env is None:
        name = config.env.removeprefix(CALLABLE)
        raise ConfigError(
            f"{owner} was trained on the Python callable {name}, which the command line can't know. From Python, "
            f'pass it again: slipstream.load("{owner}", env={name}) or {_resumed_by(config, owner)}'
        )


def evaluation_envs(config: Config, episodes: int, env: EnvFactory | None = None) -> Envs:
    """Environments of their own for an evaluation: one lane, in this process, whole episodes from their start."""
    options = replace(config.env_options, decorrelate_steps=0)
    size = (vector_columns(env) if env else 0) or slots(episodes)
    envs = make_envs(env or config.env, size, 1, options, workers=0, threads=config.placement.env_threads)
    return recorded(envs, config.placement.restarts) or envs


def vector_columns(env: Callable[[], object]) -> int:
    """Environments in the vector environment that a callable makes; 0 if it makes one plain environment."""
    made = env()
    if isinstance(made, gymnasium.Env | VectorEnv):
        close_all(type(made).__name__, {0: made})
    return made.num_envs if isinstance(made, VectorEnv) else 0


def _title(config: Config, run: RunDirectory, saved: Checkpoint | None) -> str:
    start = f", resumed at step {saved.steps:,}" if saved else ""
    return f"{config.algo.name} on {config.env}, seed {config.seed}{start} -> {run.path}"
