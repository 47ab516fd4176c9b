"""Noisy networks: linear layers whose weights are perturbed by learned amounts, in place of random actions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

_HALF_STEP = 2.0**-24


class NoisyLinear(nn.Module):
    """Linear layer with factorised Gaussian noise (Fortunato et al., 2018, eq. 9 to 11).

        y = W x + b + e_out * (S (e_in * x) + s),    e = f(xi),  xi ~ N(0, 1),  f(xi) = sign(xi) sqrt(|xi|)

    Identity: it is the linear layer with the weights `W + S * outer(e_out, e_in)` and the biases `b + s * e_out`. They
    are never written down: that would be 1.6 million numbers of memory per forward for 3136x512, which costs up to four
    times as much on small batches and saves a third on a batch of 64 at best.

    There is noise for gradients, which the rows of a batch share, and noise of its own for every slot that acts: as it
    only scales x and y, that costs nothing, and slots that shared it would all explore in the same direction at once.

    W and b are drawn uniformly from +-1/sqrt(inputs), S and s are sigma0/sqrt(inputs) (section 3.2 of the paper). There
    is no noise before the first `renoise`.

    Args:
        inputs: Size of x.
        outputs: Size of y.
        sigma0: Initial amount of noise.
        slots: B, slots that act.

    Attributes:
        weight: W, float32 `[outputs, inputs]`, the mean weights.
        bias: b, float32 `[outputs]`.
        weight_sigma: S, float32 `[outputs, inputs]`.
        bias_sigma: s, float32 `[outputs]`.
        noise_in: e_in of gradients, float32 `[inputs]`, a buffer.
        noise_out: e_out, float32 `[outputs]`, likewise.
        slot_noise_in: e_in of every slot, float32 `[B, inputs]`, a buffer that is published with the weights.
        slot_noise_out: e_out, float32 `[B, outputs]`, likewise.
        noise_width: W, uniform numbers that `renoise` takes: inputs + outputs.
    """

    noise_in: Tensor
    noise_out: Tensor
    slot_noise_in: Tensor
    slot_noise_out: Tensor

    def __init__(self, inputs: int, outputs: int, sigma0: float = 0.5, slots: int = 0) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(inputs)
        self.noise_width = inputs + outputs
        self.weight = nn.Parameter(torch.empty(outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound))
        self.weight_sigma = nn.Parameter(torch.full((outputs, inputs), sigma0 * bound))
        self.bias_sigma = nn.Parameter(torch.full((outputs,), sigma0 * bound))
        self.register_buffer("noise_in", torch.zeros(inputs))
        self.register_buffer("noise_out", torch.zeros(outputs))
        self.register_buffer("slot_noise_in", torch.zeros(slots, inputs))
        self.register_buffer("slot_noise_out", torch.zeros(slots, outputs))

    @torch.no_grad()
    def renoise(self, dice: Tensor) -> None:
        """Draws e_in and e_out anew.

        Args:
            dice: float32 `[W]` for gradients, or `[B, W]` for all slots, uniform in `[0, 1)`, multiples of 2**-23; half
                a step is added, as in `DiagGaussian.sample`, so that both ends are finite.
        """
        xi = torch.special.ndtri(dice + _HALF_STEP)
        inputs, outputs = (xi.sign() * xi.abs().sqrt()).split([len(self.noise_in), len(self.noise_out)], dim=-1)
        (self.noise_in if dice.dim() == 1 else self.slot_noise_in).copy_(inputs)
        (self.noise_out if dice.dim() == 1 else self.slot_noise_out).copy_(outputs)

    def forward(self, x: Tensor, mean: bool = False, slot: Tensor | None = None) -> Tensor:
        """Rows float32 `[..., inputs]` to `[..., outputs]`.

        Args:
            x: The rows; `[N, inputs]` with `slot`.
            mean: Whether to leave the noise out.
            slot: int64 `[N]`, whose noise each row has; None for that of gradients.
        """
        y = functional.linear(x, self.weight, self.bias)
        if mean:
            return y
        noise_in = self.noise_in if slot is None else self.slot_noise_in[slot]
        noise_out = self.noise_out if slot is None else self.slot_noise_out[slot]
        return y + noise_out * functional.linear(x * noise_in, self.weight_sigma, self.bias_sigma)
