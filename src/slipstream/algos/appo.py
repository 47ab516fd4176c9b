"""APPO: the clipped surrogate on V-trace advantages, for rows of any older policy.

Three policies are at play: mu acted, pi_old is the *target* policy (what the learner was at the start of the update, or
up to `target_period` updates ago), pi is being learned. Once per update pi_old is shown the slab, and V-trace with the
ratios pi_old/mu and the values of pi_old gives targets and advantages. The minibatches are then PPO's, with

    r = min(mu/pi_old, ratio_cap) pi/mu        L_clip = -min(r A, clip(r, 1 - epsilon, 1 + epsilon) A)

This is IMPACT (Luo et al., 2020, arXiv 1912.00167), the later form of the asynchronous PPO of "Accelerating Distributed
Deep RL" (2019). Written as pi over a reference probability, r = pi / max(pi_old, mu / ratio_cap), so the loss is PPO's
with another reference.

Where the ratios enter. A carries min(rho_pg_bar, pi_old/mu). With `surrogate="target"`, and no cap at work, r is
pi/pi_old, so that r A carries pi/mu exactly once: one factor of it truncated, the other clipped around 1, where the
update starts. With `surrogate="acting"` (the form of 2019) r = pi/mu, so that the ratio enters twice, truncated in A
and whole in r, and what the lag alone has moved counts against the clip.

Where pi_old = mu (lag 0, `target_period` 1) this is PPO with the same `gae_lambda`, and both surrogates are the same.

Deviations: advantages are normalised beneath their weight (`ops/losses.py` says why), and over the whole update; the
optional penalty KL(pi_old || pi), estimated from the rows of mu with weights min(rho_bar, pi_old/mu), has a constant
coefficient instead of an adaptive one; the target policy is refreshed by updates, never by steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from slipstream import ranges
from slipstream.algos import cloning
from slipstream.algos.algorithm import (
    Batch,
    Correction,
    Evaluate,
    Prepared,
    ShardShape,
    anneal,
    paced,
    shuffled_minibatches,
)
from slipstream.nets.actor_critic import ActorCritic, make_actor_critic
from slipstream.nets.policy import ActorCriticPolicy
from slipstream.nets.trunk import Network
from slipstream.ops import losses
from slipstream.ops.returns import VTraceOptions, vtrace
from slipstream.optimizers import OptimizerKind
from slipstream.replay.options import UnrollReplay
from slipstream.types import EnvSpec, Trajectory


@dataclass(frozen=True)
class APPO:
    """Hyperparameters of APPO.

    Attributes:
        lr: Learning rate (alpha).
        anneal_lr: Whether the learning rate falls linearly to 0 over the run.
        desired_kl: KL divergence of an update to the target policy, in nats: below half of it the
            learning rate grows (up to twice `lr`), above twice of it it falls (down to a twentieth); 0 for neither.
        gamma: Discount.
        gae_lambda: Lambda of V-trace; on-policy it is that of GAE.
        rho_bar: Cap of the ratio pi_old/mu that weighs a TD error; decides which policy the values are of.
        c_bar: Cap of the ratio in the trace; decides how fast the values get there.
        rho_pg_bar: Cap of the ratio that weighs an advantage.
        surrogate: What the clip is around: the target policy (IMPACT), or the policy that acted (the form of 2019).
        ratio_cap: Cap of mu/pi_old in the surrogate's ratio (rho of IMPACT); for surrogate target.
        target_period: Updates between two refreshes of the target policy; 1 makes it the policy at the start of each
            update.
        epochs: Passes over each slab (K).
        batch_size: Rows that one gradient step sees, over all shards; for a recurrent policy a multiple of the unroll.
        clip_range: Epsilon of the clipped surrogate.
        kl_coef: Weight of KL(pi_old || pi), per nat; 0 for none.
        ent_coef: Weight of the entropy bonus, per nat.
        vf_coef: Weight of the value loss 0.5 (vs - V)^2.
        max_grad_norm: Global norm to which the gradient is clipped.
        normalize_advantage: Whether advantages are brought to mean 0 and standard deviation 1 over the update.
        optimizer: Rule of the gradient step.
        eps: Epsilon of the optimiser.
        replay: Replayed unrolls beside the fresh ones; V-trace corrects both.
    """

    name: ClassVar[str] = "appo"
    correction: ClassVar[Correction] = "vtrace"
    max_lag: ClassVar[int | None] = None
    replays: ClassVar[Literal[False]] = False
    bootstraps: ClassVar[bool] = False

    lr: float = 2.5e-4
    anneal_lr: bool = True
    desired_kl: float = 0.0
    gamma: float = 0.99
    gae_lambda: float = 0.95
    rho_bar: float = 1.0
    c_bar: float = 1.0
    rho_pg_bar: float = 1.0
    surrogate: Literal["target", "acting"] = "target"
    ratio_cap: float = 2.0
    target_period: int = 1
    epochs: int = 4
    batch_size: int = 256
    clip_range: float = 0.2
    kl_coef: float = 0.0
    ent_coef: float = 0.01
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5
    normalize_advantage: bool = True
    optimizer: OptimizerKind = "adam"
    eps: float = 1e-5
    replay: UnrollReplay = field(default_factory=UnrollReplay)

    def __post_init__(self) -> None:
        """Refuses numbers that mean nothing."""
        ranges.at_least(self, "algo.", 0, "lr", "desired_kl", "kl_coef", "ent_coef", "vf_coef", "eps")
        ranges.at_least(self, "algo.", 1, "target_period", "epochs", "batch_size", "ratio_cap")
        ranges.above(self, "algo.", 0, "rho_bar", "c_bar", "rho_pg_bar", "clip_range", "max_grad_norm")
        ranges.between(self, "algo.", 0, 1, "gamma", "gae_lambda")

    @property
    def reuse_forward(self) -> bool:
        """False: the gradient is not taken where the rows come from."""
        return False

    def make_policy(self, spec: EnvSpec, network: Network, torso: nn.Module | None, seed: int) -> ActorCritic:
        """An actor-critic with initial weights drawn from `seed`."""
        return make_actor_critic(spec, network, torso, seed, self.replay.remembers)

    def prepare(self, trajectory: Trajectory, reward: Tensor, evaluate: Evaluate) -> Prepared:
        """V-trace of the target policy over the one that acted; `return` is vs.

        Columns `reference` (log of the surrogate's denominator), `target_log_prob` (log pi_old) and `rho` as well.
        """
        target, valid = evaluate(), trajectory.valid
        log_ratio = target.log_prob - trajectory.log_prob
        log_ratio = cloning.within_region(log_ratio, target.kl, self.replay.trust_region)
        options = VTraceOptions(self.rho_bar, self.c_bar, self.rho_pg_bar, self.gae_lambda)
        vs, advantage = vtrace(log_ratio, reward, target.value, trajectory.terminated, valid, self.gamma, options)
        rho = losses.truncated_ratio(log_ratio, self.rho_bar)
        metrics = {
            "explained_variance": losses.explained_variance(target.value[:-1], vs, valid),
            "rho_mean": losses.weighted_mean(rho, valid),
            "rho_clipped": losses.weighted_mean(losses.truncated(log_ratio, self.rho_bar), valid),
        }
        if target.kl is not None and self.replay.trust_region:
            outside = cloning.outside_region(target.kl, self.replay.trust_region)
            metrics["outside_region"] = losses.weighted_mean(outside, valid)
        if self.normalize_advantage:
            weight = losses.truncated_ratio(log_ratio, self.rho_pg_bar)
            advantage = losses.normalize_advantage(advantage, valid & (weight > 0), weight)
        reference = trajectory.log_prob
        if self.surrogate == "target":
            reference = torch.maximum(target.log_prob, trajectory.log_prob - math.log(self.ratio_cap))
        columns = {
            "advantage": advantage,
            "return": vs,
            "reference": reference,
            "target_log_prob": target.log_prob,
            "rho": rho,
        }
        return Prepared(columns | cloning.stored(self.replay, trajectory), metrics)

    def minibatches(self, shape: ShardShape, permute: Callable[[int, int], Tensor]) -> Iterator[Tensor]:
        """`epochs` times all items of the shard in a new order, in equal parts of `batch_size / shards` rows."""
        return shuffled_minibatches(self.epochs, self.batch_size, shape, permute)

    def loss(self, policy: ActorCriticPolicy, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """L_clip + vf_coef 0.5 (vs - V)^2 - ent_coef H + kl_coef KL(pi_old || pi), as a weighted sum over rows.

        The metric `kl_target` is KL(pi_old || pi); `approx_kl` is KL(mu || pi), with what the lag has moved.
        """
        out = policy.unroll(batch.obs, batch.state0, batch.first)
        advantage, target, reference = (batch.columns[name] for name in ("advantage", "return", "reference"))
        log_prob, entropy = out.distribution.log_prob(batch.action), out.distribution.entropy()
        policy_loss = losses.clipped_surrogate_loss(log_prob, reference, advantage, self.clip_range)
        value_loss = losses.value_loss(out.value, target)
        kl_target = batch.columns["rho"] * losses.approx_kl(log_prob - batch.columns["target_log_prob"])

        loss = batch.mean(policy_loss + self.vf_coef * value_loss - self.ent_coef * entropy)
        kl = None
        if self.replay.clone_policy:
            kl = out.distribution.like(batch.columns["params"]).kl(out.distribution)
        clone_loss, cloned = cloning.cloned(self.replay, batch, kl, out.value)
        loss = loss + clone_loss
        if self.kl_coef > 0:
            loss = loss + self.kl_coef * batch.mean(kl_target)
        with torch.no_grad():
            metrics = {
                "policy_loss": batch.mean(policy_loss),
                "value_loss": batch.mean(value_loss),
                "entropy": batch.mean(entropy),
                "approx_kl": batch.mean(losses.approx_kl(log_prob - batch.log_prob)),
                "kl_target": batch.mean(kl_target),
                "clip_fraction": batch.mean(losses.clip_fraction(log_prob - reference, self.clip_range)),
                **cloned,
            }
        return batch.with_auxiliary(out, loss, metrics)

    def learning_rate(self, progress: float, num_envs: int) -> float:
        """Constant, or linear to 0; `pace` is a factor on it."""
        return anneal(self.lr, progress, self.anneal_lr)

    def pace(self, pace: float, metrics: dict[str, Tensor]) -> float:
        """Adapts to `desired_kl`."""
        return paced(pace, float(metrics["kl_target"]), self.desired_kl) if self.desired_kl > 0 else 1.0

    def stop(self, metrics: dict[str, Tensor]) -> bool:
        """Never."""
        return False
