"""V-trace as plain loops over numbers, in the notation of the paper: slow, obvious, without a recursion."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from slipstream.types import Trajectory

Numbers = NDArray[np.float64]


def vtrace(
    slab: Trajectory,
    log_ratio: Numbers,
    value: Numbers,
    gamma: float,
    lambda_: float,
    caps: tuple[float, float, float],
) -> tuple[Numbers, Numbers]:
    """Targets and weighted advantages `[T, B]` (Espeholt et al., 2018, equation 1 and section 4.2).

    Args:
        slab: Rewards and flags.
        log_ratio: `[T, B]`.
        value: `[T+1, B]`.
        gamma: Discount.
        lambda_: Decay of the trace.
        caps: rho_bar, c_bar, rho_pg_bar.
    """
    rho_bar, c_bar, rho_pg_bar = caps
    reward, terminated, valid = (leaf.tolist() for leaf in (slab.reward, slab.terminated, slab.valid))
    vs, advantage = value[:-1].copy(), np.zeros_like(value[:-1])
    alive = [(t, b) for t in range(slab.rows) for b in range(slab.columns) if valid[t][b]]
    for s, b in alive:
        trace = 1.0
        for t in range(s, slab.rows):
            if not valid[t][b]:
                break
            ratio = math.exp(log_ratio[t, b])
            going = 0.0 if terminated[t][b] else gamma
            vs[s, b] += trace * min(rho_bar, ratio) * (reward[t][b] + going * value[t + 1, b] - value[t, b])
            trace *= going * lambda_ * min(c_bar, ratio)
    for s, b in alive:
        ends = s + 1 == slab.rows or not valid[s + 1][b]
        following = value[s + 1, b] if ends else lambda_ * vs[s + 1, b] + (1.0 - lambda_) * value[s + 1, b]
        target = reward[s][b] + (0.0 if terminated[s][b] else gamma * following)
        advantage[s, b] = min(rho_pg_bar, math.exp(log_ratio[s, b])) * (target - value[s, b])
    return vs, advantage
