from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from slipstream.envs import EnvError, EnvOptions, make_envs
from slipstream.envs.workers import WorkerEnvs
from slipstream.run.stall import StallWatch

UPDATE: Any = SimpleNamespace()


def test_it_says_where_every_thread_is_again_and_again(tmp_path: Path) -> None:
    said: SimpleQueue[str] = SimpleQueue()
    release = threading.Event()

    def an_environment_that_hangs() -> None:
        release.wait()

    hanging = threading.Thread(target=an_environment_that_hangs, name="lane 3")
    hanging.start()
    watch = StallWatch(0.05, tmp_path / "stacks.txt", said.put)
    try:
        first, second = said.get(timeout=60), said.get(timeout=60)
    finally:
        watch.close()
        release.set()
        hanging.join()
    for text in (first, second):
        assert text.startswith("no update for ")
        (line,) = [line for line in text.splitlines() if "lane 3" in line]
        assert line.startswith(f"  lane 3: {__file__}:")
        assert line.endswith("in an_environment_that_hangs")
        assert text.splitlines()[-2] == f"whole stacks: {tmp_path / 'stacks.txt'}"
        assert text.endswith("--placement.env-workers N --env-options.timeout-seconds S")
        assert "slipstream-stall" not in text
    stacks = (tmp_path / "stacks.txt").read_text()
    assert "release.wait()" in stacks
    assert "MainThread" in stacks


def test_updates_keep_it_silent_and_an_unwritable_file_is_said(tmp_path: Path) -> None:
    said: SimpleQueue[str] = SimpleQueue()
    watch = StallWatch(3600.0, tmp_path / "stacks.txt", said.put)
    watch(UPDATE)
    watch.close()
    watch.close()
    assert said.empty()
    watch = StallWatch(0.05, tmp_path / "nowhere" / "stacks.txt", said.put)
    text = said.get(timeout=60)
    watch.close()
    assert text.splitlines()[-2] == "whole stacks: not written, No such file or directory"


def test_zero_is_never(tmp_path: Path) -> None:
    before = threading.active_count()
    watch = StallWatch(0.0, tmp_path / "stacks.txt", print)
    assert threading.active_count() == before
    watch.close()


def test_what_cannot_be_said_does_not_keep_it_from_saying_the_rest(tmp_path: Path) -> None:
    said: SimpleQueue[str] = SimpleQueue()

    def awaited() -> list[str]:
        raise RuntimeError("it changed meanwhile")

    watch = StallWatch(0.05, tmp_path / "stacks.txt", said.put, awaited)
    texts = [said.get(timeout=60) for _ in range(2)]
    watch.close()
    assert all("waited for: unknown, RuntimeError: it changed meanwhile" in text for text in texts)


def test_of_workers_that_are_waited_for_it_says_where_they_are(tmp_path: Path) -> None:
    said: SimpleQueue[str] = SimpleQueue()
    envs = make_envs("toy:chaos", 2, 1, EnvOptions(kwargs={"fault": "hang", "at": 3}), workers=2)
    assert isinstance(envs, WorkerEnvs)
    pids = [worker.child.pid for worker in envs._workers]

    def forever() -> None:
        while True:
            envs.recv(0)
            envs.send(np.zeros(2, np.int64), 0)

    def play() -> None:
        envs.reset(1)
        with pytest.raises(EnvError, match="killed"):
            forever()

    player = threading.Thread(target=play, name="lane 0")
    player.start()
    watch = StallWatch(0.2, tmp_path / "stacks.txt", said.put, envs.awaited)
    try:
        while "waited for" not in (text := said.get(timeout=60)) or text.count("step 3") < 2:
            pass
        lines = [line for line in text.splitlines() if "waited for" in line]
        assert lines == [
            f"waited for: worker process {pid}, busy with slot {slot}, step 3, episode 0"
            for slot, pid in enumerate(pids)
        ]
    finally:
        watch.close()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        player.join()
        envs.close()
