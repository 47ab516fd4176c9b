"""Optimisers by name, TensorFlow's RMSProp among them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer, RMSprop

OptimizerKind = Literal["adam", "rmsprop", "rmsprop_tf"]


def make_optimizer(
    kind: OptimizerKind,
    params: Iterable[Tensor],
    lr: float,
    eps: float,
    decay: float = 0.99,
    initial_mean_square: float = 1.0,
) -> Optimizer:
    """An optimiser; its step size is `param_groups[...]["lr"]`, to be set before every step.

    Args:
        kind: `adam` (betas 0.9 and 0.999), `rmsprop` (torch: epsilon beside the root, mean square from 0) or
            `rmsprop_tf` (epsilon under the root).
        params: Parameters, in a fixed order.
        lr: Step size.
        eps: Epsilon. `rmsprop_tf` puts it under the root, where 0.1 acts like 0.3 beside it.
        decay: Share of the old mean square that is kept, for both kinds of RMSProp.
        initial_mean_square: For `rmsprop_tf`: 1 as in TensorFlow 1, 0 as in Lasagne.
    """
    match kind:
        case "adam":
            # One fused loop over all parameters; elementwise, so the bits do not depend on the number of threads.
            return _Adam(params, lr=lr, eps=eps, fused=True)
        case "rmsprop":
            return _RMSprop(params, lr=lr, alpha=decay, eps=eps)
        case "rmsprop_tf":
            return RMSpropTF(params, lr, eps, decay, initial_mean_square)


class _Plain(Optimizer):
    """A rule without the decorators that hide it from PyTorch's compiler.

    Nothing is compiled here, and they import it all the same: a second of every start.
    """

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)
    state_dict = inspect.unwrap(Optimizer.state_dict)


class _Adam(_Plain, Adam):
    step = torch.no_grad()(inspect.unwrap(Adam.step))


class _RMSprop(_Plain, RMSprop):
    step = torch.no_grad()(inspect.unwrap(RMSprop.step))


class RMSpropTF(_Plain):
    """RMSProp as in TensorFlow 1, which A3C, PAAC and IMPALA were tuned with.

        ms <- decay * ms + (1 - decay) * g^2        p <- p - lr * g / sqrt(ms + eps)

    It differs from torch's in that epsilon is under the root and `ms` starts at 1: with PAAC's eps = 0.1 that is
    another algorithm. No momentum, not centred.

    Args:
        params: Parameters.
        lr: Step size.
        eps: Epsilon, under the root.
        decay: Share of the old mean square that is kept.
        initial_mean_square: Start of `ms`: 1 as in TensorFlow 1, 0 as in Lasagne.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, eps: float, decay: float = 0.99, initial_mean_square: float = 1.0
    ) -> None:
        defaults = {"lr": lr, "eps": eps, "decay": decay, "initial_mean_square": initial_mean_square}
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step from the gradients in `.grad`; parameters without one are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step_parameter(param, param.grad, group)
        return loss

    def _step_parameter(self, param: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """The two equations above, in place."""
        state = self.state[param]
        if "mean_square" not in state:
            state["mean_square"] = torch.full_like(param, group["initial_mean_square"])
        mean_square: Tensor = state["mean_square"]
        mean_square.mul_(group["decay"]).addcmul_(gradient, gradient, value=1.0 - group["decay"])
        param.addcdiv_(gradient, (mean_square + group["eps"]).sqrt_(), value=-group["lr"])
