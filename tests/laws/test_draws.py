"""What acting draws with belongs to (seed, slot, row) in every schedule and placement, and after a resume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from slipstream.envs.make import env_spec
from slipstream.run.presets import configure
from slipstream.run.training import Training
from tests.draws import Telling, Wide, drawn

SEED, ENVS, LANES, ROWS, UPDATES = 3, 8, 4, 7, 3
SIZE = {"num_envs": ENVS, "lanes": LANES, "unroll": ROWS, "total_steps": 10_000, "seed": SEED}
AFRESH = 1 << 32
"""Rows by which `async` goes on for every version: more than any slot had."""


def vector() -> SyncVectorEnv:
    """A lane of a user's own, which can't be brought back to where it was."""
    return SyncVectorEnv([Wide] * (ENVS // LANES), autoreset_mode=AutoresetMode.NEXT_STEP)


def training(env: Callable[[], Any], schedule: str, group: int, placement: dict[str, Any]) -> Training:
    where = {f"placement.{key}": value for key, value in placement.items()}
    config = configure("impala", "callable:wide", {**SIZE, "schedule": schedule, "group": group, **where})
    return Training(config, env, policy=Telling(env_spec(env, ENVS, LANES)))


def played(run: Training, first: Sequence[int]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Checks what three updates drew, the slots' first rows being `first`; returns what to go on from.

    Under `async` a fast lane has more columns than a slow one, but every lane has its unrolls in their order.
    """
    unrolls = [0] * ENVS
    for count, report in enumerate(run, start=1):
        told, slots = report.trajectory.extras["dice"], report.trajectory.slot.tolist()
        for column, slot in enumerate(slots):
            row = first[slot] + unrolls[slot] * ROWS
            assert torch.equal(told[:, column], drawn(SEED, [slot], row, ROWS)[:, 0]), (report.update, slot)
            unrolls[slot] += 1
        if count == UPDATES:
            tensors, facts = run.state()
            return {name: tensor.clone() for name, tensor in tensors.items()}, facts
    raise AssertionError("the run ended early")


THREADS, PROCESSES = {"workers": 2}, {"collectors": "process", "workers": 2}


@pytest.mark.parametrize(
    ("placement", "group"),
    [(THREADS, 1), (THREADS, 2), (PROCESSES, 1)],
    ids=["threads", "ready lanes", "processes"],
)
@pytest.mark.parametrize(
    ("schedule", "env"),
    [(schedule, env) for schedule in ("sync", "concurrent", "async") for env in (Wide, vector)],
)
def test_every_draw_is_that_of_its_slot_and_row(
    schedule: str, env: Callable[[], Any], placement: dict[str, Any], group: int
) -> None:
    """Rows go on where they were if environments are brought back; where they start afresh, no row is drawn again."""
    with closing(training(env, schedule, group, THREADS)) as run:
        tensors, facts = played(run, [0] * ENVS)
        assert ("env_seed" in facts) == (env is Wide), "whether slots are brought back"
    rows = [UPDATES * (AFRESH if schedule == "async" else ROWS)] * ENVS
    if schedule == "async" and env is Wide:
        rows = tensors["standing.row"].tolist()
        assert sum(rows) == UPDATES * ROWS * ENVS, "after those that were learned from"
    with closing(training(env, schedule, group, placement)) as run:
        run.load(tensors, facts)
        played(run, rows)
