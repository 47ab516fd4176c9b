"""Prioritised draws against cpprb and torchrl: how long a batch takes, one thread each, in alternating rounds.

    python benchmarks/replay.py [--rounds 10] [--steps 100] [--venv benchmarks/.venvs/replay]

sampling           draw 512 of a million items, weigh them, write 512 new priorities back.
with_observations  the same of fewer items, and gather them: observation, action, reward, end and next observation; each
                   observation has 4 x 84 x 84 bytes.

Slipstream stores a frame once and puts its observations together when they are drawn; the others store both of an
item, ready to be copied.

All of them run in one process (benchmarks/peers_replay_driver.py), in a virtual environment of their own that is made
when it is missing: several GB where pip brings torch with CUDA; PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
makes it small. torchrl's compiled trees load only with the torch that they were built with, hence the exact versions.

Ratios are medians over the rounds; above 1 the peer takes longer. Results go to
benchmarks/results/replay_sampling.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
from pathlib import Path
from typing import Any

from peers.environments import interpreter

from slipstream.run.record import conditions, save

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("numpy", "gymnasium", "cpprb==11.0.0", "torch==2.12.1", "torchrl==0.13.3")
OURS = "slipstream"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def compared(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of the rounds: microseconds of each library, and how many times ours each peer takes."""
    names = list(rounds[0])
    peers = [name for name in names if name != OURS] if OURS in names else []
    return {
        "microseconds": {name: statistics.median(row[name] for row in rounds) for name in names},
        "times_as_long_as_ours": {name: statistics.median(row[name] / row[OURS] for row in rounds) for name in peers},
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capacity", type=int, default=1_000_000)
    parser.add_argument("--observations", type=int, default=20_000, help="items with two observations, 28 kB each")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=100, help="batches per round; a tenth of it with observations")
    parser.add_argument("--venv", type=Path, default=Path("benchmarks/.venvs/replay"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/replay_sampling.json"))
    args = parser.parse_args()

    sizes = {name: getattr(args, name) for name in ("capacity", "observations", "batch", "rounds", "steps")}
    words = [f"--{name}={value}" for name, value in sizes.items()]
    driver = subprocess.run(
        [str(interpreter(args.venv, PEERS)), str(ROOT / "benchmarks" / "peers_replay_driver.py"), *words],
        env={**os.environ, **ONE_THREAD, "PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    measured = json.loads(driver.stdout.splitlines()[-1])
    made = conditions("cpu")
    result = {
        **made,
        "versions": {OURS: made["versions"][OURS], **measured["versions"]},
        **sizes,
        **{part: compared(measured[part]) for part in ("sampling", "with_observations")},
    }
    for part in ("sampling", "with_observations"):
        times, ratios = result[part]["microseconds"], result[part]["times_as_long_as_ours"]
        told = (
            f"{name} {time:.0f} us" + (f" ({ratios[name]:.2f} x)" if name in ratios else "")
            for name, time in times.items()
        )
        print(f"{part}: {', '.join(told)}")
    save(result, args.output)


if __name__ == "__main__":
    main()
