"""What every committed result says of its making."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slipstream.run.machine import surroundings


def conditions(device: str) -> dict[str, Any]:
    """Those of this process, whose networks run on `device` (`cpu` or `cuda`)."""
    return made(["python", *sys.argv], surroundings(), device)


def made(words: Sequence[str], facts: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Command, sources, machine, versions and device, without the places of files on this machine.

    Args:
        words: What was typed.
        facts: `surroundings` of then, such as a run's env.json.
        device: `cpu` or `cuda`.
    """
    git = facts["git"] or {"commit": None, "dirty": None}
    words = ["python", *words] if words[0].endswith(".py") else [Path(words[0]).name, *words[1:]]
    command = re.sub(r" --log\.dir[ =]\S+", "", shlex.join(words))
    return {
        "command": re.sub(r"(?<![^\s=:])/\S+/(?=[^/\s])", "", command),
        "commit": git["commit"],
        "dirty": git["dirty"],
        "machine": {"processor": facts["cpu"], "cores": facts["cores"]},
        "versions": {"python": facts["python"], **facts["versions"]},
        "device": facts["gpus"][0] if device == "cuda" else "cpu",
    }


def save(result: dict[str, Any], file: Path) -> None:
    """Writes a result, and its folder if there is none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=2) + "\n")
