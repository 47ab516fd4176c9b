from __future__ import annotations

import torch

from slipstream import slab


def test_a_state_is_zeroed_whatever_it_was() -> None:
    """A state that is not finite ends with its episode."""
    state = (torch.tensor([[1.0, -2.0], [torch.nan, torch.inf], [3.0, 4.0]]), torch.ones(3, 2, 2))
    hidden, cell = slab.keep(state, torch.tensor([True, False, False]))
    assert hidden.tolist() == [[1.0, -2.0], [0.0, 0.0], [0.0, 0.0]]
    assert cell.sum(dim=(1, 2)).tolist() == [4.0, 0.0, 0.0]
