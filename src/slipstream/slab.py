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

    Args:
        spec: Spaces and slots.
        policy: Any policy; only its output shapes matter here.
        rows: T.
        pin: Whether to use page-locked memory, for asynchronous copies to a GPU.
    """

    def zeros(leaf: Tensor) -> Tensor:
        return torch.zeros(leaf.shape, dtype=leaf.dtype, pin_memory=pin)

    trajectory = Trajectory(**tree.map(zeros, layout(spec, policy, rows)))
    trajectory.slot.copy_(torch.arange(spec.num_envs))
    return trajectory


def layout(spec: EnvSpec, policy: Policy, rows: int) -> Tree:
    """What a slab consists of: by the names of `Trajectory`, trees of tensors without memory (on the meta device).

    Shapes and dtypes of the policy's columns (actions, states, extras) come from one `act` on a dummy batch.
    """
    columns = spec.num_envs
    obs = dummy_observations(spec.observation_space, 1)
    device = next(iter(policy.parameters())).device
    with torch.no_grad():
        act = policy.act(
            tree.map(lambda leaf: leaf.to(device), obs),
            policy.initial_state(1),
            torch.zeros(1, policy.dice_width, device=device),
        )

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def like(leading: tuple[int, ...], leaf: Tensor) -> Tensor:
        return meta(*leading, *leaf.shape[1:], dtype=leaf.dtype)

    return {
        "obs": tree.map(lambda leaf: like((rows + 1, columns), leaf), obs),
        "action": like((rows, columns), act.action),
        "log_prob": like((rows, columns), act.log_prob),
        "reward": meta(rows, columns),
        "terminated": meta(rows, columns, dtype=torch.bool),
        "truncated": meta(rows, columns, dtype=torch.bool),
        "valid": meta(rows, columns, dtype=torch.bool),
        "version": meta(rows, columns, dtype=torch.int32),
        "slot": meta(columns, dtype=torch.int64),
        "state0": tree.map(lambda leaf: like((columns,), leaf), policy.initial_state(1)),
        "extras": {name: like((rows + 1, columns), value) for name, value in act.extras.items()},
    }


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
    """A recurrent state `[B, ...]`, zeroed in the slots where `alive`, bool `[B]`, is False, whatever it was there."""
    return tree.map(lambda leaf: leaf.where(alive.view(-1, *(1,) * (leaf.dim() - 1)), 0), state)
