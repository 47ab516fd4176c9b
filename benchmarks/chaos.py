"""Kills runs with SIGKILL at random moments, resumes them, and compares what they leave with runs that were not killed.

    python benchmarks/chaos.py [CASE...] [--kills 20] [--seed 1] [--output benchmarks/results/chaos.json]

A run is killed in its start, while it collects, learns or writes a checkpoint (one every few updates), resumed, killed
again, and so on; after the last kill it trains to its end. Then weights, optimiser, replay, counters and metrics.jsonl
must be those of the run that was left alone, but for the clock. After every kill no process and nothing in /dev/shm may
be left within two seconds. Ends with 1 if anything differs, or a run ends before its last kill. Results are added to
the file case by case.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from slipstream.run.record import conditions, save
from slipstream.run.remains import differences

CARTPOLE = "--env CartPole-v1 --num-envs 8 --lanes 4 --placement.workers 2 --placement.env-workers 2"
PENDULUM = "--env Pendulum-v1 --num-envs 8 --lanes 4 --unroll 8 --placement.workers 2 --placement.env-workers 2"
PONG = "--env ALE/Pong-v5 --num-envs 4 --lanes 2 --unroll 16 --placement.workers 2 --env-options.max-episode-steps 120"
OFTEN = "--log.checkpoint-every 400 --log.metrics-every 500 --log.no-tensorboard --log.keep-last 2"
REPLAY = "--algo.replay.capacity 4000 --algo.replay.learning-starts 500 --algo.batch-size 32 --algo.replay.ratio 0.125"

CASES = {
    "ppo": f"ppo {CARTPOLE} --schedule concurrent --total-steps 30000",
    "a2c": f"a2c {CARTPOLE} --schedule concurrent --total-steps 20000",
    "impala": f"impala {CARTPOLE} --schedule concurrent --total-steps 20000",
    "appo": f"appo {CARTPOLE} --schedule concurrent --total-steps 30000",
    "dqn": f"dqn {CARTPOLE} --unroll 8 {REPLAY} --total-steps 12000",
    "rainbow": f"rainbow {CARTPOLE} --unroll 8 {REPLAY} --schedule concurrent --total-steps 8000",
    "r2d2": f"r2d2 {CARTPOLE} --unroll 8 --algo.length 16 --algo.burn-in 8 {REPLAY} --total-steps 8000",
    "sac": f"sac {PENDULUM} {REPLAY} --schedule concurrent --total-steps 8000",
    "td3": f"td3 {PENDULUM} {REPLAY} --total-steps 14000",
    "ppo, processes": f"ppo {CARTPOLE} --placement.collectors process --schedule concurrent --total-steps 30000",
    "ppo, Pong": f"ppo {PONG} --algo.batch-size 32 --algo.epochs 1 --schedule concurrent --total-steps 9000",
    "dqn, Pong": f"dqn {PONG} {REPLAY} --total-steps 9000",
}
LIMIT = 2.0  # seconds for a killed run's processes to be gone


def spawn(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts the command line."""
    with log.open("ab") as file:
        return subprocess.Popen([sys.executable, "-m", "slipstream", *words], stdout=file, stderr=file)


def newest(folder: Path) -> int:
    """Steps of the newest checkpoint of the run in `folder`; -1 if there is none."""
    return max((int(path.name) for path in folder.glob("*/checkpoints/[0-9]*") if path.name.isdecimal()), default=-1)


def kill(process: subprocess.Popen[bytes]) -> list[str]:
    """Kills the driver alone; returns what is left of its processes after the limit."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=LIMIT)
    return [str(child) for child in alive if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def until_checkpoint(process: subprocess.Popen[bytes], folder: Path, before: int) -> bool:
    """Waits for a checkpoint after that of step `before`; whether the process lives on."""
    while process.poll() is None:
        if newest(folder) > before:
            return True
        time.sleep(0.002)  # between two looks at a directory; nothing tells of its changes
    return False


def attempt(words: list[str], folder: Path) -> list[str]:
    """What continues the run in `folder`, or begins it where it had no checkpoint yet."""
    if newest(folder) >= 0:
        (run,) = folder.iterdir()
        return ["resume", str(run)]
    shutil.rmtree(folder, ignore_errors=True)
    return ["train", *words, "--log.dir", str(folder)]


def case(name: str, kills: int, chance: random.Random, root: Path) -> dict[str, Any]:
    """One run that is killed, beside one that is not."""
    words, log = [*CASES[name].split(), *OFTEN.split()], root / "log"
    whole, killed = root / "whole", root / "killed"
    start = time.perf_counter()
    if spawn(["train", *words, "--log.dir", str(whole)], log).wait() != 0:
        raise SystemExit(f"{name}: the run failed\n{log.read_text()[-2000:]}")
    seconds = time.perf_counter() - start
    problems: list[str] = []
    ended: subprocess.Popen[bytes] | None = None  # by itself, though it had not been killed often enough
    done = early = 0
    before = set(os.listdir("/dev/shm"))
    while done < kills:
        process = spawn(attempt(words, killed), log)
        if chance.random() < 0.25:  # somewhere in the start
            time.sleep(chance.uniform(0.0, min(seconds, 4.0)))
            early += 1
        elif not until_checkpoint(process, killed, newest(killed)):
            ended = process
            break
        else:
            time.sleep(chance.uniform(0.0, 0.3))
        if process.poll() is not None:
            ended = process
            break
        problems += [f"left after kill {done}: {child}" for child in kill(process)]
        done += 1
    if ended is not None:
        code = ended.wait()
        told = f"with exit code {code}: {log.read_text()[-2000:]}" if code else "make it longer"
        problems.append(f"it ended after {done} of {kills} kills, {told}")
    elif newest(killed) < newest(whole) and spawn(attempt(words, killed), log).wait() != 0:
        problems.append(f"the resumed run failed: {log.read_text()[-2000:]}")
    problems += [f"left in /dev/shm: {file}" for file in set(os.listdir("/dev/shm")) - before]
    (one,), (other,) = whole.iterdir(), killed.iterdir()
    problems += list(differences(one, other))
    return {"kills": done, "in_the_start": early, "identical": not problems, "problems": problems[:20]}


def main() -> int:
    """Kills as told; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--kills", type=int, default=20, help="of each run")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the result")
    args = parser.parse_args()
    output: Path | None = args.output
    there: dict[str, Any] = json.loads(output.read_text())["cases"] if output and output.exists() else {}
    found: dict[str, Any] = {}
    for name in args.cases or CASES:
        with tempfile.TemporaryDirectory() as root:
            found[name] = case(name, args.kills, random.Random(f"{args.seed} {name}"), Path(root)) | conditions("cpu")
        told = "identical" if found[name]["identical"] else "DIFFERENT: " + "; ".join(found[name]["problems"][:3])
        print(f"{name}: {found[name]['kills']} kills, {told}", flush=True)
        if output:
            save({"cases": there | found}, output)
    return int(not all(result["identical"] for result in found.values()))


if __name__ == "__main__":
    sys.exit(main())
