"""A2C: synchronous advantage actor-critic (Mnih et al., 2016, arXiv 1602.01783, without its asynchrony).

One gradient step per slab: n-step advantages from the values computed while acting, policy gradient, value regression
and an entropy bonus. It is PPO with one epoch of one minibatch, whose ratio is 1, and GAE with lambda = 1.

Where the acting policy is one update old (schedule `concurrent`), the gradient is evaluated at the parameters that
acted and applied to the newer ones (HTS-RL, Liu et al., 2020):

    theta[j+1] = theta[j] - lr * grad L(theta, rows of theta[j-1]) at theta = theta[j-1]

PAAC (Clemente et al., 2017, arXiv 1705.04862) is A2C with `optimizer="rmsprop_tf"`, `eps=0.1`, `loss_scale=5`,
`lr_scaling="num_envs"` and lr = 0.0007 annealed to 0. Deviation: the released code takes the mean where the paper sums
over t_max = 5 rows; `loss_scale` = 5 restores the sum's scale (it matters, because clipping and RMSProp see it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from slipstream import ranges
from slipstream.algos.algorithm import Batch, Correction, Evaluate, Prepared, ShardShape, advantage_columns, anneal
from slipstream.nets.actor_critic import ActorCritic, make_actor_critic
from slipstream.nets.policy import ActorCriticPolicy
from slipstream.nets.trunk import Network
from slipstream.ops import losses
from slipstream.optimizers import OptimizerKind
from slipstream.types import EnvSpec, Trajectory


@dataclass(frozen=True)
class A2C:
    """Hyperparameters of A2C.

    Attributes:
        lr: Learning rate (alpha), before `lr_scaling`.
        lr_scaling: `num_envs` multiplies the learning rate by the number of environments (PAAC's rule).
        anneal_lr: Whether the learning rate falls linearly to 0 over the run.
        gamma: Discount.
        gae_lambda: Lambda of GAE; 1 gives n-step returns.
        ent_coef: Weight of the entropy bonus (beta), per nat.
        vf_coef: Weight of the value loss 0.5 (R - V)^2.
        loss_scale: Factor on the whole loss.
        max_grad_norm: Global norm to which the gradient is clipped.
        normalize_advantage: Whether advantages are brought to mean 0 and standard deviation 1 over the update.
        reuse_forward: Whether the gradient goes back through the forwards that acting made, one backward per lane,
            instead of making a second one: the same but for rounding. It pays where a lane has many slots.
        optimizer: Rule of the gradient step.
        eps: Epsilon of the optimiser.
    """

    name: ClassVar[str] = "a2c"
    correction: ClassVar[Correction] = "delayed_gradient"
    max_lag: ClassVar[int | None] = 1
    replays: ClassVar[Literal[False]] = False
    bootstraps: ClassVar[bool] = False

    lr: float = 7e-4
    lr_scaling: Literal["none", "num_envs"] = "none"
    anneal_lr: bool = True
    gamma: float = 0.99
    gae_lambda: float = 1.0
    ent_coef: float = 0.01
    vf_coef: float = 0.5
    loss_scale: float = 1.0
    max_grad_norm: float = 0.5
    normalize_advantage: bool = False
    reuse_forward: bool = False
    optimizer: OptimizerKind = "rmsprop_tf"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        """Refuses numbers that mean nothing."""
        ranges.at_least(self, "algo.", 0, "lr", "ent_coef", "vf_coef", "eps")
        ranges.above(self, "algo.", 0, "loss_scale", "max_grad_norm")
        ranges.between(self, "algo.", 0, 1, "gamma", "gae_lambda")

    @property
    def target_period(self) -> int:
        """1: there is no target policy."""
        return 1

    @property
    def replay(self) -> None:
        """None: no correction here holds for rows that old."""
        return None

    def make_policy(self, spec: EnvSpec, network: Network, torso: nn.Module | None, seed: int) -> ActorCritic:
        """An actor-critic with initial weights drawn from `seed`."""
        return make_actor_critic(spec, network, torso, seed)

    def prepare(self, trajectory: Trajectory, reward: Tensor, evaluate: Evaluate) -> Prepared:
        """R_t - V(s_t) with the values computed while acting; `return` = advantage + value, before normalisation."""
        value, normalize = trajectory.extras["value"], self.normalize_advantage
        return advantage_columns(trajectory, reward, value, self.gamma, self.gae_lambda, normalize=normalize)

    def minibatches(self, shape: ShardShape, permute: Callable[[int, int], Tensor]) -> Iterator[None]:
        """The whole shard, once."""
        yield None

    def loss(self, policy: ActorCriticPolicy, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """loss_scale * [ -log pi(a|s) A + vf_coef 0.5 (R - V)^2 - beta H ], as a weighted sum over rows."""
        out = policy.unroll(batch.obs, batch.state0, batch.first)
        log_prob, entropy = out.distribution.log_prob(batch.action), out.distribution.entropy()
        policy_loss = losses.policy_gradient_loss(log_prob, batch.columns["advantage"])
        value_loss = losses.value_loss(out.value, batch.columns["return"])

        loss = batch.mean(policy_loss + self.vf_coef * value_loss - self.ent_coef * entropy)
        with torch.no_grad():
            metrics = {
                "policy_loss": batch.mean(policy_loss),
                "value_loss": batch.mean(value_loss),
                "entropy": batch.mean(entropy),
            }
        loss, metrics = batch.with_auxiliary(out, loss, metrics)
        return self.loss_scale * loss, metrics

    def learning_rate(self, progress: float, num_envs: int) -> float:
        """Scaled with the environments if asked, constant or linear to 0."""
        scale = num_envs if self.lr_scaling == "num_envs" else 1
        return anneal(self.lr * scale, progress, self.anneal_lr)

    def pace(self, pace: float, metrics: dict[str, Tensor]) -> float:
        """1: nothing but `learning_rate` decides."""
        return 1.0

    def stop(self, metrics: dict[str, Tensor]) -> bool:
        """Never: there is one minibatch."""
        return False
