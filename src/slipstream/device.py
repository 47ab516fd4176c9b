"""The device that networks live on."""

from __future__ import annotations

import os

import torch


def chosen(name: str) -> torch.device:
    """The device called `auto`, `cpu` or `cuda`, ready for exact arithmetic.

    Raises:
        ValueError: There is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("placement.device=cuda, but PyTorch sees no GPU here; use --placement.device cpu")
    device = torch.device(name)
    exact_kernels(device)
    return device


def exact_kernels(device: torch.device) -> None:
    """Has this process use kernels that give the same bits every time; PyTorch warns of one that has no such form."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
