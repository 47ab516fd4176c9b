"""Random numbers that belong to a place, not to a moment: pure functions of (seed, role, slot, row).

No generator state exists, so no order of execution can change a draw. One user seed grows a
`numpy.random.SeedSequence` tree keyed by role and indices; the numbers of one slot are SplitMix64 (Steele, Lea and
Flood, 2014), read at any position: number i of a key is `mix(key + (i + 1) * golden)`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_UNIFORM_BITS = 23


def seed_sequence(seed: int, role: str, *index: int) -> np.random.SeedSequence:
    """The node of the seed tree at (role, *index); roles are hashed by name, so adding one moves no other."""
    digest = int.from_bytes(hashlib.blake2b(role.encode(), digest_size=4).digest(), "little")
    return np.random.SeedSequence(seed, spawn_key=(digest, *index))


def env_seed(seed: int, role: str, *index: int) -> int:
    """A seed for an environment at (role, *index), in `[0, 2**31)` since several C++ engines take an int32."""
    return int(seed_sequence(seed, role, *index).generate_state(1, np.uint32)[0] >> 1)


def keys(seed: int, role: str, slots: Sequence[int]) -> NDArray[np.uint64]:
    """One 64-bit key per slot, uint64 `[B]`."""
    return np.array([seed_sequence(seed, role, slot).generate_state(1, np.uint64)[0] for slot in slots], np.uint64)


def uniform(keys: NDArray[np.uint64], row: int, rows: int, width: int) -> NDArray[np.float32]:
    """Uniform numbers in `[0, 1)` for `rows` rows from `row` on, float32 `[rows, B, width]`.

    They are multiples of 2**-23. For a categorical draw this makes `u * total < total` hold after rounding, so the
    inverse of a cumulative sum can't run past its last positive entry.
    """
    position = (row * width + np.arange(rows * width, dtype=np.uint64)).reshape(rows, 1, width)
    with np.errstate(over="ignore"):
        mixed = _mix(keys[None, :, None] + (position + np.uint64(1)) * _GOLDEN)
    return (mixed >> np.uint64(64 - _UNIFORM_BITS)).astype(np.float32) * np.float32(2.0**-_UNIFORM_BITS)


def permutation(seed: int, role: str, *index: int, size: int) -> NDArray[np.int64]:
    """A permutation of `0 .. size-1`, keyed by (role, *index)."""
    return generator(seed, role, *index).permutation(size)


def generator(seed: int, role: str, *index: int) -> np.random.Generator:
    """A generator that starts at (role, *index): for draws whose number is not known beforehand."""
    return np.random.Generator(np.random.Philox(seed_sequence(seed, role, *index)))


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
