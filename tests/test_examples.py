"""Every file in examples/ runs as a user would run it, and does what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

# What a run prints, and the least mean return that counts as learned (doing nothing clever gets about 20, -40 and 20).
RETURNS = {
    "cartpole": (r"mean return of 20 episodes: (\S+)", 150.0),
    "custom_env": (r"mean return of 20 episodes: ([-.\d]+)", -15.0),
    "custom_network": (r"mean return of 20 episodes: (\S+)", 150.0),
}


def test_every_example_is_listed() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(RETURNS)


@pytest.mark.parametrize("name", RETURNS)
def test_example_learns(name: str, tmp_path: Path) -> None:
    pattern, enough = RETURNS[name]
    command = [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # other tests run beside this one on the same cores
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "an example ends without a warning"
    found = re.search(pattern, done.stdout)
    assert found is not None, done.stdout
    assert float(found[1]) >= enough
    assert len(list((tmp_path / "runs").iterdir())) == 1
