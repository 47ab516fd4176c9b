"""Returns and advantages: every one of them is the same recursion, run backwards in time.

    acc[t] = valid[t] * (delta[t] + discount[t] * c[t] * acc[t+1]),    acc[T] = 0                              (*)

with `discount = gamma * (1 - terminated)`. The three ways an episode can be cut need no case of their own:

- *termination* sets `discount[t] = 0`: neither `value[t+1]` nor `acc[t+1]` is used;
- *truncation* bootstraps from `value[t+1]`, the value of what truly followed; row t+1 is dead, so `acc[t+1] = 0`;
- *a life loss* terminates, and the live row after it starts afresh.

Row t holds o_t, a_t and the reward caused by a_t (`R_{t+1}` in the books); `value[t]` is V(o_t), and `value[T]` is
there to bootstrap from. All results carry no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


def accumulate(delta: Tensor, discount: Tensor, c: Tensor | float, valid: Tensor) -> Tensor:
    """Backward discounted sum (*), the kernel under every return.

    Args:
        delta: float32 `[T, B]`.
        discount: float32 `[T, B]`, 0 where the target must not look further.
        c: float32 `[T, B]` or a number, the trace coefficient (lambda in GAE, c_t in V-trace).
        valid: bool `[T, B]`, False on dead rows.

    Returns:
        float32 `[T, B]`; 0 on dead rows, whatever `delta` holds there.
    """
    with torch.no_grad():
        delta = torch.where(valid, delta, 0.0)
        decay = torch.where(valid, discount * c, 0.0)
        acc = delta[-1]
        backwards = [acc]
        for delta_t, decay_t in zip(delta[:-1].flip(0).unbind(0), decay[:-1].flip(0).unbind(0), strict=True):
            acc = torch.addcmul(delta_t, decay_t, acc)
            backwards.append(acc)
        return torch.stack(backwards[::-1])


def gae(reward: Tensor, value: Tensor, terminated: Tensor, valid: Tensor, gamma: float, lambda_: float) -> Tensor:
    """Generalised advantage estimate (Schulman et al., 2016, eq. 16).

        A_t = sum_l (gamma lambda)^l delta_{t+l},    delta_t = r_t + gamma V(o_{t+1}) - V(o_t)

    Identities: `lambda_ = 0` is the TD error; `lambda_ = 1` is the n-step return minus the value.

    Args:
        reward: float32 `[T, B]`, as the target should see it (clipped, scaled).
        value: float32 `[T+1, B]`.
        terminated: bool `[T, B]`.
        valid: bool `[T, B]`.
        gamma: Discount per step.
        lambda_: Trace decay in `[0, 1]`.

    Returns:
        Advantage, float32 `[T, B]`; 0 on dead rows.
    """
    discount = _discount(terminated, gamma)
    delta = reward + discount * value[1:] - value[:-1]
    return accumulate(delta, discount, lambda_, valid)


def n_step_returns(reward: Tensor, value: Tensor, terminated: Tensor, valid: Tensor, gamma: float) -> Tensor:
    """Return to the end of the episode or of the slab, whichever comes first, bootstrapped there (Mnih et al., 2016).

        R_t = r_t + gamma r_{t+1} + ... + gamma^{n-1} r_{t+n-1} + gamma^n V(o_{t+n})

    Identity: `gae(lambda_=1) + value`.

    Args:
        reward: float32 `[T, B]`.
        value: float32 `[T+1, B]`.
        terminated: bool `[T, B]`.
        valid: bool `[T, B]`.
        gamma: Discount per step.

    Returns:
        float32 `[T, B]`; on dead rows `value`, so that the error there is 0.
    """
    return gae(reward, value, terminated, valid, gamma, 1.0) + value[:-1].detach()


@dataclass(frozen=True)
class VTraceOptions:
    """Truncation levels of V-trace (Espeholt et al., 2018, section 4.1).

    Attributes:
        rho_bar: Cap of the weight of the TD error; decides which policy the values converge to.
        c_bar: Cap of the trace coefficient; decides the speed of convergence only.
        rho_pg_bar: Cap of the weight of the policy gradient.
        lambda_: Further decay of the trace (remark 2 of the paper).
    """

    rho_bar: float = 1.0
    c_bar: float = 1.0
    rho_pg_bar: float = 1.0
    lambda_: float = 1.0


class VTrace(NamedTuple):
    """Targets and advantages of V-trace, float32 `[T, B]` each.

    Attributes:
        vs: Regression target of the value; equals `value` on dead rows.
        pg_advantage: Weighted advantage for the policy gradient; 0 on dead rows.
    """

    vs: Tensor
    pg_advantage: Tensor


def vtrace(
    log_ratio: Tensor,
    reward: Tensor,
    value: Tensor,
    terminated: Tensor,
    valid: Tensor,
    gamma: float,
    options: VTraceOptions,
) -> VTrace:
    """V-trace targets (Espeholt et al., 2018, eq. 1 as the recursion of remark 1) and policy-gradient advantages.

        rho_t = min(rho_bar, pi/mu)      c_t = lambda min(c_bar, pi/mu)
        delta_t = rho_t (r_t + gamma V(o_{t+1}) - V(o_t))
        vs_t - V(o_t) = delta_t + gamma c_t (vs_{t+1} - V(o_{t+1}))
        A_t = min(rho_pg_bar, pi/mu) (r_t + gamma q_{t+1} - V(o_t))
        q_{t+1} = lambda vs_{t+1} + (1 - lambda) V(o_{t+1})

    At a cut and at the end of the slab `vs_{t+1}` is V(o_{t+1}).

    Deviation: the paper has q = vs for every lambda. The mixture (the same at lambda = 1) keeps the identity below.

    Identity: on-policy (`log_ratio = 0`, caps of 1) `pg_advantage` is `gae(lambda_)`, and `vs` is `value` plus it.

    Args:
        log_ratio: float32 `[T, B]`, log pi(a|o) - log mu(a|o), learner over actor.
        reward: float32 `[T, B]`.
        value: float32 `[T+1, B]`, under the learner's parameters.
        terminated: bool `[T, B]`.
        valid: bool `[T, B]`.
        gamma: Discount per step.
        options: Caps and lambda.

    Returns:
        `VTrace(vs, pg_advantage)`.
    """
    with torch.no_grad():
        discount = _discount(terminated, gamma)
        ratio = torch.where(valid, log_ratio, 0.0).exp()
        rho = ratio.clamp(max=options.rho_bar)
        c = options.lambda_ * ratio.clamp(max=options.c_bar)
        td_error = reward + discount * value[1:] - value[:-1]
        acc = accumulate(rho * td_error, discount, c, valid)
        following = torch.cat([acc[1:], torch.zeros_like(acc[:1])])
        advantage = ratio.clamp(max=options.rho_pg_bar) * (td_error + discount * options.lambda_ * following)
        return VTrace(vs=value[:-1] + acc, pg_advantage=torch.where(valid, advantage, 0.0))


def _discount(terminated: Tensor, gamma: float) -> Tensor:
    """Gamma where the target may look further, else 0; float32 `[T, B]`."""
    return torch.where(terminated, 0.0, gamma)
