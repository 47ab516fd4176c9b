from __future__ import annotations

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from slipstream.ops.normalize import ReturnScale, RunningMoments

VECTOR = spaces.Box(-np.inf, np.inf, (3,), np.float64)
TREE = spaces.Dict(
    {
        "action_mask": spaces.Box(0, 1, (4,), np.float32),
        "bits": spaces.MultiBinary(2),
        "choice": spaces.Discrete(5),
        "image": spaces.Box(0, 255, (1, 8, 8), np.uint8),
        "pair": spaces.Tuple((spaces.Box(-1, 1, (2, 2), np.float32), spaces.Box(-1, 1, (), np.float32))),
        "bytes": spaces.Box(0, 255, (3,), np.uint8),
    }
)


def batch(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy((np.random.default_rng(seed).normal(size=shape) * 3 + 7).astype(np.float32))


def test_moments_of_batches_are_the_moments_of_all_valid_rows():
    moments = RunningMoments(VECTOR)
    seen: list[np.ndarray] = []
    for seed, rows in enumerate((1, 5, 13, 2)):
        obs, valid = batch(seed, rows, 3), torch.from_numpy(np.random.default_rng(seed).random(rows) < 0.7)
        moments.update(torch.where(valid.unsqueeze(1), obs, 1e9), valid)
        seen.append(obs[valid].double().numpy())
    rows = np.concatenate(seen)
    assert moments.count.item() == len(rows)
    np.testing.assert_allclose(moments.mean.numpy(), rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance.numpy(), rows.var(0), rtol=1e-12)
    got = moments(batch(9, 4, 3))
    assert got.dtype == torch.float32
    expected = (batch(9, 4, 3).numpy() - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-8)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_slabs_and_flat_rows_update_alike():
    obs, valid = batch(0, 5, 3, 3), torch.arange(15).reshape(5, 3) % 4 != 1
    slab, flat = RunningMoments(VECTOR), RunningMoments(VECTOR)
    slab.update(obs, valid)
    flat.update(obs.flatten(0, 1), valid.flatten())
    assert torch.equal(slab.mean, flat.mean)
    torch.testing.assert_close(slab(obs).flatten(0, 1), flat(obs.flatten(0, 1)))


def test_before_any_row_only_the_clip_acts():
    moments = RunningMoments(VECTOR)
    moments.update(batch(0, 5, 3), torch.zeros(5, dtype=torch.bool))
    obs = torch.tensor([[0.5, -3.0, 99.0], [-99.0, 0.0, 1.0]])
    torch.testing.assert_close(moments(obs), obs.clamp(-10, 10))


def test_statistics_change_only_in_update_and_travel_in_the_state():
    moments = RunningMoments(VECTOR)
    moments.update(batch(0, 7, 3), torch.ones(7, dtype=torch.bool))
    before = {name: value.clone() for name, value in moments.state_dict().items()}
    moments(batch(1, 7, 3))
    assert all(torch.equal(value, before[name]) for name, value in moments.state_dict().items())
    other = RunningMoments(VECTOR)
    other.load_state_dict(before)
    assert torch.equal(other(batch(1, 7, 3)), moments(batch(1, 7, 3)))


def test_a_large_offset_does_not_drown_the_variance():
    moments = RunningMoments(VECTOR)
    for seed in range(5):
        moments.update(batch(seed, 101, 3).round() + 1e6, torch.ones(101, dtype=torch.bool))
    rows = np.concatenate([(batch(seed, 101, 3).round() + 1e6).double().numpy() for seed in range(5)])
    np.testing.assert_allclose(moments.variance.numpy(), rows.var(0), rtol=1e-9)


def test_only_float_vectors_of_a_tree_are_touched():
    moments = RunningMoments(TREE)
    obs = {
        "action_mask": torch.ones(5, 4),
        "bits": torch.ones(5, 2, dtype=torch.int8),
        "choice": torch.arange(5),
        "image": torch.ones(5, 1, 8, 8, dtype=torch.uint8),
        "pair": (batch(0, 5, 2, 2), batch(1, 5)),
        "bytes": torch.ones(5, 3, dtype=torch.uint8),
    }
    moments.update(obs, torch.ones(5, dtype=torch.bool))
    assert moments.mean.shape == (5,)
    got = moments(obs)
    assert got.keys() == obs.keys()
    assert all(got[key] is obs[key] for key in ("action_mask", "bits", "choice", "image", "bytes"))
    for leaf, original in zip(got["pair"], obs["pair"], strict=True):
        assert leaf.shape == original.shape
        torch.testing.assert_close(leaf.mean(0), torch.zeros(leaf.shape[1:]), rtol=0, atol=1e-5)
        torch.testing.assert_close(leaf.std(0, unbiased=False), torch.ones(leaf.shape[1:]), rtol=1e-4, atol=0)


def test_a_tree_without_float_vectors_passes_through():
    moments = RunningMoments(spaces.Discrete(3))
    obs = torch.arange(3)
    moments.update(obs, torch.ones(3, dtype=torch.bool))
    assert moments(obs) is obs


def running_returns(reward: np.ndarray, valid: np.ndarray, gamma: float) -> np.ndarray:
    """The discounted return at every valid row, slot by slot, since the row after the last dead one."""
    found: list[float] = []
    for b in range(reward.shape[1]):
        for t in np.flatnonzero(valid[:, b]):
            start = max(np.flatnonzero(~valid[:t, b]), default=-1) + 1
            found.append(sum(gamma ** (t - k) * reward[k, b] for k in range(start, t + 1)))
    return np.array(found)


def test_return_scale_is_the_deviation_of_running_returns_across_slabs():
    reward, gamma = batch(0, 26, 3), 0.9
    valid = torch.from_numpy(np.random.default_rng(1).random((26, 3)) > 0.15)
    scale = ReturnScale(3, gamma)
    noise = torch.where(valid, reward, 1e9)
    for start in (0, 13):
        scale.update(noise[start : start + 13], valid[start : start + 13], torch.arange(noise.shape[1]))
    expected = running_returns(reward.double().numpy(), valid.numpy(), gamma).var()
    np.testing.assert_allclose(scale.variance.item(), expected, rtol=1e-9)
    np.testing.assert_allclose(scale(reward).numpy(), (reward.numpy() / np.sqrt(expected)).clip(-10, 10), rtol=1e-5)


def test_return_scale_carries_on_from_its_state():
    valid = torch.ones(5, 3, dtype=torch.bool)
    one, other = ReturnScale(3, 0.99), ReturnScale(3, 0.99)
    one.update(batch(0, 5, 3), valid, torch.arange(3))
    other.load_state_dict(one.state_dict())
    for scale in (one, other):
        scale.update(batch(1, 5, 3), valid, torch.arange(valid.shape[1]))
    assert all(torch.equal(value, one.state_dict()[name]) for name, value in other.state_dict().items())


def test_return_scale_clips_and_keeps_the_sign():
    scale = ReturnScale(2, 0.5)
    scale.update(torch.tensor([[1.0, -1.0], [1.0, -1.0]]), torch.ones(2, 2, dtype=torch.bool), torch.arange(2))
    assert scale(torch.tensor([1e6, -1e6, 0.0])).tolist() == [10.0, -10.0, 0.0]


def test_columns_of_the_same_slot_follow_each_other() -> None:
    """Two unrolls of a slot in one slab count as one unroll of twice the length."""
    reward, valid = torch.randn(6, 2, generator=torch.Generator().manual_seed(3)), torch.ones(6, 2, dtype=torch.bool)
    whole, halves = ReturnScale(2, 0.9), ReturnScale(2, 0.9)
    whole.update(reward, valid, torch.tensor([1, 0]))
    side_by_side = torch.cat([reward[:3], reward[3:]], dim=1)
    halves.update(side_by_side, torch.ones(3, 4, dtype=torch.bool), torch.tensor([1, 0, 1, 0]))
    assert torch.equal(whole.ret, halves.ret)
    torch.testing.assert_close(whole.variance, halves.variance)
