"""Initial weights, as a function of a seed and of nothing else."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from slipstream import dice
from slipstream.arithmetic import adopted

Init = Literal["orthogonal", "paac", "default"]


@contextmanager
def keyed_initialisation(seed: int, role: str) -> Generator[None]:
    """Inside, torch's global generator of the CPU is seeded by (seed, role); afterwards it is what it was before.

    One math thread is used meanwhile: the QR decomposition behind orthogonal weights may round differently with more.
    Modules are to be built on the CPU here and moved later, so that every device starts from the same bits.
    """
    with torch.random.fork_rng(devices=[]), adopted():
        # Not torch.manual_seed: it also seeds the generators of GPUs, which nobody would give back.
        torch.default_generator.manual_seed(int(dice.seed_sequence(seed, role).generate_state(1)[0]))
        yield


def initialise(module: nn.Module, init: Init, gain: float = math.sqrt(2.0)) -> None:
    """Draws the weights and biases of every convolution, linear layer and recurrent core inside `module`.

    - `orthogonal`: orthogonal weights times `gain` (1 in recurrent cores), biases 0. The gains in use are those of
      Stable-Baselines3 and CleanRL: sqrt(2) in the trunk, 0.01 in the policy head, 1 in the value head.
    - `paac`: uniform in +-1/sqrt(fan_in), biases too.
    - `default`: left as torch drew them.

    Args:
        module: Any module; itself included.
        init: The scheme.
        gain: Factor of orthogonal weights.
    """
    if init == "default":
        return
    for layer in module.modules():
        match layer:
            case nn.Linear() | nn.Conv2d():
                bias = [] if layer.bias is None else [layer.bias]
                _draw(init, gain, [layer.weight], bias, layer.weight[0].numel())
            case nn.LSTM() | nn.GRU():
                weights = [p for name, p in layer.named_parameters() if name.startswith("weight")]
                biases = [p for name, p in layer.named_parameters() if name.startswith("bias")]
                _draw(init, 1.0, weights, biases, layer.hidden_size)
            case _:
                pass


def _draw(init: Init, gain: float, weights: Sequence[Tensor], biases: Sequence[Tensor], fan_in: int) -> None:
    """Fills the parameters of one layer."""
    if init == "orthogonal":
        for weight in weights:
            # A scratch tensor in plain memory order: the values must not depend on channels-last strides.
            weight.data.copy_(nn.init.orthogonal_(torch.empty(weight.shape), gain))
        for bias in biases:
            nn.init.zeros_(bias)
    else:
        bound = 1.0 / math.sqrt(fan_in)
        for parameter in (*weights, *biases):
            parameter.data.copy_(torch.empty(parameter.shape).uniform_(-bound, bound))
