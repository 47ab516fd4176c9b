"""PPO: proximal policy optimisation with the clipped surrogate (Schulman et al., 2017, arXiv 1707.06347).

Several epochs of minibatches are drawn from each slab; the ratio to the policy before is clipped so that no minibatch
moves the policy far. With one epoch and one minibatch the first ratio is 1 and the gradient equals A2C's with GAE.

Deviations from the paper, all of them options with the field's usual values: value clipping, normalised advantages
(over the whole update, dead rows excluded), annealed learning rate and clip, early stop at a target KL.

Rows of the version before (schedule `concurrent`) are shown to the policy at the start of the update, pi_old. It gives
the values for GAE, and the clip is around it; its ratio to the policy that acted, mu, weighs the advantages:

    r = pi/pi_old        L_clip = -min(r A, clip(r, 1 - epsilon, 1 + epsilon) A),        A = pi_old/mu GAE

This is the decoupled objective (Hilton et al., 2022, arXiv 2110.00641). With `surrogate="acting"` (as in HTS-RL's
released code) r = pi/mu and A = GAE of the values computed while acting: the first ratios are then not 1, and what the
lag alone has moved counts against the clip. At lag 0, where pi_old = mu, both are the paper's objective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from slipstream import ranges
from slipstream.algos.algorithm import (
    Batch,
    Correction,
    Evaluate,
    Prepared,
    ShardShape,
    acted,
    advantage_columns,
    anneal,
    paced,
    shuffled_minibatches,
)
from slipstream.nets.actor_critic import ActorCritic, make_actor_critic
from slipstream.nets.policy import ActorCriticPolicy
from slipstream.nets.trunk import Network
from slipstream.ops import losses
from slipstream.optimizers import OptimizerKind
from slipstream.types import EnvSpec, Trajectory


@dataclass(frozen=True)
class PPO:
    """Hyperparameters of PPO.

    Attributes:
        lr: Learning rate (alpha).
        anneal_lr: Whether the learning rate falls linearly to 0 over the run.
        desired_kl: KL divergence of an update to the policy that the clip is around, in nats: below half of it the
            learning rate grows (up to twice `lr`), above twice of it it falls (down to a twentieth); 0 for neither.
        gamma: Discount.
        gae_lambda: Lambda of GAE.
        epochs: Passes over each slab (K).
        batch_size: Rows that one gradient step sees, over all shards; for a recurrent policy a multiple of the unroll.
        clip_range: Epsilon of the clipped surrogate.
        anneal_clip: Whether epsilon falls linearly to 0 over the run.
        clip_range_vf: Range around the value before the update for value clipping, in units of the return; 0 for none.
        ent_coef: Weight of the entropy bonus, per nat.
        vf_coef: Weight of the value loss 0.5 (R - V)^2.
        max_grad_norm: Global norm to which the gradient is clipped.
        target_kl: The update ends once a minibatch's KL estimate exceeds 1.5 times this, in nats; 0 for never.
        normalize_advantage: Whether advantages are brought to mean 0 and standard deviation 1 over the update.
        surrogate: What the clip is around: the policy at the start of the update (its target policy), for which rows
            older than that cost one forward pass, or the policy that acted.
        optimizer: Rule of the gradient step.
        eps: Epsilon of the optimiser.
    """

    name: ClassVar[str] = "ppo"
    correction: ClassVar[Correction] = "ratio"
    max_lag: ClassVar[int | None] = 1
    replays: ClassVar[Literal[False]] = False
    bootstraps: ClassVar[bool] = False

    lr: float = 2.5e-4
    anneal_lr: bool = True
    desired_kl: float = 0.0
    gamma: float = 0.99
    gae_lambda: float = 0.95
    epochs: int = 4
    batch_size: int = 256
    clip_range: float = 0.2
    anneal_clip: bool = False
    clip_range_vf: float = 0.0
    ent_coef: float = 0.01
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5
    target_kl: float = 0.0
    normalize_advantage: bool = True
    surrogate: Literal["target", "acting"] = "target"
    optimizer: OptimizerKind = "adam"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        """Refuses numbers that mean nothing."""
        ranges.at_least(
            self, "algo.", 0, "lr", "desired_kl", "clip_range_vf", "ent_coef", "vf_coef", "target_kl", "eps"
        )
        ranges.at_least(self, "algo.", 1, "epochs", "batch_size")
        ranges.above(self, "algo.", 0, "clip_range", "max_grad_norm")
        ranges.between(self, "algo.", 0, 1, "gamma", "gae_lambda")

    @property
    def target_period(self) -> int:
        """1: it is the policy at the start of each update."""
        return 1

    @property
    def replay(self) -> None:
        """None: no correction here holds for rows that old."""
        return None

    @property
    def reuse_forward(self) -> bool:
        """False: the gradient is not taken where the rows come from."""
        return False

    def make_policy(self, spec: EnvSpec, network: Network, torso: nn.Module | None, seed: int) -> ActorCritic:
        """An actor-critic with initial weights drawn from `seed`."""
        return make_actor_critic(spec, network, torso, seed)

    def prepare(self, trajectory: Trajectory, reward: Tensor, evaluate: Evaluate) -> Prepared:
        """GAE times pi_old/mu; `return` = GAE + value, before that.

        Columns `reference` (log of the surrogate's denominator) and `ratio` (pi_old/mu) as well.
        """
        told = evaluate() if self.surrogate == "target" else acted(trajectory)
        ratio = torch.where(trajectory.valid, told.log_prob - trajectory.log_prob, 0.0).exp()
        normalize = self.normalize_advantage
        prepared = advantage_columns(
            trajectory, reward, told.value, self.gamma, self.gae_lambda, ratio, normalize=normalize
        )
        prepared.columns.update(reference=told.log_prob, ratio=ratio)
        return prepared

    def minibatches(self, shape: ShardShape, permute: Callable[[int, int], Tensor]) -> Iterator[Tensor]:
        """`epochs` times all items of the shard in a new order, in equal parts of `batch_size / shards` rows."""
        return shuffled_minibatches(self.epochs, self.batch_size, shape, permute)

    def loss(self, policy: ActorCriticPolicy, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Paper's equation 9: L = L_clip + vf_coef L_value - ent_coef H, as a weighted sum over rows.

        The metric `approx_kl` is KL(pi_old || pi), of the policy that the clip is around.
        """
        out = policy.unroll(batch.obs, batch.state0, batch.first)
        advantage, target, reference = (batch.columns[name] for name in ("advantage", "return", "reference"))
        clip = anneal(self.clip_range, progress, self.anneal_clip)
        log_prob, entropy = out.distribution.log_prob(batch.action), out.distribution.entropy()
        policy_loss = losses.clipped_surrogate_loss(log_prob, reference, advantage, clip)
        if self.clip_range_vf > 0:
            value_loss = losses.clipped_value_loss(out.value, batch.columns["value"], target, self.clip_range_vf)
        else:
            value_loss = losses.value_loss(out.value, target)

        loss = batch.mean(policy_loss + self.vf_coef * value_loss - self.ent_coef * entropy)
        with torch.no_grad():
            log_ratio = log_prob - reference
            metrics = {
                "policy_loss": batch.mean(policy_loss),
                "value_loss": batch.mean(value_loss),
                "entropy": batch.mean(entropy),
                "approx_kl": batch.mean(batch.columns["ratio"] * losses.approx_kl(log_ratio)),
                "clip_fraction": batch.mean(losses.clip_fraction(log_ratio, clip)),
            }
        return batch.with_auxiliary(out, loss, metrics)

    def learning_rate(self, progress: float, num_envs: int) -> float:
        """Constant, or linear to 0; `pace` is a factor on it."""
        return anneal(self.lr, progress, self.anneal_lr)

    def pace(self, pace: float, metrics: dict[str, Tensor]) -> float:
        """Adapts to `desired_kl`."""
        return paced(pace, float(metrics["approx_kl"]), self.desired_kl) if self.desired_kl > 0 else 1.0

    def stop(self, metrics: dict[str, Tensor]) -> bool:
        """Whether the policy has moved further than `target_kl` allows."""
        return self.target_kl > 0 and float(metrics["approx_kl"]) > 1.5 * self.target_kl
