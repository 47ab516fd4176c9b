"""Any-ready batching: lanes that have answered share a forward, and none waits for a slower one.

    lane 0   |step......|   |step...|      |step..|            each lane is at its own row
    lane 1   |step..|  |step............|        |step...
    forward         ^   ^   ^           ^  ^     ^             always [group * lane_size], slot s in row s of it

`group` lanes share a forward. Its shape is fixed and every slot has a row of its own in it; rows of lanes that are
still under way hold what their slots showed last, and what comes out of them is ignored. A row that comes out does not
depend on the contents of the others (`rows_are_independent` makes sure), so the bits do not depend on who was ready
when: they are those of lanes that step together.

It pays where step times vary and lanes are small: an unroll of T rows takes as long as the slowest lane's sum of T step
times, not T times the slowest lane's step.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream import dice, slab, tree
from slipstream.collector import Assignment, Collected, Collector, Stands, Stopped
from slipstream.episodes import Episodes
from slipstream.nets.check import dummy_observations
from slipstream.nets.independence import rows_are_independent
from slipstream.nets.policy import Policy
from slipstream.nets.small import acting
from slipstream.standing import SlotState
from slipstream.tree import Tree
from slipstream.types import Act, EnvSpec, EnvStep, Place, Trajectory

Array = NDArray[Any]
Slots = NDArray[np.int64]


class ReadyCollector:
    """Steps some lanes and writes their columns into slabs, as `Collector` does, but whichever lanes are ready.

    Slots are numbered within the collector here: lane i of `lanes` has the slots from `i * lane_size` on, group g those
    from `g * group * lane_size` on.

    Who waits: a forward for the first lane to answer, and it takes all that have; `collect` for every lane's last row.

    Args:
        given: What it works with; the lanes group after group.
        group: Lanes per forward; divides the number of lanes.
    """

    def __init__(self, given: Assignment, group: int) -> None:
        envs, lanes, policy = given.envs, given.lanes, given.policy
        self.lanes, self.ahead = tuple(lanes), 0
        self._envs, self._policy, self._device = envs, policy, given.device
        self._refresh, self._every_row = given.refresh, given.every_row
        self._size = size = envs.spec.lane_size
        count, width = len(lanes) * size, group * size
        self._members = np.arange(count).reshape(len(lanes), size)
        self._parts = [slice(i * size, (i + 1) * size) for i in range(len(lanes))]
        self._slots = np.concatenate([envs.spec.slots(lane).start + np.arange(size) for lane in lanes])
        self._keys = dice.keys(given.seed, "act", self._slots.tolist())
        self._groups = [slice(first, first + width) for first in range(0, count, width)]
        self._recorded, self._inputs = [given.recorded() for _ in self._groups], given.inputs
        self._states = [slab.tensors(policy.initial_state(width), self._device) for _ in self._groups]
        self._views = [_View.of(trajectory) for trajectory in given.slabs]
        self._rows, self._row = given.slabs[0].rows, given.row
        self._last = _Last.of(given.slabs[0], count)
        self._shown = [
            _aligned(dummy_observations(envs.spec.observation_space, width), given.slabs[0]) for _ in self._groups
        ]
        self._drawn = [torch.zeros(width, policy.dice_width) for _ in self._groups]
        self._seats = [
            [leaf.numpy()[first : first + size] for leaf in tree.leaves(shown)]
            for shown in self._shown
            for first in range(0, width, size)
        ]
        self._own = [np.arange(part.start, part.stop) for part in self._groups]
        self._named = [torch.from_numpy(self._slots[part]).to(self._device) for part in self._groups]
        self._episodes = Episodes(self._slots)
        self._started = self._stopped = False

    def stop(self) -> None:
        """Has a `collect` under way in another thread, and every later one, raise `Stopped` at its next row."""
        self._stopped = True

    def state(self) -> SlotState:
        """Where its slots stand; to be called between two unrolls."""
        memory = tuple(torch.cat(leaves).cpu() for leaves in zip(*map(tree.leaves, self._states), strict=True))
        return self._episodes.state(self._row, memory)

    def load(self, state: SlotState) -> None:
        """Goes on from where its slots stood; to be called before the first unroll, the environments brought back."""
        self._row = int(state.row.max())  # they may be uneven, if others collected them before
        self._episodes.load(state)
        for part, group in zip(self._groups, self._states, strict=True):
            for to, leaf in zip(tree.leaves(group), state.memory, strict=True):
                to.copy_(leaf[part])

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
        start, env_seconds = time.perf_counter(), 0.0
        version = self._refresh()
        self._open(places)
        ready, under_way = list(range(len(self.lanes))), dict[int, int]()
        while True:
            if self._stopped:
                raise Stopped
            going = [i for i in ready if self._t[self._parts[i].start] < self._rows]
            if going:
                if self._every_row and self._t.any():
                    version = self._refresh()
                self._decide(self._members[going].ravel(), version)
            asked = time.perf_counter()
            for i in going:
                self._envs.send(self._last.action[self._parts[i]], self.lanes[i])
                under_way[self.lanes[i]] = i
            if not under_way:
                break
            ready = [under_way.pop(lane) for lane in self._envs.wait(list(under_way))]
            steps = [self._envs.recv(self.lanes[i]) for i in ready]
            env_seconds += time.perf_counter() - asked
            self._receive(ready, steps)
        self._bootstrap()
        self._row += self._rows
        infer_seconds = time.perf_counter() - start - env_seconds
        account = self._episodes
        return Collected(account.steps, tuple(account.ended), env_seconds, infer_seconds, account.mended)

    def _open(self, places: Sequence[Place]) -> None:
        """Starts an unroll: row 0 holds the last observation, `state0` the state before it."""
        size = self._size
        self._starts = [(self._views[place.slab], place.column) for place in places]
        self._into = sorted({place.slab for place in places})
        self._slab = np.repeat([place.slab for place in places], size)
        self._column = np.concatenate([np.arange(place.column, place.column + size) for place in places])
        self._t = np.zeros(len(self._slots), np.int64)
        self._dice = dice.uniform(self._keys, self._row, self._rows + 1, self._policy.dice_width)
        self._actor = acting(self._policy, len(self._own[0]), self._device)
        self._episodes.open()
        if not self._started:
            self._started = True
            for part, seat, lane in zip(self._parts, self._seats, self.lanes, strict=True):
                step = self._envs.recv(lane)
                self._episodes.dead[part] = step.ended
                for to, leaf in zip(seat, tree.leaves(step.obs), strict=True):
                    to[...] = leaf
        for (view, column), seat in zip(self._starts, self._seats, strict=True):
            for to, leaf in zip(view.obs, seat, strict=True):
                to[0, column : column + size] = leaf
        state = [torch.cat(leaves).cpu().numpy() for leaves in zip(*map(tree.leaves, self._states), strict=True)]
        for view, slots in self._by_slab(np.arange(len(self._slots))):
            columns = self._column[slots]
            for to, leaf in zip(view.state0, state, strict=True):
                to[columns] = leaf[slots]
            view.slot[columns] = self._slots[slots]

    def _decide(self, slots: Slots, version: int) -> None:
        """Chooses and records the actions of `slots`, each at its own row, with weights `version`."""
        for number, part in enumerate(self._groups):
            mine = slots if len(self._groups) == 1 else slots[(slots >= part.start) & (slots < part.stop)]
            if not len(mine):
                continue
            act = self._act(number)
            rows = mine - part.start
            self._last.action[mine] = act.action.cpu().numpy()[rows]
            log_prob = act.log_prob.cpu().numpy()[rows]
            extras = {name: value.cpu().numpy()[rows] for name, value in act.extras.items()}
            if self._policy.recurrent:
                self._states[number] = self._following(number, act.state, rows)
            for view, here, index in self._cells(mine):
                view.action[here] = self._last.action[mine[index]]
                view.log_prob[here] = log_prob[index]
                view.version[here] = version
                for name, value in extras.items():
                    view.extras[name][here] = value[index]

    def _receive(self, ready: Sequence[int], steps: Sequence[EnvStep]) -> None:
        """Records what the last actions of the lanes `ready` caused, with the observations of their next rows."""
        last = self._last
        for i, step in zip(ready, steps, strict=True):
            part = self._parts[i]
            last.put(part, step)
            self._episodes.mended += step.mended
            (view, column), t = self._starts[i], self._t[part.start] + 1
            for to, seat, leaf in zip(view.obs, self._seats[i], tree.leaves(step.obs), strict=True):
                to[t, column : column + self._size] = seat[...] = leaf
        slots = self._members[ready].ravel()
        reward, terminated, truncated = last.reward[slots], last.terminated[slots], last.truncated[slots]
        score = None if steps[0].score is None else last.score[slots]
        valid = self._episodes.add(slots, self._row + self._t[slots] + 1, reward, score, truncated, last.ended[slots])
        for view, here, index in self._cells(slots):
            view.reward[here] = reward[index]
            view.terminated[here] = terminated[index]
            view.truncated[here] = truncated[index]
            view.valid[here] = valid[index]
        self._t[slots] += 1

    def _bootstrap(self) -> None:
        """Evaluates the extras of row T, the observation after the last action."""
        if not self._views[0].extras:
            return
        for number in range(len(self._groups)):
            act = self._act(number)
            extras = {name: value.cpu().numpy() for name, value in act.extras.items()}
            for view, here, index in self._cells(self._own[number]):
                for name, value in extras.items():
                    view.extras[name][here] = value[index]

    @torch.no_grad()
    def _act(self, number: int) -> Act:
        """What the policy says to all slots of a group, each at its own row."""
        obs = tree.map(lambda leaf: leaf.to(self._inputs, non_blocking=True), self._shown[number])
        drawn = self._drawn[number]
        drawn.numpy()[...] = self._dice[self._t[self._groups[number]], self._own[number]]
        actor = self._recorded[number] or self._actor
        return actor.act(obs, self._states[number], drawn.to(self._inputs), slot=self._named[number])

    def _following(self, number: int, state: Tree, rows: Slots) -> Tree:
        """The group's next state: new in `rows`, but zero where the row that was acted on is dead."""
        chosen = np.zeros(len(self._slots[self._groups[number]]), np.bool_)
        chosen[rows] = True
        new = torch.from_numpy(chosen).to(self._device)
        alive = torch.from_numpy(~(chosen & self._episodes.dead[self._groups[number]])).to(self._device)

        def pick(to: Tensor, old: Tensor) -> Tensor:
            return torch.where(new.view(-1, *(1,) * (to.dim() - 1)), to, old)

        return slab.keep(tree.map(pick, state, self._states[number]), alive)

    def _cells(self, slots: Slots) -> Iterator[tuple[_View, tuple[Slots, Slots], Any]]:
        """Slab by slab, where the current rows of `slots` are in it, and which of `slots` these are."""
        for view, index in self._by_slab(slots):
            mine = slots[index]
            yield view, (self._t[mine], self._column[mine]), index

    def _by_slab(self, slots: Slots) -> Iterator[tuple[_View, Any]]:
        """The slabs of this unroll, and an index of those among `slots` that have their columns there."""
        if len(self._into) == 1:
            yield self._views[self._into[0]], slice(None)
            return
        for number in self._into:
            yield self._views[number], np.flatnonzero(self._slab[slots] == number)


@dataclass(frozen=True)
class _Last:
    """What every slot of a collector was told to do last, and what that caused.

    Attributes:
        action: `[S, *A]`.
        reward: float32 `[S]`.
        score: float32 `[S]`, where the environments have one.
        terminated: bool `[S]`.
        truncated: bool `[S]`.
        ended: bool `[S]`.
    """

    action: Array
    reward: Array
    score: Array
    terminated: Array
    truncated: Array
    ended: Array

    @staticmethod
    def of(like: Trajectory, slots: int) -> _Last:
        """Zeros for `slots` slots, with actions as the slab has them."""
        action = np.zeros((slots, *like.action.shape[2:]), like.action.numpy().dtype)
        flags = [np.zeros(slots, np.bool_) for _ in range(3)]
        return _Last(action, np.zeros(slots, np.float32), np.zeros(slots, np.float32), *flags)

    def put(self, part: slice, step: EnvStep) -> None:
        """Takes over the answer of a lane, but for its observation."""
        self.reward[part] = step.reward
        if step.score is not None:
            self.score[part] = step.score
        self.terminated[part] = step.terminated
        self.truncated[part] = step.truncated
        self.ended[part] = step.ended


@dataclass(frozen=True)
class _View:
    """A slab as NumPy arrays over the same memory; trees as lists of leaves."""

    obs: list[Array]
    action: Array
    log_prob: Array
    reward: Array
    terminated: Array
    truncated: Array
    valid: Array
    version: Array
    slot: Array
    state0: list[Array]
    extras: dict[str, Array]

    @staticmethod
    def of(trajectory: Trajectory) -> _View:
        return _View(
            obs=[leaf.numpy() for leaf in tree.leaves(trajectory.obs)],
            action=trajectory.action.numpy(),
            log_prob=trajectory.log_prob.numpy(),
            reward=trajectory.reward.numpy(),
            terminated=trajectory.terminated.numpy(),
            truncated=trajectory.truncated.numpy(),
            valid=trajectory.valid.numpy(),
            version=trajectory.version.numpy(),
            slot=trajectory.slot.numpy(),
            state0=[leaf.numpy() for leaf in tree.leaves(trajectory.state0)],
            extras={name: value.numpy() for name, value in trajectory.extras.items()},
        )


def _aligned(tensors: Tree, like: Trajectory) -> Tree:
    """A copy in memory of PyTorch's own, page-locked if the slab's is.

    PyTorch aligns what it allocates, NumPy hardly does, and a kernel may sum in another order where memory is not
    aligned: for two or three rows of a small vector the bits of a forward do change with it.
    """
    return tree.map(lambda leaf: leaf.pin_memory() if like.reward.is_pinned() else leaf.clone(), tensors)


def group_that_holds(policy: Policy, spec: EnvSpec, group: int, device: torch.device) -> int:
    """`group`, or 1 where a forward for that many lanes would mix their rows.

    A warning says so then: the run is still deterministic, only slower.
    """
    if group == 1 or rows_are_independent(policy, spec, group * spec.lane_size, device):
        return group
    warnings.warn(
        f"group={group}: what {type(policy).__name__} answers for a row depends on the other rows of the batch "
        "(layers that keep statistics over it do that), so the result would depend on which lanes are ready when; "
        "every lane is inferred alone instead",
        stacklevel=2,
    )
    return 1


def make_collector(given: Assignment, group: int) -> Stands:
    """Who collects where `group` lanes share a forward."""
    return Collector(given) if group == 1 else ReadyCollector(given, group)
