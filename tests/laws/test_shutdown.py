"""A run that is stopped by a signal at any moment leaves nothing behind, and goes on as if it had not been stopped.

Moments are counted in calls of Slipstream's functions, so that they lie everywhere: in the start, while environments
are made, collecting, learning, writing a checkpoint, closing.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from slipstream.run import checkpoint
from slipstream.run.files import CheckpointError
from slipstream.run.remains import differences
from tests.laws.forge import Forge, Outcome

WORDS = (
    "ppo --env CartPole-v1 --num-envs 4 --lanes 2 --unroll 8 --algo.batch-size 16 --algo.epochs 1 --net.hidden 8 "
    "--schedule concurrent --placement.env-workers 1 --placement.workers 1 --total-steps 450 --log.checkpoint-every 96 "
    "--log.metrics-every 40 --log.no-tensorboard --seed 3"
)
LIMIT = 3.0


@pytest.fixture(scope="module")
def whole(made: Forge, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The run that nothing stops, and how many calls it takes."""
    folder = tmp_path_factory.mktemp("whole")
    outcome = made.run(["train", *WORDS.split(), "--log.dir", str(folder / "runs")], folder)
    assert (outcome.code, outcome.left) == (0, [])
    assert outcome.counted > 5_000
    (run,) = (folder / "runs").iterdir()
    return run, outcome.counted


def stopped(
    made: Forge, whole: tuple[Path, int], folder: Path, number: signal.Signals, share: float, again: int = 0
) -> Outcome:
    """Stops a run once `share` of its calls are made, once more `again` calls later, and lets it go on."""
    shared, moment = set(os.listdir("/dev/shm")), max(1, int(share * whole[1]))
    at = (moment, moment + again) if again else (moment,)
    outcome = made.run(["train", *WORDS.split(), "--log.dir", str(folder / "runs")], folder, number, at)
    assert outcome.left == []
    assert set(os.listdir("/dev/shm")) == shared
    assert outcome.seconds < LIMIT
    assert "Traceback" not in outcome.said, outcome.said
    runs = list((folder / "runs").glob("*"))
    try:
        saved = checkpoint.newest(runs[0] / "checkpoints") if runs else None
    except CheckpointError:
        saved = None
    if saved is not None:
        if saved.steps < 450:
            resumed = made.run(["resume", str(runs[0])], folder)
            assert (resumed.code, resumed.left) == (0, []), resumed.said
        assert list(differences(whole[0], runs[0])) == []
    return outcome


FEW, MANY = [0.02, 0.4, 0.7, 0.97], [(number + 0.5) / 20 for number in range(20)]


def each(shares: list[float], more: list[float]) -> list[object]:
    rest = [share for share in more if share not in shares]
    return [*shares, *(pytest.param(share, marks=pytest.mark.slow) for share in rest)]


@pytest.mark.parametrize("share", each(FEW, MANY))
def test_a_signal_at_any_moment(made: Forge, whole: tuple[Path, int], tmp_path: Path, share: float) -> None:
    outcome = stopped(made, whole, tmp_path, signal.SIGINT, share)
    ended = [0] if share > 0.9 else []  # all updates may have been made
    assert outcome.code in (128 + signal.SIGINT, *ended)
    if 0.5 <= share < 0.9:
        assert "slipstream: stopped by SIGINT; the last checkpoint is that of step" in outcome.said
        assert outcome.said.splitlines()[-1].startswith("resume:  slipstream resume ")


@pytest.mark.parametrize("share", each([0.5], MANY[1::3]))
def test_sigterm_is_obeyed_as_well(made: Forge, whole: tuple[Path, int], tmp_path: Path, share: float) -> None:
    outcome = stopped(made, whole, tmp_path, signal.SIGTERM, share)
    ended = [0] if share > 0.9 else []
    assert outcome.code in (128 + signal.SIGTERM, -signal.SIGTERM, *ended)
    if 0.5 <= share < 0.9:
        assert "slipstream: stopped by SIGTERM; the last checkpoint is that of step" in outcome.said


@pytest.mark.parametrize("share", each([0.3, 0.6], MANY[::3]))
def test_two_signals_in_a_row(made: Forge, whole: tuple[Path, int], tmp_path: Path, share: float) -> None:
    outcome = stopped(made, whole, tmp_path, signal.SIGINT, share, again=20)
    assert outcome.code in (128 + signal.SIGINT, -signal.SIGINT)


@pytest.mark.parametrize("share", each([0.05, 0.45, 0.8], [(number + 0.5) / 50 for number in range(50)]))
def test_a_killed_driver(made: Forge, whole: tuple[Path, int], tmp_path: Path, share: float) -> None:
    assert stopped(made, whole, tmp_path, signal.SIGKILL, share).code == -signal.SIGKILL
