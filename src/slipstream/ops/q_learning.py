"""Q-learning: targets, losses and priorities of DQN and its descendants, one equation each.

    y = r + discount * Q(o', a'),    discount = gamma^m * (1 - terminated)

Here r is the reward of the m steps from o to o'. Termination is a discount of 0, truncation needs no case of its own:
o' is the observation that truly followed. Targets carry no gradient. A `*_loss` maps rows to rows, is to be minimised,
and is reduced by `losses.weighted_mean`.

`...` are leading dimensions, `[N]` or `[L, B]`; `A` counts actions, `Z` atoms of a categorical value, `M` quantiles,
`L` rows of a sequence. Where an action is ruled out its Q is to be the least float before it comes here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional


def td_target(reward: Tensor, discount: Tensor, next_value: Tensor) -> Tensor:
    """What Q is to become, `r + discount * V(o')` (Mnih et al., 2015, algorithm 1).

    Args:
        reward: float32 `[...]`, of the m steps to o', each discounted.
        discount: float32 `[...]`, `gamma^m * (1 - terminated)`.
        next_value: float32 `[...]`, of o'.

    Returns:
        float32 `[...]`.
    """
    return (reward + discount * next_value).detach()


def max_value(q: Tensor) -> Tensor:
    """Value of the greedy action, `max_a Q(o, a)`.

    Args:
        q: float32 `[..., A]`.

    Returns:
        float32 `[...]`.
    """
    return q.amax(-1)


def double_value(online_q: Tensor, target_q: Tensor) -> Tensor:
    """Double Q-learning: one net chooses the action, the other says its value (van Hasselt et al., 2016, eq. 4).

        Q_target(o, argmax_a Q_online(o, a))

    Identity: with equal nets it is `max_value`.

    Args:
        online_q: float32 `[..., A]`, under the parameters being trained.
        target_q: float32 `[..., A]`, under those of the target network.

    Returns:
        float32 `[...]`.
    """
    return chosen(target_q, online_q.argmax(-1))


def chosen(q: Tensor, action: Tensor) -> Tensor:
    """The entry of one action in every row: its Q, its atoms or its quantiles.

    Args:
        q: float32 `[..., A, *rest]`.
        action: int64 `[...]`.

    Returns:
        float32 `[..., *rest]`.
    """
    axis = action.dim()
    index = action.reshape(*action.shape, *[1] * (q.dim() - axis)).expand(*action.shape, 1, *q.shape[axis + 1 :])
    return q.gather(axis, index).squeeze(axis)


def huber(x: Tensor, delta: float = 1.0) -> Tensor:
    """Squared near zero, linear beyond `delta`, where its slope is `delta` (Huber, 1964).

        x^2 / 2 if |x| <= delta,    otherwise delta (|x| - delta / 2)

    Its gradient is the TD error clipped to `[-delta, delta]`, the "error clipping" of DQN (Mnih et al., 2015).

    Args:
        x: float32, any shape.
        delta: Where the line begins, positive, in units of `x`.

    Returns:
        float32, the same shape.
    """
    return functional.huber_loss(x, x.new_zeros(()).expand_as(x), reduction="none", delta=delta)


def support(low: float, high: float, atoms: int) -> Tensor:
    """Values that a categorical return may take, `z_i = low + i (high - low) / (Z - 1)` (Bellemare et al., 2017).

    Args:
        low: V_MIN of the paper, in units of the return.
        high: V_MAX of the paper.
        atoms: Z, at least 2; N of the paper.

    Returns:
        float32 `[Z]`.
    """
    return torch.linspace(low, high, atoms)


def categorical_projection(probs: Tensor, reward: Tensor, discount: Tensor, atoms: Tensor) -> Tensor:
    """Distribution of `r + discount * Z` on the atoms of Z (Bellemare et al., 2017, eq. 7 and algorithm 1).

        b_j = (clip(r + discount z_j, z_0, z_{Z-1}) - z_0) / delta_z
        m_i = sum_j max(0, 1 - |b_j - i|) p_j

    Each shifted atom shares its mass out between its two neighbours in proportion to nearness. The paper's algorithm
    loses the mass of one that meets an atom exactly (l = u); here it has the whole.

    Identities: `reward = 0, discount = 1` changes nothing; the mean is `r + discount * mean` where nothing is clipped.

    It scatters `2 Z` numbers a row, each row in the order of its atoms: on a CPU the same bits always and a hundredth
    of the time of the `[..., Z, Z]` form; on a GPU so with PyTorch's deterministic algorithms only.

    Args:
        probs: float32 `[..., Z]`, of o'.
        reward: float32 `[...]`.
        discount: float32 `[...]`.
        atoms: float32 `[Z]`, evenly spaced, as `support` gives them; at least 2.

    Returns:
        float32 `[..., Z]`, without gradient.
    """
    with torch.no_grad():
        top = atoms.shape[0] - 1
        shifted = reward.unsqueeze(-1) + discount.unsqueeze(-1) * atoms
        b = ((shifted - atoms[0]) * (top / (atoms[-1] - atoms[0]))).clamp(0, top)
        lower = b.floor().clamp(max=top - 1)
        upward = probs * (b - lower)
        index = lower.long()
        return torch.zeros_like(probs).scatter_add_(-1, index, probs - upward).scatter_add_(-1, index + 1, upward)


def beyond_atoms(probs: Tensor, reward: Tensor, discount: Tensor, atoms: Tensor) -> Tensor:
    """Share of `r + discount * Z` that `categorical_projection` moves to an end of the atoms, from beyond it.

    Where it is large the atoms can't say what returns are, and nothing is learned of them.

    Args:
        probs: float32 `[..., Z]`, of o'.
        reward: float32 `[...]`.
        discount: float32 `[...]`.
        atoms: float32 `[Z]`.

    Returns:
        float32 `[...]`, in `[0, 1]`, without gradient.
    """
    with torch.no_grad():
        shifted = reward.unsqueeze(-1) + discount.unsqueeze(-1) * atoms
        return (probs * ((shifted < atoms[0]) | (shifted > atoms[-1]))).sum(-1)


def cross_entropy(log_probs: Tensor, target: Tensor) -> Tensor:
    """Loss of a categorical value, `-sum_i m_i log p_i` (Bellemare et al., 2017, algorithm 1).

    Args:
        log_probs: float32 `[..., Z]`, under the parameters being trained.
        target: float32 `[..., Z]`, probabilities.

    Returns:
        float32 `[...]`, nats.
    """
    return -(target.detach() * log_probs).sum(-1)


def categorical_kl(log_probs: Tensor, target: Tensor) -> Tensor:
    """KL(target || p): the cross-entropy less the entropy of the target; Rainbow's priority (Hessel et al., 2018).

    Never negative, by rounding neither: priorities are raised to a power.

    Args:
        log_probs: float32 `[..., Z]`.
        target: float32 `[..., Z]`, probabilities.

    Returns:
        float32 `[...]`, nats.
    """
    return (cross_entropy(log_probs, target) - torch.special.entr(target.detach()).sum(-1)).clamp(min=0.0)


def quantile_huber_loss(quantiles: Tensor, targets: Tensor, kappa: float = 1.0) -> Tensor:
    """Quantile regression with a Huber loss (Dabney et al., 2018, eq. 10 and algorithm 1).

        sum_i mean_j rho_i(y_j - theta_i),    rho_i(u) = |tau_i - 1{u < 0}| huber(u, kappa) / kappa

    The levels are midpoints, `tau_i = (i + 1/2) / M`. `kappa = 0` is quantile regression, `huber(u) / kappa = |u|`.

    Deviation: the paper does not divide by kappa, so that its loss would vanish with kappa; its successor does (IQN,
    Dabney et al., 2018b). At kappa = 1, which both use, they are one.

    Args:
        quantiles: theta, float32 `[..., M]`, under the parameters being trained.
        targets: y, float32 `[..., M2]`.
        kappa: Where the loss becomes linear, in units of the return; not negative.

    Returns:
        float32 `[...]`.
    """
    error = targets.detach().unsqueeze(-2) - quantiles.unsqueeze(-1)
    count = quantiles.shape[-1]
    tau = (torch.arange(count, dtype=error.dtype, device=error.device).unsqueeze(-1) + 0.5) / count
    distance = huber(error, kappa) / kappa if kappa > 0 else error.abs()
    return (torch.where(error.detach() < 0, 1.0 - tau, tau) * distance).mean(-1).sum(-1)


def rescale(x: Tensor, epsilon: float = 1e-3) -> Tensor:
    """Squashes values of any size, invertibly (Pohlen et al., 2018, proposition A.2; used by R2D2).

        h(x) = sign(x) (sqrt(|x| + 1) - 1) + epsilon x

    Computed as `x / (sqrt(|x| + 1) + 1) + epsilon x`, which does not subtract what is nearly equal.

    Args:
        x: float32, any shape, in units of the return.
        epsilon: Least slope; 0 or more.

    Returns:
        float32, the same shape.
    """
    return x / ((x.abs() + 1.0).sqrt() + 1.0) + epsilon * x


def unscale(x: Tensor, epsilon: float = 1e-3) -> Tensor:
    """Inverse of `rescale` (Pohlen et al., 2018, proposition A.2).

        t = 2 x / (1 + 2 epsilon + sqrt((1 + 2 epsilon)^2 + 4 epsilon |x|)),    h^-1(x) = t (|t| + 2)

    Here |t| is `sqrt(|h^-1(x)| + 1) - 1`, the root of `epsilon t^2 + (1 + 2 epsilon) t = |x|` in the form that does not
    subtract either. In float32 it undoes `rescale` within 6e-7 of the value, from 1e-30 to 1e6; the published form is
    off by 6 % at 1e-3 and needs epsilon > 0.

    Args:
        x: float32, any shape, in rescaled units.
        epsilon: As in `rescale`.

    Returns:
        float32, the same shape.
    """
    slope = 1.0 + 2.0 * epsilon
    t = 2.0 * x / (slope + (slope**2 + 4.0 * epsilon * x.abs()).sqrt())
    return t * (t.abs() + 2.0)


class NStep(NamedTuple):
    """What the next m rows of a sequence give, `[L, B]` each; row t bootstraps from row `t + offset`.

    Attributes:
        reward: float32, `r_t + gamma r_{t+1} + ... + gamma^{m-1} r_{t+m-1}`.
        discount: float32, gamma^m, or 0 where row t+m-1 terminated.
        offset: int64, m, from 1 to n.
    """

    reward: Tensor
    discount: Tensor
    offset: Tensor


def n_step(reward: Tensor, terminated: Tensor, valid: Tensor, gamma: float, n: int) -> NStep:
    """Forward view of n steps at every row of a sequence (Kapturowski et al., 2019, section 2.3; Sutton, 1988).

        y_t = sum_{k<m} gamma^k r_{t+k} + gamma^m V(o_{t+m})

    A window has m = n rows unless it stops before: after a row that terminated (a lost life too), before a dead row,
    and at the end of the sequence. Row `t + m` is what truly followed in all cases: a dead one at a truncation, row L
    at the end. Hence values are wanted for L+1 rows, dead ones included; `ahead` finds them.

    Identities: `n = 1` is `reward` and `gamma * (1 - terminated)`; with `n >= L`, `td_target` of this is
    `returns.n_step_returns` on every live row.

    Args:
        reward: float32 `[L, B]`, as the target should see it (clipped, scaled).
        terminated: bool `[L, B]`.
        valid: bool `[L, B]`, False on dead rows.
        gamma: Discount per step.
        n: Most rows of a window, at least 1.

    Returns:
        `NStep`, without gradient; on dead rows reward 0, discount 0 and offset 1.
    """
    with torch.no_grad():
        rows = reward.shape[0]
        total, discount = torch.zeros_like(reward), torch.ones_like(reward)
        offset = torch.zeros_like(reward, dtype=torch.int64)
        inside = valid
        for k in range(min(n, rows)):
            # `inside` is [rows - k, B]: whether row t + k belongs to the window of row t.
            total[: rows - k] += torch.where(inside, gamma**k * reward[k:], 0.0)
            discount[: rows - k] *= torch.where(inside, torch.where(terminated[k:], 0.0, gamma), 1.0)
            offset[: rows - k] += inside
            inside = inside[:-1] & ~terminated[k:-1] & valid[k + 1 :]
        return NStep(total, torch.where(valid, discount, 0.0), offset.clamp(min=1))


def ahead(value: Tensor, offset: Tensor) -> Tensor:
    """`value[t + offset[t]]`, what row t of a sequence bootstraps from.

    Args:
        value: float32 `[L+1, B]`.
        offset: int64 `[L, B]`, of `n_step`.

    Returns:
        float32 `[L, B]`.
    """
    row = torch.arange(offset.shape[0], device=offset.device).unsqueeze(-1)
    return value.gather(0, row + offset)


def sequence_priority(errors: Tensor, weight: Tensor, eta: float = 0.9) -> Tensor:
    """Priority of a sequence, `eta max_t |delta_t| + (1 - eta) mean_t |delta_t|` (Kapturowski et al., 2019, 2.3).

    Args:
        errors: float32 `[L, B]`, TD errors of either sign.
        weight: float32 or bool `[L, B]`, 0 where a row was not learned from (burn-in, dead rows), whatever it holds.
        eta: Share of the maximum.

    Returns:
        float32 `[B]`, without gradient; 0 where nothing was learned.
    """
    learned = weight > 0
    size = torch.where(learned, errors.detach().abs(), 0.0)
    return eta * size.amax(0) + (1.0 - eta) * size.sum(0) / learned.sum(0).clamp(min=1)


def epsilons(num_envs: int, greatest: float, least: float) -> NDArray[np.float32]:
    """Final rates of exploration, one per slot, evenly spaced in the logarithm (Horgan et al., 2018, section 4.1).

        epsilon_i = greatest (least / greatest)^(i / (num_envs - 1))

    Identity: Ape-X's `0.4^(1 + 7 i / (N - 1))` is `greatest = 0.4, least = 0.4**8`.

    Args:
        num_envs: Slots.
        greatest: Probability of a random action in slot 0; the only one of a single slot.
        least: The same in the last slot; equal to `greatest` for one rate everywhere.

    Returns:
        float32 `[num_envs]`.

    Raises:
        ValueError: `least` is above `greatest`, or 0 while `greatest` is not.
    """
    if greatest != least and not 0.0 < least < greatest:
        raise ValueError(
            f"epsilon from {greatest} to {least}: expected 0 < least < greatest, or both the same; "
            "a small rate such as 0.001 is nearly greedy"
        )
    if greatest == least:
        return np.full(num_envs, greatest, np.float32)
    return np.geomspace(greatest, least, num_envs).astype(np.float32)
