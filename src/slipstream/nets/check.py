"""Checks of a user's own modules on a dummy batch, so that a wrong shape is one message before training."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from gymnasium import Space, spaces
from torch import Tensor, nn

from slipstream import tree
from slipstream.ops.distributions import ActionHead, distribution_of
from slipstream.ops.spaces import space_tree
from slipstream.tree import Tree
from slipstream.types import Act, EnvSpec

_ROWS, _COLUMNS = 3, 5


def dummy_observations(space: Space[Any], *leading: int) -> Tree:
    """Observations of zeros, and of the first choice where there are choices; tree `[*leading, *O]`.

    Args:
        space: Observation space.
        leading: Leading dimensions, `N` or `T, B`.
    """

    def leaf(space: Space[Any]) -> Tensor:
        dtype = np.dtype(np.float32) if space.dtype == np.float64 else np.dtype(space.dtype)
        start = space.start if isinstance(space, spaces.Discrete | spaces.MultiDiscrete) else 0
        return torch.from_numpy(np.full((*leading, *(space.shape or ())), start, dtype))

    return tree.map(leaf, space_tree(space))


def check_torso(torso: nn.Module, space: Space[Any]) -> int:
    """F, the number of features that `torso` makes of an observation.

    Args:
        torso: Observations `[N, *O]` to features `[N, F]`.
        space: Observation space.

    Raises:
        ValueError: It gives something else than float features `[N, F]`, or draws or remembers something; the message
            says what.
    """
    _require_instance("torso", torso)
    expected = f"torso {type(torso).__name__}: expected float features [N, F]"
    with _without_traces("torso", torso):
        for rows in (_ROWS, _COLUMNS):
            obs = dummy_observations(space, rows)
            try:
                features: Any = torso(obs)
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
                raise ValueError(f"{expected} from {_describe(obs)}, but it raised {error!r}") from error
            fits = isinstance(features, Tensor) and features.dim() == 2 and len(features) == rows
            if not fits or not features.is_floating_point() or features.shape[1] == 0:
                raise ValueError(f"{expected} from {_describe(obs)} with N={rows}, got {_describe(features)}")
    return int(features.shape[1])


def check_policy(policy: object, spec: EnvSpec) -> None:
    """Shows a user's own policy dummy batches and compares what it answers with the contract.

    Args:
        policy: Anything with the members of `slipstream.nets.policy.Policy`.
        spec: What the environments show and want.

    Raises:
        ValueError: A member is missing, an answer has the wrong type, shape or dtype, or `act` draws or remembers
            something.
    """
    module = _require_instance("policy", policy)
    name = type(policy).__name__
    members = {"dice_width": "an int", "recurrent": "a bool", "initial_state": "a method initial_state(batch)"}
    members |= {"act": "a method act(obs, state, dice, greedy=False, slot=None) -> Act"}
    members |= {"unroll": "a method unroll(obs, state0, first) -> Outputs(distribution, value)"}
    members |= {"observe": "a method observe(obs, valid)"}
    found: dict[str, Any] = {}
    for member, what in members.items():
        found[member] = getattr(policy, member, None)
        if found[member] is None or (what.startswith("a method") and not callable(found[member])):
            raise ValueError(
                f"policy {name}: expected {what}, named '{member}'; see slipstream.nets.actor_critic.ActorCritic"
            )
    head = distribution_of(spec.action_space)
    with _without_traces("policy", module):
        state = found["initial_state"](_COLUMNS)
        for path, leaf in tree.items(state):
            _expect(f"{name}.initial_state({_COLUMNS}) '{path}'", leaf, (_COLUMNS, ...), torch.float32)
        if found["recurrent"] != bool(tree.leaves(state)):
            raise ValueError(
                f"policy {name}: recurrent={found['recurrent']}, but initial_state has {len(tree.leaves(state))} leaves"
            )
        _check_act(name, found, state, spec, head)
        _check_unroll(name, found, state, spec, head)


@contextmanager
def _without_traces(what: str, module: nn.Module) -> Generator[None]:
    """Refuses a module whose forwards within draw random numbers or leave something behind, and undoes that.

    Acting and evaluation are functions of parameters, observations and dice, and several threads act at once.
    """
    before = {key: value.clone() for key, value in module.state_dict().items()}
    generator = torch.get_rng_state()
    with torch.no_grad():
        yield
    drew = not torch.equal(generator, torch.get_rng_state())
    torch.set_rng_state(generator)
    changed = [key for key, value in module.state_dict().items() if not torch.equal(value, before[key])]
    module.load_state_dict(before)
    name = f"{what} {type(module).__name__}"
    if changed:
        raise ValueError(
            f"{name}: a forward changes its buffer '{changed[0]}', as batch normalisation does; acting must not. Use "
            "layers without running statistics, such as nn.LayerNorm or nn.GroupNorm"
        )
    if drew:
        raise ValueError(
            f"{name}: a forward draws from PyTorch's global generator, as nn.Dropout does; the same seed could not "
            "give the same run. Leave the random layer out"
        )


def _require_instance(what: str, given: object) -> nn.Module:
    """`given`; refuses a class where a module is wanted, and what is no module."""
    if isinstance(given, type):
        raise ValueError(f"{what}: expected a network, got the class {given.__name__}; make one: {given.__name__}(...)")
    if not isinstance(given, nn.Module):
        raise ValueError(f"{what}: expected a torch.nn.Module, got {type(given).__name__}")
    return given


def _check_act(name: str, found: dict[str, Any], state: Tree, spec: EnvSpec, head: ActionHead) -> None:
    """One `act` for `[B]` slots, greedy and not."""
    obs = dummy_observations(spec.observation_space, _COLUMNS)
    shape = (_COLUMNS, *head.action_shape)
    for greedy in (False, True):
        slot = None if greedy else torch.arange(_COLUMNS)
        act = found["act"](obs, state, torch.full((_COLUMNS, found["dice_width"]), 0.5), greedy=greedy, slot=slot)
        if not isinstance(act, Act):
            raise ValueError(f"policy {name}: act must return slipstream.types.Act, got {_describe(act)}")
        _expect(f"{name}.act, action", act.action, shape, head.action_dtype)
        _expect(f"{name}.act, log_prob", act.log_prob, (_COLUMNS,), torch.float32)
        _expect(f"{name}.act, extras['value']", act.extras.get("value"), (_COLUMNS,), torch.float32)
        for extra, value in act.extras.items():
            _require_numpy(f"{name}.act, extras['{extra}']", value)
        before, after = dict(tree.items(state)), dict(tree.items(act.state))
        if before.keys() != after.keys():
            raise ValueError(f"policy {name}: act returned state {_describe(act.state)}, expected {_describe(state)}")
        for path, leaf in after.items():
            _expect(f"{name}.act, state '{path}'", leaf, tuple(before[path].shape), before[path].dtype)


def _require_numpy(what: str, value: object) -> None:
    """Refuses what no slab can hold."""
    try:
        if isinstance(value, Tensor):
            value.detach().cpu().numpy()
            return
    except TypeError:  # bfloat16, float8
        pass
    raise ValueError(f"{what}: expected a tensor of a dtype that NumPy has, got {_describe(value)}")


def _check_unroll(name: str, found: dict[str, Any], state: Tree, spec: EnvSpec, head: ActionHead) -> None:
    """One `unroll` of rows `[T, B]`, and of flat rows `[N]` if there is no memory."""
    for leading in ((_ROWS, _COLUMNS),) if found["recurrent"] else ((_ROWS, _COLUMNS), (_COLUMNS,)):
        obs = dummy_observations(spec.observation_space, *leading)
        distribution, value, *_ = found["unroll"](obs, state, torch.zeros(leading, dtype=torch.bool))
        _expect(f"{name}.unroll of {list(leading)}, value", value, leading, torch.float32)
        action = torch.zeros(*leading, *head.action_shape, dtype=head.action_dtype)
        _expect(f"{name}.unroll of {list(leading)}, log_prob", distribution.log_prob(action), leading, torch.float32)
        _expect(f"{name}.unroll of {list(leading)}, entropy", distribution.entropy(), leading, torch.float32)


def _expect(what: str, value: Any, shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    """Raises unless `value` is a tensor of this dtype and shape; a final `...` allows any further dimensions."""
    fixed = shape[:-1] if shape[-1:] == (...,) else shape
    if isinstance(value, Tensor) and value.dtype == dtype:
        compared = value.shape if fixed == shape else value.shape[: len(fixed)]
        if tuple(compared) == fixed:
            return
    text = ", ".join("..." if size is ... else str(size) for size in shape)
    raise ValueError(f"policy {what}: expected {_dtype(dtype)} [{text}], got {_describe(value)}")


def _describe(value: Any) -> str:
    """Dtypes and shapes of a tree, for messages."""
    if isinstance(value, Tensor):
        return f"{_dtype(value.dtype)} {list(value.shape)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_describe(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, tuple):
        return "(" + ", ".join(_describe(child) for child in value) + ")"
    return type(value).__name__


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
