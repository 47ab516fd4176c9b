"""Slabs: their allocation, views of their columns, and what everyone who acts does with trees of tensors."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from slipstream import tree
from slipstream.nets.check import dummy_observations
from slipstream.nets.policy import Policy
from slipstream.tree import Tree
from slipstream.types import EnvSpec, Trajectory


def allocate(spec: EnvSpec, policy: Policy, rows: int, *, pin: bool = False) -> Trajectory:
    """An empty slab of `rows` rows and `spec.num_envs` columns.

    Shapes and dtypes of the policy's columns (actions, states, extras) come from one `act` on a dummy batch.

    Args:
        spec: Spaces and slots.
        policy: Any policy; only its output shapes matter here.
        rows: T.
        pin: Whether to use page-locked memory, for asynchronous copies to a GPU.
    """
    columns = spec.num_envs

    def empty(leading: tuple[int, ...], like: Tensor) -> Tensor:
        return torch.zeros((*leading, *like.shape[1:]), dtype=like.dtype, pin_memory=pin)

    obs = dummy_observations(spec.observation_space, 1)
    device = next(iter(policy.parameters())).device
    with torch.no_grad():
        act = policy.act(
            tree.map(lambda leaf: leaf.to(device), obs),
            policy.initial_state(1),
            torch.zeros(1, policy.dice_width, device=device),
        )

    def flag() -> Tensor:
        return torch.zeros(rows, columns, dtype=torch.bool, pin_memory=pin)

    return Trajectory(
        obs=tree.map(lambda leaf: empty((rows + 1, columns), leaf), obs),
        action=empty((rows, columns), act.action),
        log_prob=empty((rows, columns), act.log_prob),
        reward=torch.zeros(rows, columns, pin_memory=pin),
        terminated=flag(),
        truncated=flag(),
        valid=flag(),
        version=torch.zeros(rows, columns, dtype=torch.int32, pin_memory=pin),
        slot=torch.arange(columns),
        state0=tree.map(lambda leaf: empty((columns,), leaf), policy.initial_state(1)),
        extras={name: empty((rows + 1, columns), value) for name, value in act.extras.items()},
    )


def columns(trajectory: Trajectory, part: slice) -> Trajectory:
    """The same memory, restricted to the slots in `part`."""
    return replace(
        trajectory,
        obs=tree.map(lambda leaf: leaf[:, part], trajectory.obs),
        action=trajectory.action[:, part],
        log_prob=trajectory.log_prob[:, part],
        reward=trajectory.reward[:, part],
        terminated=trajectory.terminated[:, part],
        truncated=trajectory.truncated[:, part],
        valid=trajectory.valid[:, part],
        version=trajectory.version[:, part],
        slot=trajectory.slot[part],
        state0=tree.map(lambda leaf: leaf[part], trajectory.state0),
        extras={name: value[:, part] for name, value in trajectory.extras.items()},
    )


def tensors(arrays: Tree, device: torch.device) -> Tree:
    """A tree of arrays or tensors as tensors on `device`."""
    return tree.map(lambda leaf: torch.as_tensor(leaf).to(device), arrays)


def keep(state: Tree, alive: Tensor) -> Tree:
    """A recurrent state `[B, ...]`, zeroed in the slots where `alive`, bool `[B]`, is False."""
    return tree.map(lambda leaf: leaf * alive.view(-1, *(1,) * (leaf.dim() - 1)), state)
