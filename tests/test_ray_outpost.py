"""What a Ray actor does, without Ray: answers, errors, and stops in the middle of an unroll."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cloudpickle
import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from slipstream import ray_outpost, tree, wire
from slipstream.envs import EnvOptions
from slipstream.envs.toy import Counter
from slipstream.outpost import Status
from slipstream.ray_outpost import RayOutpost

from .test_remote import ROWS, work

HOOKS: list[Callable[[], object]] = []  # called in every step


class Hooked(Counter):
    def step(self, action: Any) -> Any:
        for hook in HOOKS:
            hook()
        return super().step(action)


class Pictures(gymnasium.Env[dict[str, Any], np.int64]):
    """A picture and a number, stacked."""

    observation_space = spaces.Dict({"picture": spaces.Box(0, 255, (4, 4), np.uint8), "number": spaces.Discrete(9)})
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        return self._obs(), {}

    def step(self, action: Any) -> Any:
        return self._obs(), 1.0, bool(self.np_random.random() < 0.3), False, {}

    def _obs(self) -> dict[str, Any]:
        return {"picture": self.np_random.integers(0, 255, (4, 4)).astype(np.uint8), "number": 3}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[RayOutpost, dict[str, Any]]]:
    """An outpost that has been made, and weights for it."""

    def make(env: Any, options: EnvOptions | None = None, every_row: bool = False) -> tuple[RayOutpost, dict[str, Any]]:
        monkeypatch.setattr(ray_outpost, "node", lambda: "0123456789")
        job = replace(work(env, options), every_row=every_row)
        outpost = RayOutpost(cloudpickle.dumps(job))
        _, _, name = outpost.make()["said"]
        assert name.endswith("_012345")
        return outpost, {name: value.numpy() for name, value in job.policy.state_dict().items()}

    HOOKS.clear()
    return make


def test_a_stop_ends_an_unroll_and_what_begins_later_goes_on(made: Callable[..., Any]) -> None:
    outpost, weights = made(Hooked)
    assert outpost.begin(1, 11, 0)["said"] is None
    HOOKS.append(lambda: outpost.stop(1))
    told = outpost.collect(0, weights)
    assert told["said"] is None
    assert int(told["cells"][1]) > 0  # beats
    HOOKS.clear()
    assert outpost.collect(0, weights)["said"] is None
    outpost.begin(2, 11, 0)
    outpost.stop(1)  # comes late
    said = outpost.collect(0, weights)["said"]
    assert said["collected"]["steps"] > 0
    assert [rows["reward"].shape for rows in said["rows"]] == [(ROWS, 2)] * 3


def test_errors_are_reports(made: Callable[..., Any]) -> None:
    outpost, weights = made(Hooked)
    outpost.begin(1, 11, 0)

    def fail() -> None:
        raise RuntimeError("no more")

    HOOKS.append(fail)
    failed = outpost.collect(0, weights)["failed"]
    assert failed["kind"] == "EnvFailure"
    assert "slot 0, step 1" in failed["message"]
    assert "in fail" in failed["traceback"]
    assert outpost.restore(2, 11, 0, {})["failed"]["kind"] == "KeyError"


def test_what_it_does_can_be_seen(made: Callable[..., Any]) -> None:
    outpost, weights = made(Hooked)
    outpost.begin(1, 11, 0)
    seen: list[tuple[int, int]] = []
    HOOKS.append(lambda: seen.append(Status(outpost.watch()).place))
    outpost.collect(0, weights)
    assert {lane for lane, _ in seen} == {0, 1, 2}
    assert max(row for _, row in seen) >= ROWS - 1


def test_weights_are_taken_over_by_version(made: Callable[..., Any]) -> None:
    outpost, weights = made(Hooked)
    outpost.begin(1, 11, 0)
    first = int(outpost.collect(0, weights)["said"]["rows"][0]["version"][0, 0])
    other = {name: value + 1.0 for name, value in weights.items()}
    second = int(outpost.collect(1, other)["said"]["rows"][0]["version"][0, 0])
    assert (first, second) == (0, 1)
    for name, value in outpost._policy.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), other[name])


def test_the_newest_weights_on_offer_are_taken(made: Callable[..., Any]) -> None:
    outpost, weights = made(Hooked)

    def version() -> int:
        said = outpost.collect(0, weights)["said"]
        return int(said["rows"][0]["version"][0, 0])

    outpost.begin(1, 11, 0)
    outpost.offer(1, 3, {name: value + 3.0 for name, value in weights.items()})
    outpost.offer(1, 2, weights)  # comes late
    assert version() == 3
    for name, value in outpost._policy.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), weights[name] + 3.0)
    outpost.begin(2, 11, 0)
    outpost.offer(1, 9, weights)  # for what was begun before
    assert version() == 0
    for name, value in outpost._policy.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), weights[name])


def test_rows_that_are_to_have_the_newest_weights_take_them_within_an_unroll(made: Callable[..., Any]) -> None:
    outpost, weights = made(Hooked, every_row=True)
    outpost.begin(1, 11, 0)
    HOOKS.append(lambda: outpost.offer(1, 1, weights))
    version = outpost.collect(0, weights)["said"]["rows"][0]["version"][:, 0]
    assert version.tolist() == [0] + [1] * (ROWS - 1)


def test_trees_with_stacks_travel(made: Callable[..., Any]) -> None:
    outpost, weights = made(Pictures, EnvOptions(frame_stack=3))
    outpost.begin(1, 11, 0)
    said = outpost.collect(0, weights)["said"]
    for place, rows in zip(outpost._places, said["rows"], strict=True):
        assert isinstance(rows["obs"]["picture"], wire.Stacks)
        truth = outpost._slab.obs["picture"][:, place.column : place.column + 2].numpy()
        found = np.zeros_like(truth)
        rows["obs"]["picture"].unpack(found)
        np.testing.assert_array_equal(found, truth)
        assert len(tree.leaves(rows["obs"])) == 2
    assert torch.get_num_threads() == 1
