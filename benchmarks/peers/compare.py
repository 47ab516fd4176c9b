"""Slipstream beside other libraries on the same work, in alternating rounds: steps per second, start-up, memory.

    python benchmarks/peers/compare.py [--groups "one pass" "four passes" replay CartPole] [--rounds 3] [--seconds 60]
                                       [--only NAME ...] [--venvs benchmarks/.venvs] [--output ...json]

Inside a group all do the same number of gradient passes over each row, with the same network on the same game. Each
library has a virtual environment of its own, made when it is missing (2 to 5 GB each; their torch is that of this
project), and a driver in `drivers` with its best settings for a machine of few cores; a driver prints one JSON line.

In a round every contestant of a group runs once, in turn, since other programs share the machine. What counts is the
ratio of the two in one round, medians over the rounds. Results go to benchmarks/results/peers.json, group by group.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from environments import interpreter

from slipstream.run.record import conditions, save

ROOT = Path(__file__).resolve().parents[2]
DRIVERS = Path(__file__).resolve().parent / "drivers"
OURS = "slipstream"
TORCH = f"torch=={torch.__version__.partition('+')[0]}"


PACKAGES: dict[str, Sequence[str]] = {
    "sample-factory": ("sample-factory==2.1.1", "ale-py", "opencv-python-headless", "psutil"),
    "sb3": ("stable-baselines3[extra]==2.9.2", "ale-py", "psutil"),
    "rllib": ("ray[rllib]==2.60.0", "ale-py", "opencv-python-headless", "psutil"),
    "cleanrl": ("envpool", "gymnasium", "numpy", "psutil"),
    OURS: (f"{ROOT}", "psutil"),
}


class Contestant(NamedTuple):
    """A driver with its arguments.

    Attributes:
        peer: Which environment it runs in.
        driver: File in `drivers`.
        words: Arguments.
    """

    peer: str
    driver: str
    words: tuple[str, ...]


def ours(algo: str, *settings: str, env: str = "ALE/Pong-v5") -> Contestant:
    """A configuration of ours."""
    return Contestant(OURS, "ours.py", (algo, "--env", env, *(word for each in settings for word in ("--set", each))))


PIXELS = "net.torso=nature_cnn"
HALF = "net.precision=bfloat16"
A2C = ("schedule=sync", "algo.reuse_forward=true", "num_envs=128", PIXELS)
ONE_PASS = ("algo.epochs=1", "schedule=concurrent", PIXELS)
# 32 rows for every 4 steps, as Stable-Baselines3 has it.
REPLAY = (
    *("algo.batch_size=32", "algo.replay.ratio=0.25", "algo.n_step=1", "algo.double=false"),
    *("algo.replay.capacity=100000", "algo.replay.learning_starts=2000", PIXELS),
)
GROUPS: dict[str, dict[str, Contestant]] = {
    "one pass": {
        "a2c": ours("a2c", *A2C),
        "a2c bfloat16": ours("a2c", *A2C, HALF),
        "impala bfloat16": ours("impala", "schedule=concurrent", PIXELS, HALF),
        "appo bfloat16": ours("appo", *ONE_PASS, HALF),
        "sample-factory": Contestant("sample-factory", "sample_factory_appo.py", ("--preset", "fast", "--epochs", "1")),
        "sb3 a2c": Contestant("sb3", "sb3.py", ("--algo", "a2c")),
        "rllib impala": Contestant("rllib", "rllib_async.py", ()),
    },
    "four passes": {
        "ppo": ours("ppo", "schedule=concurrent", PIXELS),
        "ppo bfloat16": ours("ppo", "schedule=concurrent", PIXELS, HALF),
        "ppo bfloat16, 64 environments": ours("ppo", "schedule=concurrent", "num_envs=64", "unroll=32", PIXELS, HALF),
        "cleanrl": Contestant("cleanrl", "cleanrl_envpool.py", ()),
        "sb3 ppo": Contestant("sb3", "sb3.py", ("--algo", "ppo")),
        "sample-factory": Contestant("sample-factory", "sample_factory_appo.py", ("--preset", "fast", "--epochs", "4")),
    },
    "replay": {
        "dqn": ours("dqn", "schedule=concurrent", *REPLAY),
        "dqn bfloat16": ours("dqn", "schedule=concurrent", *REPLAY, HALF),
        "sb3 dqn": Contestant("sb3", "sb3.py", ("--algo", "dqn")),
    },
    "CartPole": {
        "ppo": ours(
            "ppo", "num_envs=64", "unroll=32", "algo.epochs=1", "algo.batch_size=1024", env="vector:CartPole-v1"
        ),
        "sample-factory": Contestant(
            "sample-factory", "sample_factory_appo.py", ("--env", "cartpole", "--envs", "64", "--epochs", "1")
        ),
        "sb3 ppo": Contestant("sb3", "sb3.py", ("--algo", "ppo", "--env", "CartPole-v1", "--envs", "8")),
        "cleanrl": Contestant("cleanrl", "cleanrl_envpool.py", ("--env", "CartPole-v1")),
    },
}


def measured(contestant: Contestant, venvs: Path, seconds: float) -> dict[str, Any]:
    """What a driver says; an empty mapping if it failed, with its last words on the screen."""
    python = interpreter(venvs / contestant.peer, [TORCH], PACKAGES[contestant.peer])
    command = [str(python), str(DRIVERS / contestant.driver), *contestant.words, "--seconds", str(seconds)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10 * seconds + 600)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"{contestant.driver} failed: {str(error.stderr)[-2000:]}", flush=True)
        return {}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1])


def compared(
    rounds: Sequence[dict[str, dict[str, Any]]], names: Sequence[str], is_ours: dict[str, bool]
) -> dict[str, Any]:
    """Medians over the rounds, and for each of ours its ratio to each peer, round by round."""

    def median(name: str, key: str) -> float | None:
        found = [row[name][key] for row in rounds if row[name].get(key) is not None]
        return statistics.median(found) if found else None

    keys = ("steps_per_s", "startup_s", "peak_pss_mb", "cpu_own", "cpu_others")
    ratios: dict[str, dict[str, float]] = {}
    for mine in (name for name in names if is_ours[name]):
        for peer in (name for name in names if not is_ours[name]):
            found = [row[mine]["steps_per_s"] / row[peer]["steps_per_s"] for row in rounds if row[mine] and row[peer]]
            if found:
                ratios.setdefault(mine, {})[peer] = statistics.median(found)
    return {"medians": {name: {key: median(name, key) for key in keys} for name in names}, "times_as_fast": ratios}


def table(name: str, group: dict[str, Any]) -> str:
    """A group as Markdown."""
    lines = [f"| {name} | steps/s | start-up s | peak MB |", "|---|---|---|---|"]
    for contestant, row in group["medians"].items():
        cells = [row[key] for key in ("steps_per_s", "startup_s", "peak_pss_mb")]
        lines.append(f"| {contestant} | {' | '.join('failed' if cell is None else f'{cell:,.1f}' for cell in cells)} |")
    for mine, peers in group["times_as_fast"].items():
        lines += [f"{mine} is {ratio:.2f} times as fast as {peer}" for peer, ratio in peers.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--only", nargs="+", default=[], help="contestants to run, by name; all of the groups if none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--venvs", type=Path, default=ROOT / "benchmarks/.venvs")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/peers.json"))
    args = parser.parse_args()

    result = json.loads(args.output.read_text()) if args.output.exists() else {"groups": {}}
    for name in args.groups:
        group = {key: value for key, value in GROUPS[name].items() if not args.only or key in args.only}
        rounds: list[dict[str, dict[str, Any]]] = []
        for number in range(args.rounds):
            rounds.append({})
            for key, contestant in group.items():
                rounds[-1][key] = found = measured(contestant, args.venvs, args.seconds)
                print(f"{name}, round {number + 1}, {key}: {found.get('steps_per_s', 'failed')} steps/s", flush=True)
        is_ours = {key: contestant.peer == OURS for key, contestant in group.items()}
        settings = {key: {"driver": each.driver, "arguments": each.words} for key, each in group.items()}
        summary = compared(rounds, list(group), is_ours)
        result["groups"][name] = {**conditions("cpu"), "settings": settings, **summary, "rounds": rounds}
        save(result, args.output)
        print(table(name, summary), flush=True)


if __name__ == "__main__":
    main()
