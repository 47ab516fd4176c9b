"""Proof of the determinism contract on the user's machine: one configuration under several placements, bit by bit.

The reference acts, gathers batches and learns in one thread. Every other placement runs with random delays in
environments, workers and loaders, and must give the same trajectory, weights, optimiser state and priorities after
every update. The first difference is named: update, row, slot and tensor.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream import tree
from slipstream.jitter import Jitter
from slipstream.process import NotPortable
from slipstream.replay_learner import ReplayLearner
from slipstream.run.config import Config, ConfigError, Placement
from slipstream.run.limit import learning_at_once
from slipstream.run.loop import Own
from slipstream.run.training import Training
from slipstream.types import Episode, Report, Trajectory

REFERENCE = "inline"
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_CAUSES = ("obs", "slot", "version", "extras", "action", "log_prob", "reward", "terminated", "truncated", "valid")
"""Columns of a row in the order in which one leads to the next."""


@dataclass(frozen=True)
class Fingerprint:
    """What an update looked like.

    Attributes:
        cells: A hash of every (row, slot) of every column of the trajectory, uint64 `[T or T+1, B]`.
        state0: A hash of every slot's recurrent state before row 0, uint64 `[B]` by path.
        episodes: The episodes that ended.
        tensors: A hash of every tensor of the learner afterwards, and of what its draws depend on.
    """

    cells: Mapping[str, NDArray[np.uint64]]
    state0: Mapping[str, NDArray[np.uint64]]
    episodes: tuple[Episode, ...]
    tensors: Mapping[str, str]


@dataclass(frozen=True)
class Outcome:
    """What became of one placement.

    Attributes:
        placement: As typed.
        updates: Updates compared.
        difference: The first difference from the reference in words; None if there is none.
        refused: Why the placement can't be had for this configuration; None if it ran.
        digest: Hash of the last weights.
    """

    placement: str
    updates: int
    difference: str | None = None
    refused: str | None = None
    digest: str = ""


def verify(
    config: Config, updates: int, placements: Sequence[str], delay: float, own: Own | None = None
) -> Iterator[Outcome]:
    """Runs the reference, then every placement against it; an outcome for each, the reference first, as they come.

    A replay that would not be learned from in so many updates is learned from at once.

    Args:
        config: What to run; its own placement counts for what placements do not name (`env_workers`, `device`).
        updates: Updates of every run.
        placements: `inline`, `thread:N`, `process:N`, `ray:N`, `learners:N` or `shards:N`.
        delay: Longest delay to inject before a step of a lane or a task of a worker or loader, in seconds.
        own: A user's own pieces.

    Raises:
        ConfigError: The schedule does not promise the same bits, or a placement is none; later, nothing was learned.
    """
    if config.schedule == "async":
        raise ConfigError(
            "schedule=async does not promise the same bits: its rows depend on timing. Verify sync or concurrent"
        )
    chosen = [(name, placement_of(name, config.placement)) for name in placements]
    if config.reduction != "ordered" and any(placement.learners > 1 for _, placement in chosen):
        raise ConfigError(
            f"reduction={config.reduction} does not promise the bits of one learner. Verify reduction=ordered"
        )
    steps = updates * config.num_envs * config.unroll  # with dead rows the budget lasts a little longer
    config = replace(config, total_steps=max(config.total_steps, steps), stop_at_return=None)
    if config.algo.replays is True and config.algo.replay.learning_starts >= steps:
        config = learning_at_once(config)
    return _outcomes(config, updates, chosen, delay, own or Own())


def _outcomes(
    config: Config, updates: int, chosen: Sequence[tuple[str, Placement]], delay: float, own: Own
) -> Iterator[Outcome]:
    reference: list[Fingerprint] = []
    training = _training(replace(config, placement=placement_of(REFERENCE, config.placement)), own, None)
    for print_ in _fingerprints(training):
        reference.append(print_)
        if len(reference) == updates:
            break
    if not training.learner.state()[1].get("gradient_steps", 1):
        raise ConfigError(
            f"nothing was learned in {updates} updates ({training.learner.steps:,} steps): they bring no batch; "
            "use more --updates, or a smaller --algo.batch-size"
        )
    yield Outcome(REFERENCE, len(reference), digest=_digest(reference[-1]))
    for name, placement in chosen:
        try:
            training = _training(replace(config, placement=placement), own, Jitter(delay))
        except (ConfigError, NotPortable) as error:
            yield Outcome(name, 0, refused=str(error))
        else:
            yield _compare(name, reference, _fingerprints(training))


def placement_of(name: str, placement: Placement) -> Placement:
    """The placement that `thread:2` and the like mean, over the rest of `placement`.

    There are as many loaders as workers, and none inline; `graphs` is `placement` with recordings on its GPU.

    Raises:
        ConfigError: It means nothing.
    """
    kind, _, count = name.partition(":")
    if kind == "inline" and not count:
        return replace(
            placement, collectors="inline", workers=1, loaders=0, learners=1, replay_shards=0, cuda_graphs=False
        )
    if kind == "graphs" and not count:
        if placement.device == "cpu" or not torch.cuda.is_available():
            raise ConfigError("placement graphs: it is for networks on a GPU, and there is none here")
        return replace(placement, cuda_graphs=True)
    if kind == "learners" and count.isdecimal() and int(count):
        return replace(placement, collectors="thread", learners=int(count), replay_shards=0)
    if kind == "shards" and count.isdecimal() and int(count):
        return replace(placement, collectors="ray", workers=1, replay_shards=int(count))
    if kind in ("thread", "process", "ray") and count.isdecimal() and int(count):
        return replace(placement, collectors=kind, workers=int(count), loaders=int(count), replay_shards=0)
    raise ConfigError(
        f"unknown placement {name!r}: expected inline, graphs, thread:N, process:N, ray:N, learners:N or shards:N, as "
        "in thread:2"
    )


def first_difference(update: int, expected: Fingerprint, found: Fingerprint) -> str | None:
    """The first difference in the order of cause and effect, in words; None if there is none."""
    for path, hashes in expected.state0.items():
        slots = np.flatnonzero(hashes != found.state0[path])
        if len(slots):
            return f"update {update}, before row 0, slot {slots[0]}: recurrent state {path}".rstrip()
    places = [
        (int(row), rank, int(slot), name)
        for rank, name in enumerate(expected.cells)
        for row, slot in np.argwhere(expected.cells[name] != found.cells[name])[:1]
    ]
    if places:
        row, _, slot, name = min(places)
        return f"update {update}, row {row}, slot {slot}: {name}"
    if expected.episodes != found.episodes:
        return f"update {update}: the episodes that ended"
    for name, digest in expected.tensors.items():
        if found.tensors[name] != digest:
            return f"update {update}, after learning: {name}"
    return None


def _compare(name: str, reference: Sequence[Fingerprint], found: Iterator[Fingerprint]) -> Outcome:
    update, print_ = 0, reference[-1]
    for update, (expected, print_) in enumerate(zip(reference, found, strict=False), start=1):
        difference = first_difference(update, expected, print_)
        if difference is not None:
            return Outcome(name, update, difference, digest=_digest(print_))
    if update < len(reference):
        return Outcome(name, update, f"the run ended after update {update}, the reference did not")
    return Outcome(name, update, digest=_digest(print_))


def _training(config: Config, own: Own, jitter: Jitter | None) -> Training:
    torso, policy = copy.deepcopy((own.torso, own.policy))  # every run starts from the same weights
    return Training(config, own.env, torso, policy, jitter=jitter)


def _fingerprints(training: Training) -> Iterator[Fingerprint]:
    with closing(training):
        for report in training:
            yield fingerprint(report, _replay(training) | training.state()[0])


def _replay(training: Training) -> dict[str, Tensor]:
    """What the next draws from the replay depend on: the rows of every slot that are there, and the priorities."""
    if not isinstance(training.learner, ReplayLearner):
        return {}  # a replay of unrolls is drawn from uniformly, and holds what the trajectories showed
    windows = training.learner.windows
    found = {"head": torch.tensor(windows.rows.head), "oldest": torch.tensor(windows.rows.oldest)}
    if windows.priorities is not None:
        found["priorities"] = torch.tensor(windows.priorities.tree.leaves)
        found["max_priority"] = torch.tensor(windows.priorities.max_priority, dtype=torch.float64)
    return {f"replay.{name}": value for name, value in found.items()}


def fingerprint(report: Report, tensors: Mapping[str, Tensor]) -> Fingerprint:
    """What an update looked like, and `tensors` afterwards."""
    columns = _columns(report.trajectory)
    return Fingerprint(
        cells={name: _cells(column, 2) for name, column in columns.items()},
        state0={path: _cells(leaf, 1) for path, leaf in tree.items(report.trajectory.state0)},
        episodes=report.episodes,
        tensors={name: hashlib.blake2b(_bytes(value), digest_size=8).hexdigest() for name, value in tensors.items()},
    )


def _columns(trajectory: Trajectory) -> dict[str, Tensor]:
    """All columns of a slab `[T or T+1, B, ...]` by name, causes first."""
    found: dict[str, Tensor] = {}
    trajectory = replace(trajectory, slot=trajectory.slot.expand(trajectory.rows, -1))
    for name in _CAUSES:
        value: Any = getattr(trajectory, name)
        found |= {f"{name} {path}".rstrip(): leaf for path, leaf in tree.items(value)}
    return found


def _cells(tensor: Tensor, dims: int) -> NDArray[np.uint64]:
    """A hash of what every index of the first `dims` dimensions holds, uint64.

    It is the sum of the 8-byte words, each times an odd number of its own, so that no change of one word is missed.
    """
    leading = tuple(tensor.shape[:dims])
    flat = np.frombuffer(_bytes(tensor), np.uint8).reshape(*leading, -1)
    padded = np.zeros((*leading, -(-flat.shape[-1] // 8) * 8), np.uint8)
    padded[..., : flat.shape[-1]] = flat
    words = padded.view(np.uint64)
    with np.errstate(over="ignore"):
        factors = np.arange(1, words.shape[-1] + 1, dtype=np.uint64) * _GOLDEN | np.uint64(1)
        return (words * factors).sum(axis=-1, dtype=np.uint64)


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().tobytes() if len(flat) else b""  # PyTorch does not view nothing as bytes


def _digest(print_: Fingerprint) -> str:
    """One hash of all weights."""
    return hashlib.blake2b(repr(sorted(print_.tensors.items())).encode(), digest_size=6).hexdigest()
