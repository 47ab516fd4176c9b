"""Continuous actions within bounds: how SAC, TD3 and DDPG draw them, and what SAC minimises.

Actions are in the environment's units. The bounds `low < high`, float32 `[D]`, are finite; `D` counts the entries of
one action, `*A` is its shape, `...` are leading dimensions. Noise comes from given uniform numbers `u[..., D]`, in
`[0, 1)` and multiples of 2**-23 (see `slipstream.dice`). Log-densities are sums over the entries of an action, in nats
per unit of the environment. All arithmetic is float32, whatever the precision of the network.
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

_HALF_STEP = 2.0**-24
_LOG_SQRT_2_PI = 0.5 * math.log(2.0 * math.pi)


@final
class TanhGaussian:
    """Normal distributions squashed into the bounds, `a = mid + half tanh(x)` (Haarnoja et al., 2018, appendix C).

        log pi(a) = log N(x; mean, std) - log half - log(1 - tanh(x)^2)

    Args:
        mean: `[..., D]`, any float dtype, before squashing.
        log_std: `[..., D]`, any float dtype, before squashing.
        low: float32 `[D]`.
        high: float32 `[D]`.
        shape: Shape of one action; `(D,)` if empty.
    """

    def __init__(self, mean: Tensor, log_std: Tensor, low: Tensor, high: Tensor, shape: tuple[int, ...] = ()) -> None:
        self.mean = mean.float()
        self.log_std = log_std.float()
        self.low = low
        self.high = high
        self.shape = shape or tuple(mean.shape[-1:])

    def sample_with_log_prob(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Action float32 `[..., *A]` and its log-density `[...]`; the gradient flows through both (reparameterised).

        The density is that of x before tanh rounds: where the action is at a bound `log_prob` can't know x any more.
        """
        noise = _normal(u)
        x = self.mean + self.log_std.exp() * noise
        return self._squashed(x), self._log_density(noise, x)

    def mode(self) -> Tensor:
        """The squashed mean, float32 `[..., *A]`: the median of the action, and what is played without exploration."""
        return self._squashed(self.mean)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-density of `action[..., *A]`, float32 `[...]`.

        `x = atanh(y)` is `log((action - low) / (high - action)) / 2`: the distances to the bounds are exact where
        `1 - y` would not be. They are taken to be at least 2**-24 of the range, so |x| is at most 8.3.
        """
        flat = action.flatten(-len(self.shape))
        least = (self.high - self.low) * _HALF_STEP
        above, below = torch.maximum(flat - self.low, least), torch.maximum(self.high - flat, least)
        x = 0.5 * (above.log() - below.log())
        return self._log_density((x - self.mean) * (-self.log_std).exp(), x)

    def _squashed(self, x: Tensor) -> Tensor:
        """The action of x, never past a bound by rounding."""
        action = 0.5 * (self.high + self.low) + 0.5 * (self.high - self.low) * x.tanh()
        return action.clamp(self.low, self.high).unflatten(-1, self.shape)

    def _log_density(self, noise: Tensor, x: Tensor) -> Tensor:
        """Of the action of `x = mean + std * noise`; `log(1 - tanh(x)^2)` in the form that is finite for all x."""
        normal = -0.5 * noise.square() - self.log_std - _LOG_SQRT_2_PI
        slope = 2.0 * (math.log(2.0) - x - functional.softplus(-2.0 * x))
        return (normal - slope - (0.5 * (self.high - self.low)).log()).sum(-1)


def perturbed(action: Tensor, u: Tensor, low: Tensor, high: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Exploration of DDPG and TD3: normal noise on a deterministic action, clipped to the bounds.

        clip(a + half sigma xi, low, high),    xi ~ N(0, 1)      (Fujimoto et al., 2018, algorithm 1)

    Args:
        action: float32 `[..., *A]`.
        u: float32 `[..., D]`.
        low: float32 `[D]`.
        high: float32 `[D]`.
        sigma: Standard deviation in units of half the range.

    Returns:
        Action float32 `[..., *A]`, and the log-density of the normal draw before it was clipped, float32 `[...]`
        (infinite for `sigma = 0`).
    """
    noise, scale = _normal(u), 0.5 * (high - low) * sigma
    log_prob = (-0.5 * noise.square() - scale.log() - _LOG_SQRT_2_PI).sum(-1)
    return _moved(action, scale * noise, low, high), log_prob


def smoothed(action: Tensor, u: Tensor, low: Tensor, high: Tensor, sigma: float, clip: float) -> Tensor:
    """TD3's smoothing of the target policy (Fujimoto et al., 2018, section 5.3 and algorithm 1).

        clip(a + half clip(sigma xi, -c, c), low, high),    xi ~ N(0, 1)

    Identities: `sigma = 0` is `action`; without `clip` (infinite) it is the action of `perturbed`.

    Args:
        action: float32 `[..., *A]`, of the target policy.
        u: float32 `[..., D]`.
        low: float32 `[D]`.
        high: float32 `[D]`.
        sigma: Standard deviation in units of half the range.
        clip: c, the largest move, in the same units.

    Returns:
        float32 `[..., *A]`.
    """
    return _moved(action, 0.5 * (high - low) * (sigma * _normal(u)).clamp(-clip, clip), low, high)


def uniform_action(u: Tensor, low: Tensor, high: Tensor, shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """An action from anywhere within the bounds, as before learning begins, and its log-density.

    Args:
        u: float32 `[..., D]`.
        low: float32 `[D]`.
        high: float32 `[D]`.
        shape: Shape of one action; `(D,)` if empty.

    Returns:
        Action float32 `[..., *A]`, and `-sum log(high - low)`, float32 `[...]`.
    """
    action = low + (high - low) * (u + _HALF_STEP)
    log_prob = -(high - low).log().sum(-1).expand(u.shape[:-1])
    return action.unflatten(-1, shape or u.shape[-1:]), log_prob


def soft_value(q_min: Tensor, alpha: Tensor | float, log_prob: Tensor) -> Tensor:
    """SAC's value of an observation, one sample of it, `min_i Q_i(o, a) - alpha log pi(a|o)`.

    Haarnoja et al. (2018b), eq. 3, with the smaller of two critics.

    Args:
        q_min: float32 `[...]`, of an action drawn from the policy.
        alpha: Temperature, reward per nat; a number or float32 `[]`.
        log_prob: float32 `[...]`, of the same action.

    Returns:
        float32 `[...]`.
    """
    return q_min - alpha * log_prob


def soft_actor_loss(log_prob: Tensor, q_min: Tensor, alpha: Tensor | float) -> Tensor:
    """SAC's loss of the policy, `alpha log pi(a|o) - min_i Q_i(o, a)` (Haarnoja et al., 2018b, eq. 7 and 9).

    Its gradient goes through the action, hence `q_min` and `log_prob` are to be differentiable by it. The temperature
    gets none.

    Identity: minus `soft_value`.

    Args:
        log_prob: float32 `[...]`, of a reparameterised action.
        q_min: float32 `[...]`, of the same action.
        alpha: Temperature, reward per nat; a number or float32 `[]`.

    Returns:
        float32 `[...]`.
    """
    alpha = alpha.detach() if isinstance(alpha, Tensor) else alpha
    return alpha * log_prob - q_min


def temperature_loss(log_alpha: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """Loss whose descent holds the entropy at its target (Haarnoja et al., 2018b, eq. 18).

        -alpha (log pi(a|o) + target),    alpha = exp(log_alpha)

    The temperature rises while the entropy, `-log pi` on average, is below the target.

    Args:
        log_alpha: float32 `[]`, being trained.
        log_prob: float32 `[...]`, of an action drawn from the policy.
        target_entropy: Nats, of the action in the environment's units: the paper's -D for bounds of -1 and 1, and in
            general `sum(log half) - D`.

    Returns:
        float32 `[...]`.
    """
    return -log_alpha.exp() * (log_prob.detach() + target_entropy)


def _normal(u: Tensor) -> Tensor:
    """Standard normal numbers; half a step is added so that both ends are finite, as in `DiagGaussian.sample`."""
    return torch.special.ndtri(u + _HALF_STEP)


def _moved(action: Tensor, move: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`action[..., *A] + move[..., D]`, clipped to the bounds, `[..., *A]`."""
    return (action.reshape(move.shape) + move).clamp(low, high).reshape(action.shape)
