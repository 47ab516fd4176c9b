"""The machine, the libraries and the sources that a run is made with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch

_PACKAGES = ("slipstream", "torch", "numpy", "gymnasium", "ale-py", "safetensors")
_OPTIONAL = ("envpool", "gfootball", "mujoco", "box2d-py")
_INFORMATION, _MEMORY = Path("/proc/cpuinfo"), Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


def surroundings() -> dict[str, Any]:
    """Versions, hardware and git state: what a result may depend on besides the configuration."""
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "cpu": processor(),
        "cores": cores(),
        "gpus": [torch.cuda.get_device_name(place) for place in range(torch.cuda.device_count())],
        "git": _git(),
    }


def versions() -> dict[str, str]:
    """Those of the libraries that bits may depend on, as far as they are installed."""
    return {name: version for name in (*_PACKAGES, *_OPTIONAL) if (version := _version(name))}


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def cpu_seconds() -> float:
    """CPU time of this process and of all that descend from it; of those that have ended, what was waited for.

    Where nobody tells of processes that still run (not on Linux), they are left out until they end.
    """
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime + sum(_running(str(os.getpid())))


def _running(parent: str) -> Iterator[float]:
    """CPU-seconds of each process that descends from `parent` and still runs, and what it waited for itself."""
    for listed in Path("/proc", parent, "task").glob("*/children"):
        with suppress(OSError):  # a thread, or a process, that ends meanwhile
            for child in listed.read_text().split():
                # The name in parentheses may hold anything; the times are the 14th to 17th fields.
                fields = Path("/proc", child, "stat").read_text().rpartition(")")[2].split()
                yield sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
                yield from _running(child)


def available_memory() -> int | None:
    """Bytes that this process can still take without swapping; None where nobody says.

    A control group counts the cached pages of files as used; those that nobody has read lately make room.
    """
    if not _MEMORY.is_file():
        return None
    free = int(_said(_MEMORY, "MemAvailable").split()[0]) * 1024
    limit, used = (_GROUP / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and limit.read_text().strip().isdigit():
        cached = int(_said(_GROUP / "memory.stat", "inactive_file", " ") or 0)
        free = min(free, int(limit.read_text()) - int(used.read_text()) + cached)
    return free


def processor() -> str:
    """Name of the processor, where Linux tells, else its kind."""
    return _said(_INFORMATION, "model name") or platform.processor() or platform.machine()


def gains_by_bfloat16() -> bool | None:
    """Whether products take less time in bfloat16 than in float32 on this processor; None where nobody says.

    By its instructions: with AMX and on ARM they do. Those of AVX-512 start twice as seldom as float32's on processors
    of Intel, where a torso then takes 1.6 times as long; on AMD's it takes 0.6 of the time.
    """
    flags = set((_said(_INFORMATION, "flags") or _said(_INFORMATION, "Features")).split())
    if not flags:
        return None
    if "avx512_bf16" in flags and _said(_INFORMATION, "vendor_id") != "GenuineIntel":
        return True
    return not flags.isdisjoint({"amx_bf16", "bf16"})


def quick_precision(device: str) -> Literal["float32", "bfloat16"]:
    """The faster arithmetic of a torso, by what the hardware is known for; `float32` where nobody says.

    It is not measured: a measurement can come out differently twice, and the same command would be two runs.

    Args:
        device: As `Placement.device`.
    """
    if device != "cpu" and torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if gains_by_bfloat16() else "float32"


def _said(file: Path, key: str, separator: str = ":") -> str:
    """What Linux says under a key, of the first core where it is of cores; empty where it says nothing."""
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((line.partition(separator)[2].strip() for line in lines if line.startswith(key)), "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit of the working directory, and whether it has uncommitted changes; None outside a repository."""

    def ask(*words: str) -> str:
        answer = subprocess.run(["git", *words], capture_output=True, text=True, timeout=10, check=True)
        return answer.stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
