from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from slipstream import parcel


@dataclass(frozen=True)
class Thing:
    name: str
    numbers: Tensor
    more: dict[str, Any]


class Pair(NamedTuple):
    left: Tensor
    right: float


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.bool, torch.int64)


def tensors() -> dict[str, Tensor]:
    found = {str(dtype): torch.arange(7).to(dtype) for dtype in DTYPES}
    found |= {
        "scalar": torch.tensor(3.0),
        "nothing": torch.empty(0, 4),
        "channels last": torch.arange(120.0).view(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "with gaps": torch.arange(12.0).view(3, 4)[:, ::2],
        "turned": torch.arange(6).view(2, 3).t(),
        "turned cube": torch.arange(24).view(2, 3, 4).permute(2, 0, 1),
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "part": torch.arange(9.0)[2:5],
        "learned": torch.nn.Parameter(torch.ones(3)),
    }
    return found


@pytest.mark.parametrize("name", tensors())
def test_a_tensor_comes_out_as_it_went_in(name: str) -> None:
    given = tensors()[name]
    found = parcel.unpack(*parcel.pack(given))
    assert found.dtype == given.dtype
    assert torch.equal(found, given)
    assert not found.requires_grad
    assert found.data_ptr() % 64 == 0 or not found.numel()


@pytest.mark.parametrize("name", ["channels last", "turned", "turned cube"])
def test_the_order_of_memory_is_kept(name: str) -> None:
    given = tensors()[name]
    assert parcel.unpack(*parcel.pack(given)).stride() == given.stride() != given.contiguous().stride()


def test_what_holds_tensors_comes_out_with_them() -> None:
    given = Thing("a", torch.ones(2, 3), {"pair": Pair(torch.zeros(3, dtype=torch.bool), 0.5), "rest": [None, (1,)]})
    found = parcel.unpack(*parcel.pack((given, 7)))
    assert found[1] == 7
    assert found[0].name == "a"
    assert torch.equal(found[0].numbers, given.numbers)
    assert isinstance(found[0].more["pair"], Pair)
    assert torch.equal(found[0].more["pair"].left, torch.zeros(3, dtype=torch.bool))
    assert found[0].more["rest"] == [None, (1,)]


def test_a_parcel_is_the_only_memory_of_what_comes_out() -> None:
    given = torch.zeros(5)
    letter, sent = parcel.pack([given, given])
    given.fill_(1.0)
    first, second = parcel.unpack(letter, sent)
    assert not first.any()
    first.fill_(2.0)
    assert not second.any()
    assert parcel.unpack(letter, sent)[0][0] == 2.0


def test_numbers_in_the_order_of_memory() -> None:
    given = tensors()["channels last"]
    flat = parcel.in_memory_order(given)
    assert flat.tolist() == given.permute(0, 2, 3, 1).flatten().tolist()
    flat[0] = -1.0
    assert given[0, 0, 0, 0] == -1.0
