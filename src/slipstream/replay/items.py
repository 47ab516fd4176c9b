"""What is gathered from the rows of a replay: transitions, sequences, whole unrolls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream import tree
from slipstream.replay.rows import Rows
from slipstream.tree import Tree
from slipstream.types import Trajectory

Index = NDArray[np.int64]
Transform = Callable[[Tensor], Tensor]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Transitions:
    """Steps with their n-step returns; N of them.

    Attributes:
        obs: Tree `[N, *O]`.
        action: `[N, *A]`.
        reward: float32 `[N]`, `sum_{j<m} gamma^j r_{t+j}`: m = n, or fewer where the episode (or, for the target, a
            life) ends before.
        discount: float32 `[N]`, gamma^m, or 0 if the last of these steps terminated.
        next_obs: Tree `[N, *O]`, what truly followed the last of them, to bootstrap from.
    """

    obs: Tree
    action: Tensor
    reward: Tensor
    discount: Tensor
    next_obs: Tree


@dataclass(frozen=True)
class Sequences:
    """Windows of L rows, time-major; N of them.

    Attributes:
        obs: Tree `[L+1, N, *O]`.
        action: `[L, N, *A]`.
        reward: float32 `[L, N]`.
        terminated: bool `[L, N]`.
        valid: bool `[L, N]`.
        first: bool `[L+1, N]`, rows at which an episode starts, so that a recurrent state is zeroed before.
        state0: Tree `[N, ...]`, recurrent state before row 0, as it was when the row was collected.
    """

    obs: Tree
    action: Tensor
    reward: Tensor
    terminated: Tensor
    valid: Tensor
    first: Tensor
    state0: Tree


def transitions(rows: Rows, slots: Index, starts: Index, n: int, gamma: float, transform: Transform) -> Transitions:
    """The transitions that begin at rows `starts` of `slots`, int64 `[N]` each.

    Args:
        rows: Where they lie.
        slots: Slots.
        starts: Numbers of rows, none of them dead, each followed by n-1 rows at least.
        n: Rows of a return.
        gamma: Discount per step.
        transform: From rewards to training rewards.
    """
    window = starts[:, None] + np.arange(n)
    owners = np.broadcast_to(slots[:, None], window.shape)
    terminated = rows.column("terminated", owners, window).numpy()
    stops = terminated | rows.column("truncated", owners, window).numpy()
    counted = np.ones(window.shape, np.bool_)
    counted[:, 1:] = ~np.logical_or.accumulate(stops, axis=1)[:, :-1]
    steps = counted.sum(axis=1)
    over = terminated[np.arange(len(starts)), steps - 1]
    powers = gamma ** np.arange(n + 1)
    reward = transform(rows.column("reward", owners, window))
    weights = torch.from_numpy(np.where(counted, powers[:-1], 0.0).astype(np.float32))
    return Transitions(
        obs=rows.obs(slots, starts),
        action=rows.column("action", slots, starts),
        reward=(reward * weights).sum(dim=1),
        discount=torch.from_numpy(np.where(over, 0.0, powers[steps]).astype(np.float32)),
        next_obs=rows.obs(slots, starts + steps),
    )


def sequences(rows: Rows, slots: Index, starts: Index, length: int, transform: Transform) -> Sequences:
    """The windows of `length` rows from rows `starts` of `slots` on, int64 `[N]` each; they begin unrolls."""
    window = starts + np.arange(length)[:, None]
    owners = np.broadcast_to(slots, window.shape)
    valid = rows.column("valid", owners, window)
    first = torch.zeros(length + 1, len(starts), dtype=torch.bool)
    first[1:] = ~valid
    return Sequences(
        obs=_observations(rows, slots, starts, length),
        action=rows.column("action", owners, window),
        reward=transform(rows.column("reward", owners, window)),
        terminated=rows.column("terminated", owners, window),
        valid=valid,
        first=first,
        state0=rows.state0(slots, starts),
    )


def unrolls(rows: Rows, slots: Index, starts: Index, extras: tuple[str, ...]) -> Trajectory:
    """Whole unrolls as they were collected, N columns.

    Row T of the extras is zero: what the policy that acted said there is not kept.
    """
    window = starts + np.arange(rows.unroll)[:, None]
    owners = np.broadcast_to(slots, window.shape)

    def extra(name: str) -> Tensor:
        value = rows.column(name, owners, window)
        return torch.cat([value, torch.zeros_like(value[:1])])

    named = ("action", "log_prob", "reward", "terminated", "truncated", "valid", "version")
    return Trajectory(
        obs=_observations(rows, slots, starts, rows.unroll),
        slot=torch.from_numpy(slots),
        state0=rows.state0(slots, starts),
        extras={name: extra(name) for name in extras},
        **{name: rows.column(name, owners, window) for name in named},
    )


def axis(kind: type, name: str) -> int:
    """In a field of items of this kind, the axis of the windows: 0, or 1 behind that of their rows."""
    return 0 if kind is Transitions or name in ("slot", "state0") else 1


def taken(items: Item, windows: Index) -> Item:
    """Some of the windows, int64 `[N]`, in this order; a copy."""
    index = torch.from_numpy(windows)

    def field(name: str) -> Tree:
        along = axis(type(items), name)
        return tree.map(lambda leaf: leaf.index_select(along, index), getattr(items, name))

    return _with(items, field)


def placed(parts: Sequence[tuple[Index, Item]], count: int) -> Item:
    """The windows of several parts in one, `count` of them.

    Args:
        parts: The places of its windows, int64 `[N]`, and the windows, of each; every place is there once.
        count: Windows in all.
    """
    places, (first, *_) = [torch.from_numpy(each) for each, _ in parts], [items for _, items in parts]

    def field(name: str) -> Tree:
        along = axis(type(first), name)

        def put(*leaves: Tensor) -> Tensor:
            shape = list(leaves[0].shape)
            shape[along] = count
            whole = leaves[0].new_empty(shape)
            for place, leaf in zip(places, leaves, strict=True):
                whole.index_copy_(along, place, leaf)
            return whole

        return tree.map(put, *(getattr(items, name) for _, items in parts))

    return _with(first, field)


def _with(items: Item, field: Callable[[str], Tree]) -> Item:
    """Items of the same kind, a dataclass, with other fields."""
    same: Any = items
    return replace(same, **{each.name: field(each.name) for each in fields(same)})


def _observations(rows: Rows, slots: Index, starts: Index, length: int) -> Tree:
    """Tree `[length+1, N, *O]`."""
    window = starts + np.arange(length + 1)[:, None]
    owners = np.broadcast_to(slots, window.shape)
    flat: Tree = rows.obs(owners.ravel(), window.ravel())
    return tree.map(lambda leaf: leaf.unflatten(0, window.shape), flat)
