"""Losses of actor-critics, one equation each, and the statistics reported beside them.

Every `*_loss` maps rows to rows (float32 `[N]` or `[T, B]` in, the same shape out) and is to be minimised; callers
reduce it with `weighted_mean`, dead rows weighing 0. Advantages and targets carry no gradient: they are constants of
the update.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TINY = 1e-8
_ROUNDING = 1e-4


def policy_gradient_loss(log_prob: Tensor, advantage: Tensor) -> Tensor:
    """Score-function loss `-log pi(a|o) A` (Mnih et al., 2016, section 4); its gradient is minus REINFORCE's.

    Args:
        log_prob: float32 `[N]`, under the parameters being trained.
        advantage: float32 `[N]`.

    Returns:
        float32 `[N]`.
    """
    return -log_prob * advantage.detach()


def clipped_surrogate_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's pessimistic surrogate, negated (Schulman et al., 2017, eq. 7).

        -min(r A, clip(r, 1 - epsilon, 1 + epsilon) A),    r = pi(a|o) / pi_old(a|o)

    Identity: at the first minibatch of a lag-0 update r = 1, and the gradient is that of `policy_gradient_loss`.

    Args:
        log_prob: float32 `[N]`, under the parameters being trained.
        old_log_prob: float32 `[N]`, under the policy that the clip is around.
        advantage: float32 `[N]`.
        clip: epsilon of the paper.

    Returns:
        float32 `[N]`.
    """
    advantage = advantage.detach()
    ratio = (log_prob - old_log_prob.detach()).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1.0 - clip, 1.0 + clip) * advantage)


def value_loss(value: Tensor, target: Tensor) -> Tensor:
    """Half the squared error, `(target - V)^2 / 2`.

    Args:
        value: float32 `[N]`, under the parameters being trained.
        target: float32 `[N]`.

    Returns:
        float32 `[N]`.
    """
    return 0.5 * (target.detach() - value).square()


def clipped_value_loss(value: Tensor, old_value: Tensor, target: Tensor, clip: float) -> Tensor:
    """Half the larger of two squared errors: of the value, and of the value moved at most `clip` away from the old one.

    Not in PPO's paper but in its first public code. Identity: with `value = old_value` it is `value_loss`.

    Args:
        value: float32 `[N]`, under the parameters being trained.
        old_value: float32 `[N]`, before the update.
        target: float32 `[N]`.
        clip: Largest move of the value that is rewarded, in units of the return.

    Returns:
        float32 `[N]`.
    """
    near = old_value.detach() + (value - old_value.detach()).clamp(-clip, clip)
    return torch.maximum(value_loss(value, target), value_loss(near, target))


def weighted_mean(rows: Tensor, weight: Tensor) -> Tensor:
    """`sum(weight * rows) / sum(weight)`, a scalar; 0 if all weights are 0 (a minibatch of dead rows).

    Rows of weight 0 are left out, whatever they hold.

    Args:
        rows: float32, any shape.
        weight: float32 or bool, the same shape, not negative.
    """
    weight = weight.to(rows.dtype)
    total = weight.sum()
    return (torch.where(weight > 0, rows, 0.0) * weight).sum() / torch.where(total > 0, total, 1.0)


def normalize_advantage(advantage: Tensor, valid: Tensor, rho: Tensor | None = None) -> Tensor:
    """Advantage with mean 0 and standard deviation 1 over the valid rows of the whole update.

    The standard deviation is the population's, so one valid row gives 0, not NaN. To be applied before minibatches are
    drawn: otherwise the update depends on how it is cut.

    Advantages that carry an importance weight, `rho_t a_t` (V-trace), are centred beneath it. A constant times rho has
    no policy gradient in expectation and may be taken off; a bare constant has one, towards or away from mu.

        rho_t (a_t - sum_s rho_s a_s / sum_s rho_s),    divided by its root mean square

    Args:
        advantage: float32, any shape.
        valid: bool, the same shape.
        rho: float32, the same shape, positive; the weight that `advantage` carries, none for 1.

    Returns:
        float32, the same shape; 0 on dead rows.
    """
    rho = torch.ones_like(advantage) if rho is None else rho
    mean = weighted_mean(advantage, valid) / weighted_mean(rho, valid).clamp(min=_TINY)
    centred = advantage - rho * mean
    std = weighted_mean(centred.square(), valid).sqrt()
    return torch.where(valid, centred / (std + _TINY), 0.0)


def explained_variance(value: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """`1 - Var(target - value) / Var(target)` over the valid rows: 1 is perfect, 0 no better than a constant.

    Finite for a constant target as well (its variance is taken to be at least 1e-8).

    Args:
        value: float32, any shape.
        target: float32, the same shape.
        valid: bool, the same shape.

    Returns:
        float32 scalar.
    """
    return 1.0 - _variance(target - value, valid) / _variance(target, valid).clamp(min=_TINY)


def approx_kl(log_ratio: Tensor) -> Tensor:
    """KL(pi_old || pi) estimated from samples of pi_old by `(r - 1) - log r`.

    Unbiased, and never negative row by row (Schulman, "Approximating KL divergence", 2020, estimator k3).

    Args:
        log_ratio: float32 `[N]`, log pi - log pi_old.

    Returns:
        float32 `[N]`, nats; its mean over rows is the estimate.
    """
    return torch.expm1(log_ratio) - log_ratio


def clip_fraction(log_ratio: Tensor, clip: float) -> Tensor:
    """Share of rows whose ratio has left `[1 - clip, 1 + clip]`, whatever the sign of their advantage.

    Args:
        log_ratio: float32 `[N]`, log pi - log pi_old.
        clip: epsilon of PPO.

    Returns:
        float32 `[N]`, 1 where it has; its mean over rows is the share.
    """
    return (torch.expm1(log_ratio).abs() > clip).float()


def truncated_ratio(log_ratio: Tensor, cap: float) -> Tensor:
    """Importance weight `min(cap, pi(a|o) / mu(a|o))`: rho and c of V-trace.

    Args:
        log_ratio: float32 `[N]`, log pi - log mu.
        cap: rho_bar or c_bar of the paper.

    Returns:
        float32 `[N]`.
    """
    return log_ratio.exp().clamp(max=cap)


def truncated(log_ratio: Tensor, cap: float) -> Tensor:
    """Rows whose ratio exceeds `cap`, by more than rounding does (on-policy the ratio is 1, and so is the usual cap).

    Args:
        log_ratio: float32 `[N]`, log pi - log mu.
        cap: rho_bar or c_bar of the paper.

    Returns:
        float32 `[N]`, 1 where it does; its mean over rows is the share.
    """
    return (log_ratio > math.log(cap) + _ROUNDING).float()


def _variance(rows: Tensor, valid: Tensor) -> Tensor:
    """Population variance over the valid rows."""
    return weighted_mean((rows - weighted_mean(rows, valid)).square(), valid)
