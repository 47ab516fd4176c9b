"""Recurrent cores: memory between rows, forgotten where an episode starts."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

State = tuple[Tensor, ...]
"""Recurrent state, float32 `[B, H]` each: `(h, c)` of an LSTM, `(h,)` of a GRU."""


class Core(nn.Module):
    """An LSTM or GRU layer over `[T, B, F]` whose state is reset at given rows.

    Identity: `step` row by row, with the state zeroed where `first` says so, is `forward`.

    Args:
        kind: `lstm` or `gru`.
        inputs: F, features per row.
        size: H, size of the state and of the output.
    """

    def __init__(self, kind: Literal["lstm", "gru"], inputs: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.cell = nn.LSTM(inputs, size) if kind == "lstm" else nn.GRU(inputs, size)

    def initial_state(self, columns: int) -> State:
        """Zeros `[B, H]`, on the device of the parameters."""
        device = next(self.parameters()).device
        zeros = torch.zeros(columns, self.size, device=device)
        return (zeros, zeros.clone()) if isinstance(self.cell, nn.LSTM) else (zeros,)

    def step(self, features: Tensor, state: State) -> tuple[Tensor, State]:
        """One row: features `[B, F]` and state to output `[B, H]` and the next state."""
        output, state = self._run(features.unsqueeze(0), state)
        return output.squeeze(0), state

    def forward(self, features: Tensor, state: State, first: Tensor) -> tuple[Tensor, State]:
        """A slab of rows.

        The sequence is cut only at rows where some column starts an episode, so a slab without a start is one call of
        the fused layer. (Asking where they are waits for the device once.)

        Args:
            features: float32 `[T, B, F]`.
            state: State before row 0, `[B, H]` each.
            first: bool `[T, B]`, True where an episode starts at that row: its state is zeroed before.

        Returns:
            Output float32 `[T, B, H]` and the state after row T-1.
        """
        starts = {0, *first.any(dim=1).nonzero().flatten().tolist()}
        cuts = [*sorted(starts), len(features)]
        outputs: list[Tensor] = []
        for begin, end in pairwise(cuts):
            keep = ~first[begin].unsqueeze(1)
            state = tuple(torch.where(keep, part, 0.0) for part in state)
            output, state = self._run(features[begin:end], state)
            outputs.append(output)
        return torch.cat(outputs), state

    def _run(self, features: Tensor, state: State) -> tuple[Tensor, State]:
        """The fused layer over `[T, B, F]`; it wants its state with a leading axis of layers."""
        if isinstance(self.cell, nn.LSTM):
            hidden, memory = state
            output, (hidden, memory) = self.cell(features, (hidden.unsqueeze(0), memory.unsqueeze(0)))
            return output, (hidden.squeeze(0), memory.squeeze(0))
        (hidden,) = state
        output, hidden = self.cell(features, hidden.unsqueeze(0))
        return output, (hidden.squeeze(0),)
