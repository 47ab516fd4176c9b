"""Gradient steps: gradients of shards, added in their order, clipped, applied."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slipstream.algos.algorithm import Algorithm
from slipstream.crew import Crew
from slipstream.optimizers import make_optimizer

_NAMED = 3
"""Tensors of a gradient that a message names."""

ShardLoss = tuple[Tensor, dict[str, Tensor], Tensor | None]
"""A shard's part of the loss, its parts of metrics, and what it says of every row (or None)."""


class Gradient(NamedTuple):
    """The gradient of a minibatch, or of one of its shards.

    Attributes:
        tensors: In the order of the parameters, each in memory of its own.
        metrics: Sums over the shards.
        errors: What the shards say of their rows, one after the other; None if they say nothing.
    """

    tensors: Sequence[Tensor]
    metrics: dict[str, Tensor]
    errors: Tensor | None

    def idle_units(self) -> Tensor:
        """Share of units that no row gives a gradient, by their biases, float32 `[]`.

        They are ReLUs that are off in all rows, and outputs that no row asks for, such as those of Q-learning for
        actions that are not in the minibatch. ReLUs that are off in every minibatch learn nothing any more (Sokar et
        al., 2023, call such units dormant).
        """
        biases = [tensor for tensor in self.tensors if tensor.dim() == 1]
        return (torch.cat(biases) == 0.0).float().mean() if biases else torch.zeros(())


class Descent:
    """An optimiser and its parameters.

    Args:
        algorithm: Has the rule, and the norm to clip at.
        parameters: What is learned, by name.
        eps: Epsilon of the rule.
        beside: Parameters that are learned with them, whose gradient is clipped by a norm of its own.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        parameters: Mapping[str, nn.Parameter],
        eps: float,
        beside: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        own, others = (
            {name: each for name, each in part.items() if each.requires_grad} for part in (parameters, beside or {})
        )
        self._names = [*own, *others]
        self.parameters = [*own.values(), *others.values()]
        self._apart = slice(None, len(own)), slice(len(own), None)
        self._max_norm = algorithm.max_grad_norm
        self._optimizer = make_optimizer(algorithm.optimizer, self.parameters, lr=algorithm.lr, eps=eps)

    def apply(self, gradient: Gradient, lr: float, update: int) -> Tensor:
        """Clips by global norm and takes the step; returns the norm before clipping, not counting what is beside.

        Raises:
            FloatingPointError: If a norm is not finite; it names what is not. Parameters and state of the rule are
                unchanged.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        for parameter, tensor in zip(self.parameters, gradient.tensors, strict=True):
            parameter.grad = tensor
        norms = [nn.utils.get_total_norm(gradient.tensors[part]) for part in self._apart]
        sizes = [float(norm) for norm in norms]
        if not all(map(math.isfinite, sizes)):
            raise FloatingPointError(
                f"the gradient of update {update} is not finite ({self._culprits(gradient, sizes)}); parameters are "
                "unchanged. Lower algo.lr, or look for non-finite observations or rewards"
            )
        for part, norm, size in zip(self._apart, norms, sizes, strict=True):
            # Well within the bound the factor is 1: a pass over memory that most gradients of Q-learning don't need.
            if size > 0.999 * self._max_norm:
                nn.utils.clip_grads_with_norm_(self.parameters[part], self._max_norm, norm)
        self._optimizer.step()
        return norms[0]

    def _culprits(self, gradient: Gradient, norms: Sequence[float]) -> str:
        """What is not finite: norms, what the losses are made of, and where in the gradient."""
        told = [("norm", norm) for norm in norms] + [(name, float(value)) for name, value in gradient.metrics.items()]
        values = [f"{name} {value}" for name, value in told if not math.isfinite(value)]
        pairs = zip(self._names, gradient.tensors, strict=True)
        names = [name for name, tensor in pairs if not tensor.isfinite().all()]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return f"{', '.join(values)}; in {', '.join(names[:_NAMED]) or 'no parameter alone'}{more}"

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


def gradients(crew: Crew, losses: Sequence[Callable[[], ShardLoss]], by: Sequence[nn.Parameter]) -> list[Gradient]:
    """The gradients of the losses of shards.

    Args:
        crew: On whose threads, one math thread each; how many there are decides how fast it goes and nothing else.
        losses: One per shard.
        by: The parameters that the losses are functions of: those that are learned, or others of the same shapes.
    """
    return crew.run([partial(of_shard, loss, by) for loss in losses])


def added(parts: Sequence[Gradient]) -> Gradient:
    """The sum of the gradients of shards, in their order; the memory of the first becomes that of the sum."""
    tensors, metrics, errors = parts[0].tensors, parts[0].metrics, [parts[0].errors]
    for part in parts[1:]:
        for total, more in zip(tensors, part.tensors, strict=True):
            total.add_(more)
        metrics = {name: value + part.metrics[name] for name, value in metrics.items()}
        errors.append(part.errors)
    said = [each for each in errors if each is not None]
    return Gradient(tensors, metrics, torch.cat(said) if said else None)


def of_shard(loss: Callable[[], ShardLoss], by: Sequence[nn.Parameter]) -> Gradient:
    """The gradient of one shard, in the thread that asks."""
    total, metrics, errors = loss()
    return Gradient(laid_out(by, torch.autograd.grad(total, by, materialize_grads=True)), metrics, errors)


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def laid_out(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
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
