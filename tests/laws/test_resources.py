"""What a run takes it gives back, and what there is too little of is said."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
from typing import Any, NamedTuple

import psutil
import pytest

from slipstream.run.presets import configure
from slipstream.run.training import Training

SMALL: dict[str, Any] = {"num_envs": 4, "lanes": 2, "unroll": 4, "algo.batch_size": 8, "algo.epochs": 1}
SMALL |= {"net.hidden": [8], "total_steps": 1_000, "placement.workers": 2}


class Held(NamedTuple):
    """What a process holds."""

    descriptors: int
    threads: int
    children: int
    shared: int
    megabytes: float


def held() -> Held:
    gc.collect()
    this = psutil.Process()
    shared = len(os.listdir("/dev/shm"))
    return Held(
        this.num_fds(), threading.active_count(), len(this.children(True)), shared, this.memory_info().rss / 1e6
    )


def cycle(algo: str = "ppo", **settings: Any) -> None:
    """Makes a training, takes two updates, closes it twice."""
    training = Training(configure(algo, "CartPole-v1", {**SMALL, **settings}))
    for report in training:
        if report.update == 2:
            break
    training.close()
    training.close()


CYCLES = {
    "sync": ("ppo", {}),
    "concurrent": ("ppo", {"schedule": "concurrent"}),
    "async": ("appo", {"schedule": "async"}),
    "env workers": ("ppo", {"placement.env_workers": 1}),
}


@pytest.mark.parametrize(
    ("kind", "cycles"),
    [
        ("sync", 10),
        ("concurrent", 10),
        ("async", 10),
        ("env workers", 4),
        *(pytest.param(kind, 200, marks=pytest.mark.slow) for kind in CYCLES),
    ],
)
def test_a_training_that_is_closed_gives_everything_back(kind: str, cycles: int) -> None:
    algo, settings = CYCLES[kind]
    for _ in range(cycles // 2):  # until what is kept for the next is there: 6 MB of the heap
        cycle(algo, **settings)
    before = held()
    for _ in range(cycles):
        cycle(algo, **settings)
    after = held()
    assert after[:4] == before[:4]
    assert after.megabytes - before.megabytes < 5.0


def test_a_training_that_could_not_be_made_leaves_nothing() -> None:
    cycle()
    before = held()
    for settings in ({"algo.batch_size": 7}, {"placement.env_workers": 1, "algo.batch_size": 7}):
        with pytest.raises(ValueError, match="batch_size"):
            cycle(**settings)
    assert held()[:4] == before[:4]


TINY = """
import sys
from slipstream.run.presets import configure
from slipstream.run.training import Training
settings = {"num_envs": 16, "unroll": 64, "algo.batch_size": 64, "net.hidden": [8], "algo.epochs": 1}
place = {"placement.collectors": "process", "placement.workers": 1, "placement.env_workers": 1}
training = Training(configure("ppo", "toy:catch", {**settings, **place}))
assert training.slabs[0].obs.numel() * 4 > 65_536
print(next(iter(training)).update)
training.close()
"""


def test_shared_memory_is_not_that_of_dev_shm() -> None:
    """As in a container, whose /dev/shm may be small; here it has 64 kB, and the slab is larger."""
    inside = ["sh", "-c", 'mount -t tmpfs -o size=64k none /dev/shm && exec "$0" -c "$1"', sys.executable, TINY]
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system allows no namespaces")
    done = subprocess.run([unshare, "-rm", *inside], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_no_socket_is_opened() -> None:
    """By the driver, a collector process and a worker process."""
    place = {"placement.collectors": "process", "placement.workers": 1, "placement.env_workers": 1}
    training = Training(configure("ppo", "CartPole-v1", {**SMALL, **place}))
    try:
        next(iter(training))
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
        assert len(family) >= 3
        assert [each.net_connections("all") for each in family] == [[] for _ in family]
    finally:
        training.close()
