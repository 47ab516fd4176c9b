"""A process that trains for its first 1,000 steps and says how long that took and what it held: `python -m ...`.

Its argument is a configuration as JSON; the answer is one line of JSON. `bench` runs it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

_STEPS = 1_000


def main() -> None:
    """Trains, and prints `startup_seconds` (since this process was launched) and `peak_mb` (of this process)."""
    from slipstream.run.config import from_plain
    from slipstream.run.training import Training

    training = Training(from_plain(json.loads(sys.argv[1])))
    try:
        for report in training:
            if report.steps >= _STEPS:
                break
    finally:
        training.close()
    sys.stdout.write(json.dumps({"startup_seconds": _age(), "peak_mb": _peak() / 1e6}) + "\n")


def _age() -> float:
    """Seconds since this process was launched."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    up = float(Path("/proc/uptime").read_text().split()[0])
    return up - ticks / os.sysconf("SC_CLK_TCK")


def _peak() -> int:
    """Bytes that this process has held at most; `ru_maxrss` has those of who launched it, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    own = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]  # some kernels don't say
    return 1024 * (own[0] if own else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


if __name__ == "__main__":
    main()
