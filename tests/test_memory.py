from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import psutil
import pytest
import torch

from slipstream import memory, process, tree

LAYOUT = {
    "b": (torch.empty(3, 5, dtype=torch.bool, device="meta"), torch.empty(7, dtype=torch.uint8, device="meta")),
    "a": torch.empty(2, 3, device="meta"),
    "scalar": torch.empty((), dtype=torch.int64, device="meta"),
    "nothing": torch.empty(0, 4, device="meta"),
}


def test_both_sides_see_the_same_numbers_and_nothing_is_left() -> None:
    gc.collect()  # what earlier tests left must not be closed in between
    fds, names = psutil.Process().num_fds(), set(os.listdir("/dev/shm"))
    fd = process.anonymous_file()
    one, other = memory.share(fd, LAYOUT), memory.share(fd, LAYOUT)
    os.close(fd)
    leaves = tree.leaves(one)
    assert not any(leaf.any() for leaf in leaves)
    for number, leaf in enumerate(leaves, 1):
        leaf.fill_(number)
    for leaf, same, like in zip(leaves, tree.leaves(other), tree.leaves(LAYOUT), strict=True):
        assert (same.shape, same.dtype) == (like.shape, like.dtype)
        assert torch.equal(leaf, same)
        assert leaf.data_ptr() % 64 == 0
    assert set(os.listdir("/dev/shm")) == names
    del one, other, leaves, leaf, same
    assert psutil.Process().num_fds() == fds


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere space is taken when it is written to")
@pytest.mark.parametrize("reserve", [False, True])
def test_space_that_is_reserved_is_taken_at_once(tmp_path: Path, reserve: bool) -> None:
    size = 1_000_000
    with (tmp_path / "file").open("w+b") as file:
        flat = memory.share(file.fileno(), torch.empty(size, dtype=torch.uint8, device="meta"), reserve=reserve)
        status = os.fstat(file.fileno())
        assert status.st_size >= size
        assert (status.st_blocks * 512 >= size) == reserve
        assert not flat.any()
