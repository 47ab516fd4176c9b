"""What every committed result says of its making."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from slipstream.run.machine import cores, processor


def conditions(device: str = "cpu") -> dict[str, Any]:
    """Command, machine, versions and the device that networks ran on (`cpu` or `cuda`)."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "machine": {"processor": processor(), "cores": cores()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }


def save(result: dict[str, Any], file: Path) -> None:
    """Writes a result, and its folder if there is none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=2) + "\n")
