"""Memory of a full replay of Atari: what the layout says, and what the process grows by as it fills.

    python benchmarks/replay_memory.py [--capacity 1000000] [--env ALE/Pong-v5] [--output FILE]

DQN collects with random actions and learns nothing until the replay has turned over once, so that every page of it has
been written to. The growth is that of the process's resident memory since before the replay was allocated; the network,
the environments and the slab (some ten megabytes) are in it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from slipstream.run.presets import configure
from slipstream.run.record import conditions, save
from slipstream.run.training import Training

_POINTS = 10


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capacity", type=int, default=1_000_000)
    parser.add_argument("--env", default="ALE/Pong-v5")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/replay_memory.json"))
    args = parser.parse_args()

    steps = args.capacity + args.capacity // 50
    settings: dict[str, Any] = {
        "total_steps": 2 * steps,
        "num_envs": 16,
        "unroll": 64,
        "lanes": 2,
        "net.torso": "nips_cnn",
        "algo.replay.capacity": args.capacity,
        "algo.replay.learning_starts": 2 * steps,
        "algo.exploration.final": 1.0,
    }
    before, start = resident(), time.perf_counter()
    training = Training(configure("dqn", args.env, settings))
    windows = training.learner.windows
    assert windows is not None
    replay = windows.rows
    curve: list[tuple[int, int]] = []
    try:
        for report in training:
            if report.steps >= (len(curve) + 1) * steps / _POINTS:
                curve.append((report.steps, resident() - before))
                print(f"{report.steps:>9,} steps: {curve[-1][1] / 1e9:.2f} GB", flush=True)
            if report.steps >= steps:
                break
        assert int((replay.head - replay.oldest).sum()) >= args.capacity - 2 * 64 * 16, "the replay is not full"
    finally:
        training.close()
    result = {
        "env": args.env,
        "rows": replay.slots * replay.kept,
        "layout_bytes": replay.bytes,
        "grown_bytes": curve[-1][1],
        "bytes_per_row": curve[-1][1] / (replay.slots * replay.kept),
        "curve": curve,
        "seconds": round(time.perf_counter() - start, 1),
    }
    print({key: value for key, value in result.items() if key != "curve"})
    save({**conditions("cpu"), **result}, args.output)


if __name__ == "__main__":
    main()
