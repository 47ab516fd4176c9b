"""IMPALA: the V-trace actor-critic (Espeholt et al., 2018, arXiv 1802.01561), one gradient step per slab.

Rows come from a policy mu that is older than the learned pi, by any number of updates. Both heads are evaluated once
at the learned parameters, V-trace turns those values and the ratios pi/mu into targets and advantages, which are
constants of the same step (`ops/returns.py` has the recursion):

    L = -log pi(a|o) A  +  vf_coef 0.5 (vs - V)^2  -  beta H        A = min(rho_pg_bar, pi/mu) (r + gamma vs' - V)

On-policy all ratios are 1 and the gradient is A2C's with the same `gae_lambda` and advantages as they are.

Deviation: the published code sums over the rows of a batch, here is the mean over the valid ones, so that learning rate
and clip norm do not depend on the batch's size. `loss_scale` = num_envs * unroll restores the sum, which matters for
`max_grad_norm` and for the optimiser's `eps`: the paper's Atari agent is `optimizer="rmsprop_tf"`, `eps=0.01`,
`loss_scale=640` (32 unrolls of 20 rows), `max_grad_norm=40` and lr = 0.0006 annealed to 0.

The metrics `approx_kl`, `rho_mean` and `rho_clipped` compare mu with pi before the step: what the lag has moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from slipstream import ranges
from slipstream.algos import cloning
from slipstream.algos.algorithm import Batch, Correction, Evaluate, Prepared, ShardShape, anneal
from slipstream.nets.actor_critic import ActorCritic, make_actor_critic
from slipstream.nets.policy import ActorCriticPolicy
from slipstream.nets.trunk import Network
from slipstream.ops import losses
from slipstream.ops.returns import VTraceOptions, vtrace
from slipstream.optimizers import OptimizerKind
from slipstream.replay.options import UnrollReplay
from slipstream.types import EnvSpec, Trajectory


@dataclass(frozen=True)
class IMPALA:
    """Hyperparameters of IMPALA.

    Attributes:
        lr: Learning rate (alpha).
        anneal_lr: Whether the learning rate falls linearly to 0 over the run.
        gamma: Discount.
        gae_lambda: Lambda of V-trace; on-policy it is that of GAE, and 1 gives n-step returns.
        rho_bar: Cap of the ratio pi/mu that weighs a TD error; decides which policy the values are of.
        c_bar: Cap of the ratio in the trace; decides how fast the values get there.
        rho_pg_bar: Cap of the ratio that weighs the policy gradient.
        ent_coef: Weight of the entropy bonus (beta), per nat.
        vf_coef: Weight of the value loss 0.5 (vs - V)^2.
        loss_scale: Factor on the whole loss, a mean over rows; the rows of an update (num_envs * unroll, and replayed
            ones beside them) turn it into the paper's sum.
        max_grad_norm: Global norm to which the gradient is clipped.
        optimizer: Rule of the gradient step.
        eps: Epsilon of the optimiser.
        replay: Replayed unrolls beside the fresh ones; V-trace corrects both.
    """

    name: ClassVar[str] = "impala"
    correction: ClassVar[Correction] = "vtrace"
    max_lag: ClassVar[int | None] = None
    replays: ClassVar[Literal[False]] = False
    bootstraps: ClassVar[bool] = True

    lr: float = 6e-4
    anneal_lr: bool = True
    gamma: float = 0.99
    gae_lambda: float = 1.0
    rho_bar: float = 1.0
    c_bar: float = 1.0
    rho_pg_bar: float = 1.0
    ent_coef: float = 0.01
    vf_coef: float = 0.5
    loss_scale: float = 1.0
    max_grad_norm: float = 10.0
    optimizer: OptimizerKind = "adam"
    eps: float = 1e-5
    replay: UnrollReplay = field(default_factory=UnrollReplay)

    def __post_init__(self) -> None:
        """Refuses numbers that mean nothing."""
        ranges.at_least(self, "algo.", 0, "lr", "ent_coef", "vf_coef", "eps")
        ranges.above(self, "algo.", 0, "rho_bar", "c_bar", "rho_pg_bar", "loss_scale", "max_grad_norm")
        ranges.between(self, "algo.", 0, 1, "gamma", "gae_lambda")

    @property
    def target_period(self) -> int:
        """1: there is no target policy."""
        return 1

    @property
    def reuse_forward(self) -> bool:
        """False: the gradient is not taken where the rows come from."""
        return False

    def make_policy(self, spec: EnvSpec, network: Network, torso: nn.Module | None, seed: int) -> ActorCritic:
        """An actor-critic with initial weights drawn from `seed`."""
        return make_actor_critic(spec, network, torso, seed, self.replay.remembers)

    def prepare(self, trajectory: Trajectory, reward: Tensor, evaluate: Evaluate) -> Prepared:
        """Only what V-trace will ask for: the targets depend on the values that `loss` computes."""
        columns = {"reward": reward, "terminated": trajectory.terminated, "valid": trajectory.valid}
        return Prepared(columns | cloning.stored(self.replay, trajectory), {})

    def minibatches(self, shape: ShardShape, permute: Callable[[int, int], Tensor]) -> Iterator[None]:
        """The whole shard, once."""
        yield None

    def loss(self, policy: ActorCriticPolicy, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """loss_scale * [ -log pi(a|o) A + vf_coef 0.5 (vs - V)^2 - beta H ], as a weighted sum over rows.

        `batch` has whole columns: observations `[T+1, b]`, everything else `[T, b]`.
        """
        out = policy.unroll(batch.obs, batch.state0, batch.first)
        # Row T is there for its value. It has no action yet, any one will do for a log-probability that is cut off.
        action = torch.cat([batch.action, batch.action[-1:]])
        log_prob, entropy = out.distribution.log_prob(action)[:-1], out.distribution.entropy()[:-1]
        log_ratio, kl = log_prob.detach() - batch.log_prob, None
        moved = losses.approx_kl(log_ratio)
        if "params" in batch.columns:
            params = batch.columns["params"]
            acted = out.distribution.like(torch.cat([params, params[-1:]]))
            kl = acted.kl(out.distribution)[:-1]
            log_ratio = cloning.within_region(log_ratio, kl.detach(), self.replay.trust_region)
        reward, terminated, valid = (batch.columns[name] for name in ("reward", "terminated", "valid"))
        options = VTraceOptions(self.rho_bar, self.c_bar, self.rho_pg_bar, self.gae_lambda)
        target = vtrace(log_ratio, reward, out.value.detach(), terminated, valid, self.gamma, options)

        policy_loss = losses.policy_gradient_loss(log_prob, target.pg_advantage)
        value_loss = losses.value_loss(out.value[:-1], target.vs)
        rows = policy_loss + self.vf_coef * value_loss - self.ent_coef * entropy
        clone_loss, cloned = cloning.cloned(self.replay, batch, kl, out.value[:-1])
        loss = batch.mean(rows) + clone_loss
        with torch.no_grad():
            metrics = {
                "policy_loss": batch.mean(policy_loss),
                "value_loss": batch.mean(value_loss),
                "entropy": batch.mean(entropy),
                "approx_kl": batch.mean(moved),
                "rho_mean": batch.mean(losses.truncated_ratio(log_ratio, self.rho_bar)),
                "rho_clipped": batch.mean(losses.truncated(log_ratio, self.rho_bar)),
                **cloned,
            }
            if kl is not None and self.replay.trust_region:
                metrics["outside_region"] = batch.mean(cloning.outside_region(kl, self.replay.trust_region))
        loss, metrics = batch.with_auxiliary(out, loss, metrics)
        return self.loss_scale * loss, metrics

    def learning_rate(self, progress: float, num_envs: int) -> float:
        """Constant, or linear to 0."""
        return anneal(self.lr, progress, self.anneal_lr)

    def pace(self, pace: float, metrics: dict[str, Tensor]) -> float:
        """1: nothing but `learning_rate` decides."""
        return 1.0

    def stop(self, metrics: dict[str, Tensor]) -> bool:
        """Never: there is one minibatch."""
        return False
