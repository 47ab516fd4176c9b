"""A replay that was saved in segments and loaded is the one that was saved: what is read and drawn, and what comes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream import tree
from slipstream.loader import Loader
from slipstream.replay import rows as storage
from slipstream.replay.items import sequences, transitions
from slipstream.replay.mixer import Mixer
from slipstream.replay.rows import Rows, needed
from slipstream.replay.windows import Windows
from slipstream.types import Trajectory
from tests.replay.streams import STACK, Stream, like, slab
from tests.replay.test_mixer import UNROLL, mixer
from tests.replay.test_rows import NAMES
from tests.replay.test_windows import expected

SLOTS = 3
KINDS = ("stacked", "whole", "tree")
Segment = dict[str, torch.Tensor]


def shown(obs: torch.Tensor, kind: str) -> Any:
    """Observations of a stream, which stack frames, as the environments of some kind would show them."""
    if kind != "tree":
        return obs
    backwards = obs.flip(-3)  # shares next to no frames with the one before, so that frames run out before rows do
    return {"camera": obs, "mirror": (backwards, obs[..., 0, 0, :].float() / 3), "count": obs[..., 0].to(torch.uint16)}


def made(kind: str, unroll: int, kept: int, names: tuple[str, ...] = NAMES) -> Rows:
    shape = like(SLOTS, unroll)
    obs = shape["obs"]
    assert isinstance(obs, torch.Tensor)
    shape = shape | {"obs": shown(obs, kind)}
    layout = storage.layout(shape, SLOTS * kept, 1 if kind == "whole" else STACK, names)
    return Rows(storage.allocate(layout), unroll, shape["obs"])


def next_slab(streams: list[Stream], unroll: int, kind: str) -> Trajectory:
    fresh = slab(streams, unroll)
    return replace(fresh, obs=shown(fresh.obs, kind))


def restart(streams: list[Stream]) -> None:
    for stream in streams:
        stream.start()


@dataclass
class Saves:
    """What would lie on the disk: the newest state, and segments as long as they are needed."""

    limit: int
    state: Segment = field(default_factory=Segment)
    segments: list[Segment] = field(default_factory=list[Segment])

    def save(self, windows: Windows) -> None:
        mark = self.state.get("head")
        self.segments += [checked(segment) for segment in windows.rows.since(mark, self.limit)]
        self.state = checked(windows.state())
        self.segments = [segment for segment in self.segments if needed(segment["end"], self.state["oldest"])]

    def load(self, windows: Windows) -> Windows:
        windows.load(self.state, iter(self.segments))
        return windows


def checked(tensors: Segment) -> Segment:
    """The tensors, once it is sure that they can be written to a file, each with memory of its own."""
    places = {value.untyped_storage().data_ptr() for value in tensors.values() if value.numel()}
    assert len(places) == sum(value.numel() > 0 for value in tensors.values())
    for value in tensors.values():
        assert value.is_contiguous()
        assert value.untyped_storage().nbytes() == value.nbytes
    return tensors


def assert_same(one: Any, other: Any) -> None:
    """Both trees hold the same bytes."""
    for (path, left), (also, right) in zip(tree.items(one), tree.items(other), strict=True):
        assert (path, left.dtype, left.shape) == (also, right.dtype, right.shape)
        assert left.numpy().tobytes() == right.numpy().tobytes(), path


def assert_same_rows(one: Rows, other: Rows) -> None:
    """Everything that can be read of them is the same."""
    assert_same(one.state(), other.state())
    for slot in range(one.slots):
        head = int(one.head[slot])
        numbers = np.arange(int(one.oldest[slot]), head)
        slots = np.full(len(numbers), slot)
        if head:
            every = np.append(numbers, head)
            assert_same(one.obs(np.full(len(every), slot), every), other.obs(np.full(len(every), slot), every))
        for name in ("action", "reward", "terminated", "truncated", "valid", *NAMES):
            if name != "state0":
                assert_same(one.column(name, slots, numbers), other.column(name, slots, numbers))
        assert one.valid(slots, numbers).tolist() == other.valid(slots, numbers).tolist()
        begun = numbers[numbers % one.unroll == 0]
        assert_same(one.state0(np.full(len(begun), slot), begun), other.state0(np.full(len(begun), slot), begun))


def assert_same_draws(one: Windows, other: Windows, shape: tuple[int, int], key: list[int]) -> None:
    """Draws, what is gathered by them, and the priorities afterwards."""
    assert one.count == other.count
    if not expected(one, *shape):
        return
    drawn, same = (windows.draw(np.random.default_rng(key), 2, 5, 0.6) for windows in (one, other))
    for left, right in zip(drawn, same, strict=True):
        assert left.tobytes() == right.tobytes()
    errors = np.random.default_rng(key).normal(size=5) ** 3
    for slots, starts in zip(drawn.slot, drawn.row, strict=True):
        if shape[0] == 1:
            items = [transitions(each.rows, slots, starts, shape[1], 0.9, torch.sign) for each in (one, other)]
        else:
            items = [sequences(each.rows, slots, starts, shape[1], torch.sign) for each in (one, other)]
        assert_same(*(vars(item) for item in items))
        for windows in (one, other):
            windows.reprioritise(slots, starts, errors)
    if one.priorities is not None and other.priorities is not None:
        assert_same(one.priorities.state(), other.priorities.state())
        masses = np.random.default_rng(key).random(31) * one.priorities.tree.total
        assert one.priorities.tree.find(masses).tolist() == other.priorities.tree.find(masses).tolist()


def brought(random: np.random.Generator, streams: list[Stream], unroll: int, kind: str, kept: int) -> list[Trajectory]:
    """Slabs: of all slots, or of some, several times; now and then so many that nothing from before is there."""
    if random.random() < 0.1:
        return [next_slab(streams, unroll, kind) for _ in range(2 * kept // unroll + 1)]
    if random.random() < 0.5:
        return [next_slab(streams, unroll, kind)]
    order = random.integers(SLOTS, size=random.integers(1, 6))
    return [next_slab([streams[slot] for slot in order], unroll, kind)]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(KINDS),
    unroll=st.integers(1, 3),
    shape=st.sampled_from([(1, 1), (1, 3), (0, 1), (0, 2)]),  # stride 0: the unroll, and a span in unrolls
    alpha=st.sampled_from([0.0, 0.7]),
    limit=st.sampled_from([1, 300, 3000, 2**28]),
)
def test_what_was_saved_and_loaded_goes_on_as_what_was_not(
    seed: int, kind: str, unroll: int, shape: tuple[int, int], alpha: float, limit: int
) -> None:
    """A replay that is killed again and again, beside one that never is: the same after everything that happens."""
    kept, random, streams = 30, np.random.default_rng(seed), [Stream(slot, seed) for slot in range(SLOTS)]
    stride, span = shape if shape[0] else (unroll, shape[1] * unroll)

    def fresh() -> Windows:
        return Windows(made(kind, unroll, kept), stride, span, alpha)

    whole, killed, saves = fresh(), fresh(), Saves(limit)
    for step in range(40):
        event = random.choice(["slab", "restart", "save", "kill"], p=[0.6, 0.1, 0.15, 0.15])
        if event == "slab":
            for trajectory in brought(random, streams, unroll, kind, kept):
                whole.append(trajectory)
                killed.append(trajectory)
        elif event == "restart":
            whole.restart()
            killed.restart()
            restart(streams)
        else:
            saves.save(killed)
            killed = saves.load(fresh()) if event == "kill" else killed
        assert_same_rows(whole.rows, killed.rows)
        assert_same_draws(whole, killed, (stride, span), [seed, step])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0, 2]))
def test_mixed_slabs_are_the_same(seed: int, threads: int) -> None:
    """Whatever was gathered ahead when the mixer was killed, and whatever changed the rows meanwhile."""
    random, streams = np.random.default_rng(seed), [Stream(slot, seed) for slot in range(4)]
    loader, saves, version = Loader(threads, torch.device("cpu")), Saves(1000), 0

    def fresh() -> Mixer:
        return mixer(1.5, unrolls=4, loader=loader)

    whole, killed = fresh(), fresh()
    try:
        for _ in range(40):
            event = random.choice(["mix", "store", "restart", "save", "kill"], p=[0.4, 0.15, 0.1, 0.15, 0.2])
            if event == "mix":
                trajectory = slab(streams, UNROLL)
                mixed = [each.mix(trajectory, version) for each in (whole, killed)]
                version += 1
                assert mixed[0].columns == mixed[1].columns
                assert_same(vars(mixed[0]), vars(mixed[1]))
            elif event == "store":
                trajectory = slab(streams, UNROLL)
                whole.store(trajectory)
                killed.store(trajectory)
            elif event == "restart":
                whole.restart()
                killed.restart()
                restart(streams)
            else:
                saves.save(killed.windows)
                if event == "kill":
                    killed = fresh()
                    saves.load(killed.windows)
    finally:
        loader.close()


def filled(slabs: int, kind: str = "stacked", unroll: int = 2, kept: int = 12) -> tuple[Rows, list[Stream]]:
    rows, streams = made(kind, unroll, kept), [Stream(slot, 5) for slot in range(SLOTS)]
    for _ in range(slabs):
        rows.append(next_slab(streams, unroll, kind))
    return rows, streams


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_tensors_can_be_stored(kind: str) -> None:
    """Through the bytes of files, prioritised; a column that is not kept is not saved."""
    windows = Windows(made(kind, 2, 12, ("value",)), 1, 3, 0.6)
    streams = [Stream(slot, 5) for slot in range(SLOTS)]
    files = list[bytes]()
    mark = None
    for _ in range(5):
        for _ in range(3):
            windows.append(next_slab(streams, 2, kind))
        files += [safetensors.torch.save(segment) for segment in windows.since(mark)]
        mark = windows.state()["head"]
    segments = [safetensors.torch.load(file) for file in files]
    names = {"action", "reward", "terminated", "truncated", "valid", "value"}
    assert {name for name in segments[0] if name.startswith("columns.")} == {f"columns.{name}" for name in names}
    assert not any(name.startswith("state0") for name in segments[0])
    loaded = Windows(made(kind, 2, 12, ("value",)), 1, 3, 0.6)
    loaded.load(safetensors.torch.load(safetensors.torch.save(windows.state())), segments)
    assert_same(windows.state(), loaded.state())
    assert_same_draws(windows, loaded, (1, 3), [1])


def test_a_loaded_replay_has_memory_of_its_own() -> None:
    rows, _ = filled(9)
    state, segments = rows.state(), list(rows.since())
    loaded = made("stacked", 2, 12)
    loaded.load(state, segments)
    for tensor in [*state.values(), *(value for segment in segments for value in segment.values())]:
        tensor.zero_()
    assert_same_rows(rows, loaded)


def test_a_frame_is_saved_once() -> None:
    """As many frames as the observations begin or go on with, which is 1.02 per row or so, not 3."""
    rows, streams = made("stacked", 2, 600), [Stream(slot, 5) for slot in range(SLOTS)]
    rows.append(slab(streams, 2))
    rows.append(slab(streams, 2))
    mark = rows.state()["head"]
    for _ in range(200):
        rows.append(slab(streams, 2))
    (segment,) = rows.since(mark)
    assert segment["begin"].tolist() == [2] * SLOTS, "two rows before the mark"
    assert segment["end"].tolist() == [404] * SLOTS
    counted = 0
    for slot in range(SLOTS):
        obs = rows.obs(np.full(403, slot), np.arange(2, 405)).numpy()
        follows = (obs[:-1, 1:] == obs[1:, :-1]).all(axis=(1, 2, 3))
        counted += STACK + int(np.where(follows, 1, STACK).sum())
    assert len(segment["obs.0.frames"]) == counted
    assert len(segment["obs.0.newest"]) == 403 * SLOTS
    assert len(segment["columns.action"]) == 402 * SLOTS
    assert len(segment["state0.0"]) == 201 * SLOTS


@pytest.mark.parametrize(("kind", "room"), [("whole", 1.0), ("stacked", 1.4)])
def test_segments_are_no_larger_than_wanted(kind: str, room: float) -> None:
    """Up to the observation after their rows; stacks begin more often here than the mean of the memory has it."""
    rows, _ = filled(300, kind, kept=300)
    mean = rows.bytes / (SLOTS * rows.kept)
    segments = list(rows.since(limit=-(-40 * rows.bytes // rows.kept)))
    brought = torch.stack([segment["end"] - segment["begin"] for segment in segments])
    assert int(brought.max()) == 40
    assert brought.sum(dim=0).tolist() == (rows.head - rows.oldest).tolist(), "each row once"
    for segment in segments:
        assert sum(value.nbytes for value in segment.values()) <= room * 41 * SLOTS * mean


def test_a_segment_is_needed_until_its_last_row_has_gone() -> None:
    rows, streams = filled(2, kept=12)
    (segment,) = rows.since()
    assert segment["end"].tolist() == [4, 4, 4]
    for _ in range(5):
        rows.append(slab([streams[0], streams[2]], 2))
    assert rows.oldest.tolist() == [3, 0, 3]
    assert needed(segment["end"], rows.state()["oldest"])
    rows.append(slab([streams[0], streams[1], streams[2]], 2))
    assert needed(segment["end"], rows.state()["oldest"]), "slot 1 has all of its rows"
    for _ in range(5):
        rows.append(slab([streams[1]], 2))
    assert not needed(segment["end"], rows.state()["oldest"])


def test_nothing_has_no_segments() -> None:
    rows, loaded = made("stacked", 2, 12), made("stacked", 2, 12)
    assert list(rows.since()) == []
    loaded.load(rows.state(), [])
    assert_same_rows(rows, loaded)


@pytest.mark.parametrize("slabs", [0, 1, 3])
def test_rows_that_a_restart_changes_after_they_were_saved_are_saved_again(slabs: int) -> None:
    rows, streams = filled(1)
    for stream in streams:
        stream.random = np.random.default_rng(8)  # no ends at first
    rows.append(slab(streams, 2))
    (first,) = rows.since()
    mark, last = rows.state()["head"], (np.arange(SLOTS), np.full(SLOTS, 3))
    before = rows.obs(*last), rows.obs(last[0], last[1] + 1)
    assert rows.valid(*last).all()
    rows.restart()
    restart(streams)
    for _ in range(slabs):
        rows.append(slab(streams, 2))
    loaded = made("stacked", 2, 12)
    loaded.load(rows.state(), [first, *rows.since(mark)])
    assert not loaded.valid(*last).any()
    assert loaded.column("truncated", last[0], last[1] - 1).all()
    assert torch.equal(loaded.obs(*last), before[0])
    assert torch.equal(loaded.obs(last[0], last[1] + 1), before[1]) == (slabs == 0), "the successor was replaced"
    assert_same_rows(rows, loaded)


def broken(segments: list[Segment]) -> Iterator[tuple[str, list[Segment]]]:
    """Segments of which something is wrong, and what is said of it."""
    yield "rows .* to .* of the slots, and .* some are missing", segments[1:]
    yield "some are missing", segments[:-1]
    yield "some are missing", [segments[0], *segments[2:]]
    yield "out of order", segments[::-1]
    yield "is not the one that was saved", [segments[0] | {"columns.reward": segments[0]["columns.reward"][1:]}]
    yield "is not the one that was saved", [segments[0] | {"state0.0": segments[0]["state0.0"].double()}]
    yield "is not the one that was saved", [segments[0] | {"obs.0.frames": segments[0]["obs.0.frames"][:, :1]}]


@pytest.mark.parametrize("number", range(7))
def test_segments_that_do_not_make_up_the_replay_are_refused(number: int) -> None:
    rows, _ = filled(5)
    said, segments = list(broken(list(rows.since(limit=rows.bytes // 6))))[number]
    with pytest.raises(ValueError, match=said):
        made("stacked", 2, 12).load(rows.state(), segments)


def test_a_tensor_that_is_missing_is_named() -> None:
    rows, _ = filled(5)
    (segment,) = rows.since()
    del segment["columns.value"]
    with pytest.raises(KeyError, match=r"columns\.value"):
        made("stacked", 2, 12).load(rows.state(), [segment])


@pytest.mark.parametrize(("unroll", "kept"), [(2, 14), (1, 12)])
def test_a_replay_that_is_laid_out_otherwise_is_refused(unroll: int, kept: int) -> None:
    rows, _ = filled(5)
    with pytest.raises(
        ValueError, match=f"3 slots x 12 rows in unrolls of 2 was saved, .*x {kept} rows .*of {unroll};"
    ):
        made("stacked", unroll, kept).load(rows.state(), rows.since())


def test_a_replay_that_holds_rows_is_not_loaded() -> None:
    rows, _ = filled(5)
    with pytest.raises(ValueError, match="holds rows"):
        rows.load(rows.state(), list(rows.since()))


def test_a_mark_of_another_run_is_refused() -> None:
    rows, _ = filled(5)
    with pytest.raises(ValueError, match=r"\[10, 10, 10\] of the slots have not come to \[10, 12, 10\] yet"):
        rows.since(torch.tensor([10, 12, 10]))
