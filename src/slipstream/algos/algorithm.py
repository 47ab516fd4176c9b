"""The contract between an algorithm and the learner that runs it.

An algorithm is a frozen dataclass: its fields are its hyperparameters and its command-line flags. It never knows which
schedule, placement or environment feeds it. The loop that calls it, once per slab:

    prepared = algorithm.prepare(trajectory, reward, evaluate)       # targets [T, B], once per update
    for picks in zip(*(algorithm.minibatches(...) for each shard)):
        for each shard, on any thread: loss, metrics = algorithm.loss(policy, batch, progress); differentiate loss
        if algorithm.stop(metrics): break
        add the gradients in shard order, clip, step
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor, nn

from slipstream.nets.policy import ActorCriticPolicy, Outputs
from slipstream.nets.trunk import Network
from slipstream.ops import losses, returns
from slipstream.optimizers import OptimizerKind
from slipstream.replay.options import UnrollReplay
from slipstream.tree import Tree
from slipstream.types import EnvSpec, Trajectory


@dataclass(frozen=True)
class Batch:
    """What one gradient of one shard sees: flat rows `[N]`, or whole columns `[T, b]` for a recurrent policy.

    Attributes:
        obs: Tree `[N, *O]`; `[T+1, b, *O]` for whole columns if the algorithm `bootstraps`.
        action: `[N, *A]`.
        log_prob: float32 `[N]`, of the policy that acted.
        first: bool, the rows of whole columns before which the recurrent state is zeroed (False in row 0, whose state
            is `state0`).
        state0: Tree `[b, ...]`.
        weight: float32 `[N]`; 0 on dead rows, and the weights of all shards of a minibatch sum to 1, so that a weighted
            sum over the shards is the mean over the minibatch's valid rows.
        columns: The columns that `prepare` returned, same rows.
        auxiliary: What is learned beside the algorithm's own loss, such as an auto-encoder; None for nothing.
    """

    obs: Tree
    action: Tensor
    log_prob: Tensor
    first: Tensor
    state0: Tree
    weight: Tensor
    columns: dict[str, Tensor]
    auxiliary: Auxiliary | None = None

    def mean(self, rows: Tensor) -> Tensor:
        """This shard's part of the mean of `rows` over the minibatch's valid rows, a scalar."""
        return (rows * self.weight).sum()

    def with_auxiliary(
        self, out: Outputs, loss: Tensor, metrics: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What an algorithm's `loss` returns: its own loss and metrics, and those of `auxiliary` for the same rows."""
        if self.auxiliary is None:
            return loss, metrics
        extra, more = self.auxiliary(out, self)
        return loss + extra, metrics | more


Auxiliary = Callable[[Outputs, Batch], tuple[Tensor, dict[str, Tensor]]]
"""A loss beside the algorithm's own, of what the policy says of a batch: a shard's part, and its parts of metrics."""


class Evaluation(NamedTuple):
    """A slab in the eyes of the target policy.

    Attributes:
        log_prob: float32 `[T, B]`, of the actions taken.
        value: float32 `[T+1, B]`.
        kl: float32 `[T, B]`, KL(mu || target policy), mu having acted; None where the slab does not tell
            the parameters of mu.
    """

    log_prob: Tensor
    value: Tensor
    kl: Tensor | None = None


Evaluate = Callable[[], Evaluation]

Correction = Literal["delayed_gradient", "ratio", "vtrace", "off_policy"]
"""How an algorithm accounts for rows of an older policy: the gradient is evaluated at the parameters that acted; the
ratio to the acting policy weighs the rows or is in the loss; targets and gradient are those of V-trace; its targets
hold for the rows of any policy."""


@dataclass(frozen=True)
class Prepared:
    """What an algorithm computes once per update, before the first gradient.

    Attributes:
        columns: Targets and advantages, `[T, B]` each.
        metrics: Diagnostics of the whole slab.
    """

    columns: dict[str, Tensor]
    metrics: dict[str, Tensor]


class Algorithm(Protocol):
    """What every algorithm says of itself, whatever it learns from."""

    name: ClassVar[str]
    correction: ClassVar[Correction]
    max_lag: ClassVar[int | None]
    """Updates by which the acting policy may be older than the learned one; None for any number."""

    @property
    def optimizer(self) -> OptimizerKind:
        """Rule of the gradient step."""
        ...

    @property
    def lr(self) -> float:
        """Learning rate at the start."""
        ...

    @property
    def eps(self) -> float:
        """Epsilon of the optimiser."""
        ...

    @property
    def gamma(self) -> float:
        """Discount per step."""
        ...

    @property
    def max_grad_norm(self) -> float:
        """Global norm to which gradients are clipped."""
        ...

    def learning_rate(self, progress: float, num_envs: int) -> float:
        """Step size at `progress`."""
        ...


class SlabAlgorithm(Algorithm, Protocol):
    """An algorithm that learns from each slab once: hyperparameters and the pure functions that they parameterise."""

    replays: ClassVar[Literal[False]]
    bootstraps: ClassVar[bool]
    """Whether `loss` computes its own targets and so wants row T of the observations; its shards are never cut."""

    @property
    def reuse_forward(self) -> bool:
        """Whether the gradient goes back through the forwards of acting, lane by lane, instead of new ones."""
        ...

    @property
    def replay(self) -> UnrollReplay | None:
        """The replay of unrolls beside the fresh ones; None for an algorithm that can't learn from them."""
        ...

    @property
    def target_period(self) -> int:
        """Updates between two refreshes of the target policy; 1 if it is the policy at the start of each update."""
        ...

    def make_policy(self, spec: EnvSpec, network: Network, torso: nn.Module | None, seed: int) -> ActorCriticPolicy:
        """A policy with initial weights drawn from `seed`."""
        ...

    def prepare(self, trajectory: Trajectory, reward: Tensor, evaluate: Evaluate) -> Prepared:
        """Targets and advantages of a slab.

        Args:
            trajectory: The slab; its raw `reward` is not to be used for targets.
            reward: float32 `[T, B]`, the training reward (clipped or scaled as the run says).
            evaluate: Shows the slab to the target policy, at the cost of one forward pass unless that policy acted.
        """
        ...

    def minibatches(self, shape: ShardShape, permute: Callable[[int, int], Tensor]) -> Iterator[Tensor | None]:
        """The items of each minibatch of one shard; an item is a row, or a column for a recurrent policy.

        Args:
            shape: What the shard holds.
            permute: `permute(epoch, size)` is this shard's keyed permutation of `0 .. size-1`, int64.

        Yields:
            Item numbers, int64; or None for the whole shard as it lies in memory.

        Raises:
            ValueError: If the items can't be shared out equally.
        """
        ...

    def loss(self, policy: ActorCriticPolicy, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The shard's part of the minibatch loss (to be minimised), and detached weighted metrics that add up likewise.

        Args:
            policy: Evaluated at the current parameters.
            batch: The shard's rows.
            progress: Share of the run's steps already taken, in [0, 1), for anneals.
        """
        ...

    def pace(self, pace: float, metrics: dict[str, Tensor]) -> float:
        """Factor on the step size of the next update, from that of the last one and its metrics; it starts at 1."""
        ...

    def stop(self, metrics: dict[str, Tensor]) -> bool:
        """Whether to end this update before the minibatch with these metrics is applied."""
        ...


@dataclass(frozen=True)
class ShardShape:
    """Size of one shard of one slab.

    Attributes:
        rows: T.
        columns: Slots of this shard.
        shards: Shards that share every minibatch.
        recurrent: Whether an item is a column (otherwise a row of a column).
    """

    rows: int
    columns: int
    shards: int
    recurrent: bool

    @property
    def items(self) -> int:
        """Items in this shard."""
        return self.columns if self.recurrent else self.rows * self.columns

    @property
    def rows_per_item(self) -> int:
        """Rows that one item brings."""
        return self.rows if self.recurrent else 1


def acted(trajectory: Trajectory) -> Evaluation:
    """The slab in the eyes of the policy that acted, as it was stored."""
    return Evaluation(trajectory.log_prob, trajectory.extras["value"])


def advantage_columns(
    trajectory: Trajectory,
    reward: Tensor,
    value: Tensor,
    gamma: float,
    gae_lambda: float,
    ratio: Tensor | None = None,
    *,
    normalize: bool,
) -> Prepared:
    """Columns `advantage` (GAE times `ratio`), `return` (GAE + value) and `value`.

    Args:
        trajectory: The slab.
        reward: float32 `[T, B]`, the training reward.
        value: float32 `[T+1, B]`.
        gamma: Discount.
        gae_lambda: Lambda of GAE; 1 gives n-step returns.
        ratio: float32 `[T, B]`, importance weights of the rows; None for 1.
        normalize: Whether to bring the advantages of valid rows to mean 0 and standard deviation 1 (the return is taken
            before that).
    """
    valid = trajectory.valid
    advantage = returns.gae(reward, value, trajectory.terminated, valid, gamma, gae_lambda)
    target = advantage + value[:-1]
    metrics = {"explained_variance": losses.explained_variance(value[:-1], target, valid)}
    if ratio is not None:
        advantage = advantage * ratio
    if normalize:
        advantage = losses.normalize_advantage(advantage, valid, ratio)
    return Prepared({"advantage": advantage, "return": target, "value": value[:-1]}, metrics)


def anneal(initial: float, progress: float, annealed: bool) -> float:
    """Linear decay to 0 at the end of the run, or the constant."""
    return initial * (1.0 - progress) if annealed else initial


def shuffled_minibatches(
    epochs: int, batch_size: int, shape: ShardShape, permute: Callable[[int, int], Tensor]
) -> Iterator[Tensor]:
    """`epochs` times all items of the shard in a new order, in equal parts of `batch_size / shards` rows.

    Raises:
        ValueError: If the rows can't be shared out equally; it names batch sizes that can.
    """
    size = items_per_minibatch(batch_size, shape)
    for epoch in range(epochs):
        yield from permute(epoch, shape.items).split(size)


def items_per_minibatch(batch_size: int, shape: ShardShape) -> int:
    """Items that each shard gives to a minibatch of `batch_size` rows.

    Raises:
        ValueError: If the rows can't be shared out equally; it names batch sizes that can.
    """
    unit = shape.shards * shape.rows_per_item
    size, rest = divmod(batch_size, unit)
    if rest or size <= 0 or shape.items % size:
        possible = [unit * part for part in range(1, shape.items + 1) if shape.items % part == 0]
        nearest = sorted(sorted(possible, key=lambda value: abs(value - batch_size))[:4])
        kind = "whole columns (the policy is recurrent)" if shape.recurrent else "rows"
        raise ValueError(
            f"algo.batch_size={batch_size} does not share out equally: an update has {shape.shards} shards of "
            f"{shape.items} {kind}. Nearest sizes that do: {', '.join(str(value) for value in nearest)}"
        )
    return size


_PACES = (0.05, 2.0)
_CHANGE = 1.2


def paced(pace: float, kl: float, desired: float) -> float:
    """The factor on the learning rate that keeps the KL divergence of an update near `desired`, within a factor of 2.

    At first a policy hardly moves, later steps of the same size shake it. This is the adaptive coefficient of PPO's
    paper (Schulman et al., 2017, section 4) applied to the step size, as is common for simulated robots.

    Args:
        pace: The factor so far, in [0.05, 2].
        kl: Mean KL divergence over the minibatches of the last update, nats.
        desired: What it should be.
    """
    if kl > 2 * desired:
        return max(pace / _CHANGE, _PACES[0])
    return min(pace * _CHANGE, _PACES[1]) if kl < desired / 2 else pace
