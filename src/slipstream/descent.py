"""Gradient steps: gradients of shards, added in their order, clipped, applied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slipstream.algos.algorithm import Algorithm
from slipstream.crew import Crew
from slipstream.optimizers import make_optimizer

ShardLoss = tuple[Tensor, dict[str, Tensor], Tensor | None]
"""A shard's part of the loss, its parts of metrics, and what it says of every row (or None)."""


class Gradient(NamedTuple):
    """The gradient of a minibatch.

    Attributes:
        tensors: In the order of the parameters.
        metrics: Sums over the shards.
        errors: What the shards say of their rows, one after the other; None if they say nothing.
    """

    tensors: Sequence[Tensor]
    metrics: dict[str, Tensor]
    errors: Tensor | None


class Descent:
    """An optimiser and its parameters.

    The gradient is the sum, in shard order, of one gradient per shard, each computed by one math thread of the crew,
    which it waits for. The crew's size decides how fast that goes and nothing else.

    Args:
        algorithm: Has the rule, and the norm to clip at.
        parameters: What is learned.
        crew: Threads that differentiate the shards.
        eps: Epsilon of the rule.
        beside: Parameters that are learned with them, whose gradient is clipped by a norm of its own.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        parameters: Sequence[nn.Parameter],
        crew: Crew,
        eps: float,
        beside: Sequence[nn.Parameter] = (),
    ) -> None:
        self._apart = [[each for each in part if each.requires_grad] for part in (parameters, beside)]
        self.parameters = [each for part in self._apart for each in part]
        self._crew, self._max_norm = crew, algorithm.max_grad_norm
        self._optimizer = make_optimizer(algorithm.optimizer, self.parameters, lr=algorithm.lr, eps=eps)

    def gradient(self, losses: Sequence[Callable[[], ShardLoss]], at: Sequence[nn.Parameter] | None = None) -> Gradient:
        """The gradient of the sum of `losses`, one per shard.

        Args:
            losses: Called on the crew's threads.
            at: The parameters that the losses are functions of, if it is not those that are learned.
        """
        by = self.parameters if at is None else at
        parts = self._crew.run([partial(self._of_shard, loss, by) for loss in losses])
        tensors, metrics, errors = parts[0].tensors, parts[0].metrics, [parts[0].errors]
        for part in parts[1:]:
            for total, more in zip(tensors, part.tensors, strict=True):
                total.add_(more)
            metrics = {name: value + part.metrics[name] for name, value in metrics.items()}
            errors.append(part.errors)
        said = [each for each in errors if each is not None]
        return Gradient(tensors, metrics, torch.cat(said) if said else None)

    def apply(self, gradient: Gradient, lr: float, update: int) -> Tensor:
        """Clips by global norm and takes the step; returns the norm before clipping, not counting what is beside.

        Raises:
            FloatingPointError: If a norm is not finite; parameters and state of the rule are unchanged.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        for parameter, tensor in zip(self.parameters, gradient.tensors, strict=True):
            parameter.grad = tensor
        norms = [nn.utils.clip_grad_norm_(part, self._max_norm) for part in self._apart if part]
        for norm in norms:
            if not torch.isfinite(norm):
                raise FloatingPointError(
                    f"the gradient of update {update} is not finite (norm {float(norm)}); parameters are unchanged. "
                    "Lower algo.lr, or look for non-finite observations or rewards"
                )
        self._optimizer.step()
        return norms[0]

    def state(self, prefix: str) -> dict[str, Tensor]:
        """The optimiser's state, as `PREFIX.INDEX.NAME` by number of the parameter."""
        slots = self._optimizer.state_dict()["state"].items()
        return {
            f"{prefix}.{index}.{name}": torch.as_tensor(value) for index, has in slots for name, value in has.items()
        }

    def load(self, prefix: str, tensors: dict[str, Tensor]) -> None:
        """Continues from what `state` returned."""
        slots: dict[int, dict[str, Tensor]] = {}
        for path, value in under(f"{prefix}.", tensors).items():
            index, name = path.split(".", 1)
            parameter = self.parameters[int(index)]
            # A checkpoint does not keep memory layouts, and the fused optimiser relies on them.
            slots.setdefault(int(index), {})[name] = _like(parameter, value) if value.dim() else value
        groups: list[dict[str, Any]] = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": slots, "param_groups": groups})

    def _of_shard(self, loss: Callable[[], ShardLoss], by: Sequence[nn.Parameter]) -> Gradient:
        total, metrics, errors = loss()
        gradients = torch.autograd.grad(total, by, materialize_grads=True)
        return Gradient(_own(self.parameters, gradients), metrics, errors)


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _own(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Gradients in memory of their own, laid out as their parameters.

    Autograd may return views, one tensor for two parameters, or another memory layout; sums and the fused optimiser
    work on memory. Most gradients are as wanted, and are not copied.
    """
    seen: set[int] = set()
    own: list[Tensor] = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        memory = gradient.untyped_storage()
        alone = memory.nbytes() == gradient.nbytes and memory.data_ptr() not in seen
        fits = alone and gradient.stride() == parameter.stride() and gradient.dtype == parameter.dtype
        own.append(gradient if fits else _like(parameter, gradient))
        seen.add(memory.data_ptr())
    return own


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """A copy of `value` in memory of its own, laid out as `parameter`."""
    return torch.empty_like(parameter).copy_(value)
