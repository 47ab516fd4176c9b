"""Collecting: lanes x policy -> trajectory, the same in every placement. It and `ready` alone write `valid`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream import dice, slab, tree
from slipstream.columns import Columns, record, write
from slipstream.episodes import Episodes
from slipstream.nets.actor_critic import ActorCritic
from slipstream.nets.policy import Outputs, Policy
from slipstream.nets.recorded import RecordedActor
from slipstream.nets.small import Acts, acting
from slipstream.recording import Record
from slipstream.standing import SlotState
from slipstream.tape import Tape
from slipstream.tree import Tree
from slipstream.types import Act, Envs, EnvStep, Episode, Place, Trajectory

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Collected:
    """What filling a slab's columns brought.

    Attributes:
        steps: Valid rows written.
        episodes: Episodes that ended.
        env_seconds: Time spent sending to and waiting for environments.
        infer_seconds: Time spent in the policy and in writing its answers.
        mended: Rows whose numbers were not finite, and were mended.
    """

    steps: int
    episodes: tuple[Episode, ...]
    env_seconds: float
    infer_seconds: float
    mended: int = 0

    @staticmethod
    def of(told: Mapping[str, Any]) -> Collected:
        """What `asdict` made of one, by way of JSON."""
        episodes = tuple(Episode(**episode) for episode in told["episodes"])
        mended = told.get("mended", 0)  # older checkpoints have none
        return Collected(told["steps"], episodes, told["env_seconds"], told["infer_seconds"], mended)


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """`collect` ended early because `stop` was called."""


class Away(Exception):  # noqa: N818 - nothing went wrong
    """Who collects is lost, and will be back, but nobody knows when: the places are free for others."""


class Collects(Protocol):
    """What a schedule asks of whoever collects, in this process or in another."""

    @property
    def lanes(self) -> tuple[int, ...]:
        """The lanes it steps."""
        ...

    @property
    def ahead(self) -> int:
        """Unrolls that it may be told of before the one under way is done."""
        ...

    def arrive(self) -> None:
        """Waits until it can collect, however long that takes; raises as `collect`, but for `Away`."""
        ...

    def collect(self, places: Sequence[Place], after: Sequence[Sequence[Place]] = ()) -> Collected:
        """Fills one unroll of every lane, in the order of `lanes`.

        Args:
            places: Where each lane's unroll goes.
            after: Places of the unrolls after it, `ahead` at most: the next calls have no other ones.

        Raises:
            Stopped: After `stop`.
            Away: It is lost; nothing has come of this unroll, nor will of those after it.
        """
        ...

    def stop(self) -> None:
        """Has a `collect` under way in another thread, and every later one, raise `Stopped` at its next row."""
        ...


class Stands(Collects, Protocol):
    """A collector in this process, which can be asked where its slots stand."""

    def state(self) -> SlotState:
        """Where its slots stand; to be called between two unrolls."""
        ...

    def load(self, state: SlotState) -> None:
        """Goes on from where its slots stood; to be called before the first unroll, the environments brought back."""
        ...


def home(lanes: Sequence[int], lane_size: int, index: int) -> list[Place]:
    """The places of `lanes` in slab `index` where column b is slot b."""
    return [Place(index, lane * lane_size) for lane in lanes]


@dataclass(frozen=True)
class Assignment:
    """What a collector is given.

    Attributes:
        envs: The environments, already reset.
        lanes: Lanes of this collector.
        policy: Acts; its parameters must not change during `collect`, but by `refresh`.
        slabs: The slabs that `collect` may be told to fill.
        seed: The run's seed.
        refresh: Brings the policy's parameters up to date and returns their version.
        every_row: Whether to refresh before every row, rather than before every unroll.
        row: Number of the first row, which keys its random numbers.
        device: Where the policy lives.
        graphs: Whether forwards make graphs, as those that are kept do: their kernels may round differently.
        tapes: For each slab, who acts there in place of `policy`, and where the forwards are kept; none are kept if
            empty.
        record: Records the forwards on `device`, if they make no graphs; None to ask for them anew every time.
    """

    envs: Envs
    lanes: Sequence[int]
    policy: Policy
    slabs: Sequence[Trajectory]
    seed: int
    refresh: Callable[[], int]
    every_row: bool = False
    row: int = 0
    device: torch.device = _CPU
    graphs: bool = False
    tapes: Sequence[Tape] = ()
    record: Record | None = None

    def recorded(self) -> RecordedActor | None:
        """A recording of the policy, for one lane or group of lanes; None where it is asked itself."""
        if self.record is None or self.graphs:
            return None
        return RecordedActor(self.policy, self.device, self.record)

    @property
    def inputs(self) -> torch.device:
        """Where who acts wants what it is shown; a recording takes it to `device` by itself."""
        return self.device if self.record is None or self.graphs else _CPU


class Collector:
    """Steps some lanes and writes their columns into slabs.

    Within a row the lanes take turns, so that the environments of one lane step (in native threads or processes)
    while another lane is inferred. Lanes never see each other: the bits of a lane's columns depend on the policy, the
    seed and the lane alone. It waits only for the environments of its own lanes.

    Args:
        given: What it works with.
    """

    def __init__(self, given: Assignment) -> None:
        self.lanes, self.ahead = tuple(given.lanes), 0
        self._refresh, self._every_row, self._tapes = given.refresh, given.every_row, given.tapes
        views: dict[Place, Columns] = {}  # one lane after the other comes to a place
        self._lanes = [_Lane(given, lane, views) for lane in given.lanes]
        self._rows = given.slabs[0].rows
        self._stopped = False

    def stop(self) -> None:
        """Has a `collect` under way in another thread, and every later one, raise `Stopped` at its next row."""
        self._stopped = True

    def state(self) -> SlotState:
        """Where its slots stand; to be called between two unrolls."""
        return SlotState.join([lane.state() for lane in self._lanes])

    def load(self, state: SlotState) -> None:
        """Goes on from where its slots stood; to be called before the first unroll, the environments brought back."""
        size = len(state.row) // len(self._lanes)
        for number, lane in enumerate(self._lanes):
            lane.load(state.part(slice(number * size, (number + 1) * size)))

    def arrive(self) -> None:
        """It is here."""

    def collect(self, places: Sequence[Place], after: Sequence[Sequence[Place]] = ()) -> Collected:
        """Fills one unroll of every lane of this collector, in the order of `lanes`.

        Args:
            places: Where each lane's unroll goes.
            after: Nothing, since it is not told of them ahead.

        Raises:
            Stopped: After `stop`.
        """
        env_seconds = infer_seconds = 0.0
        version = self._tapes[places[0].slab].version if self._tapes else self._refresh()
        for lane, place in zip(self._lanes, places, strict=True):
            lane.open(place)
        for t in range(self._rows):
            if self._stopped:
                raise Stopped
            if t and self._every_row:
                version = self._refresh()
            for lane in self._lanes:
                start = time.perf_counter()
                if t:
                    lane.receive(t - 1)
                received = time.perf_counter()
                action = lane.decide(t, version)
                decided = time.perf_counter()
                lane.send(action)
                env_seconds += (received - start) + (time.perf_counter() - decided)
                infer_seconds += decided - received
        for lane in self._lanes:
            start = time.perf_counter()
            lane.receive(self._rows - 1)
            received = time.perf_counter()
            lane.bootstrap()
            env_seconds += received - start
            infer_seconds += time.perf_counter() - received
        return Collected(
            steps=sum(lane.episodes.steps for lane in self._lanes),
            episodes=tuple(episode for lane in self._lanes for episode in lane.episodes.ended),
            env_seconds=env_seconds,
            infer_seconds=infer_seconds,
            mended=sum(lane.episodes.mended for lane in self._lanes),
        )


class _Lane:
    """One lane's place in time: its last observation, recurrent state and running episodes."""

    def __init__(self, given: Assignment, lane: int, views: dict[Place, Columns]) -> None:
        part = given.envs.spec.slots(lane)
        size = part.stop - part.start
        self._envs, self._lane, self._policy, self._device = given.envs, lane, given.policy, given.device
        self._slot = torch.arange(part.start, part.stop, device=given.device)
        self._slabs, self._tapes = given.slabs, given.tapes
        self._graphs = given.graphs
        self._tape: list[Outputs] | None = None
        self._recorded, self._inputs = given.recorded(), given.inputs
        self._actor: Acts = given.policy
        self._views = views
        self._keys = dice.keys(given.seed, "act", range(part.start, part.stop))
        self._row = given.row
        self._state: Tree = slab.tensors(given.policy.initial_state(size), given.device)
        self._step: EnvStep | None = None
        self.episodes = Episodes(part)

    def state(self) -> SlotState:
        return self.episodes.state(self._row, tuple(leaf.detach().cpu().clone() for leaf in tree.leaves(self._state)))

    def load(self, state: SlotState) -> None:
        self._row = int(state.row[0])
        self.episodes.load(state)
        for to, leaf in zip(tree.leaves(self._state), state.memory, strict=True):
            to.copy_(leaf)

    def open(self, place: Place) -> None:
        """Starts an unroll: row 0 holds the last observation, `state0` the state before it."""
        if place not in self._views:
            columns = slice(place.column, place.column + len(self._keys))
            self._views[place] = Columns.of(slab.columns(self._slabs[place.slab], columns))
        self._view, self._array = self._views[place].tensors, self._views[place].arrays
        rows = self._view.rows
        self._dice = torch.from_numpy(dice.uniform(self._keys, self._row, rows + 1, self._policy.dice_width))
        self.episodes.open()
        if self._tapes:
            tape = self._tapes[place.slab]
            self._policy, self._tape = tape.policy, tape.lanes[self._lane]
            self._tape.clear()
            self._state = _detached(self._state)
        self._actor = self._recorded or (
            self._policy if self._graphs else acting(self._policy, len(self._keys), self._device)
        )
        if self._step is None:
            self._step = self._envs.recv(self._lane)
            self.episodes.dead[:] = self._step.ended
        write(self._array.obs, 0, self._step.obs)
        tree.map(lambda to, state: to.copy_(state), self._view.state0, self._state)
        self._view.slot.copy_(self._slot)

    def decide(self, t: int, version: int) -> NDArray[np.generic]:
        """Chooses and records the actions of row t, with weights `version`."""
        act = self._act_with_graph(t) if self._graphs else self._act(t)
        tensors, arrays = self._view, self._array
        record(tensors.action, arrays.action, t, act.action)
        record(tensors.log_prob, arrays.log_prob, t, act.log_prob)
        arrays.version[t] = version
        for name, value in act.extras.items():
            record(tensors.extras[name], arrays.extras[name], t, value)
        self._wait()
        self._state = tree.map(Tensor.clone, act.state) if self._recorded else act.state
        dead = self.episodes.dead
        if self._policy.recurrent and dead.any():
            alive = torch.from_numpy(~dead).to(self._device)
            with torch.set_grad_enabled(self._tape is not None):
                self._state = slab.keep(self._state, alive)
        return arrays.action[t]

    def send(self, action: NDArray[np.generic]) -> None:
        """Hands the actions to the environments."""
        self._envs.send(action, self._lane)

    def receive(self, t: int) -> None:
        """Waits for what the actions of row t caused and records it, with the observation of row t+1."""
        step = self._step = self._envs.recv(self._lane)
        arrays = self._array
        write(arrays.obs, t + 1, step.obs)
        arrays.reward[t] = step.reward
        arrays.terminated[t] = step.terminated
        arrays.truncated[t] = step.truncated
        self._row += 1
        self.episodes.mended += step.mended
        arrays.valid[t] = self.episodes.add(slice(None), self._row, step.reward, step.score, step.truncated, step.ended)

    def bootstrap(self) -> None:
        """Evaluates the extras of row T, the observation after the last action."""
        if not self._view.extras:
            return
        last = self._view.rows
        for name, value in self._act(last).extras.items():
            record(self._view.extras[name], self._array.extras[name], last, value)
        self._wait()

    def _wait(self) -> None:
        """Waits until a GPU has written what it was told to, once for all columns."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    @torch.no_grad()
    def _act(self, t: int) -> Act:
        return self._actor.act(self._obs(t), self._state, self._drawn(t), slot=self._slot)

    def _act_with_graph(self, t: int) -> Act:
        """As `_act`, and the forward is kept if there is a tape."""
        assert isinstance(self._policy, ActorCritic)
        with torch.enable_grad():
            said, state = self._policy.judge(self._obs(t), self._state)
        if self._tape is None:
            state = _detached(state)
        else:
            self._tape.append(said)
        return self._policy.answer(said, state, self._drawn(t))

    def _drawn(self, t: int) -> Tensor:
        return self._dice[t].to(self._inputs, non_blocking=True)

    def _obs(self, t: int) -> Tree:
        return tree.map(lambda leaf: leaf[t].to(self._inputs, non_blocking=True), self._view.obs)


def _detached(state: Tree) -> Tree:
    return tree.map(Tensor.detach, state)
