"""Subnormal numbers, in processes that do without torch; where it is loaded, see `arithmetic`."""

from __future__ import annotations

import ctypes
import ctypes.util
import platform

_PLACES = {"x86_64": (32, 28, 1 << 15 | 1 << 6), "aarch64": (8, 0, 1 << 24)}
"""By machine: bytes of C's `fenv_t`, where the word that decides is, and its bits (FTZ and DAZ; FZ)."""


def flush() -> None:
    """Has this thread, and threads that it starts, take them for zero; leaves machines alone that it does not know."""
    name = ctypes.util.find_library("m")
    if name is None or platform.machine() not in _PLACES:
        return
    size, place, bits = _PLACES[platform.machine()]
    library, state = ctypes.CDLL(name), (ctypes.c_uint8 * size)()
    library.fegetenv(state)
    word = ctypes.c_uint32.from_buffer(state, place)
    word.value |= bits
    library.fesetenv(state)
