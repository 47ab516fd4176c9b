"""Training rewards: what is made of raw rewards before they are learned from."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from slipstream.ops.normalize import ReturnScale
from slipstream.types import Trajectory

RewardTransform = Literal["raw", "clip", "sign", "scale"]


class TrainingReward:
    """The transform of rewards, and the statistics that it needs.

    Args:
        kind: As they are, clipped to [-1, 1], their sign, or divided by the running standard deviation of the
            discounted return.
        num_envs: Slots.
        gamma: Discount per step.

    Attributes:
        scale: The statistics; unused unless `kind` is `scale`.
    """

    def __init__(self, kind: RewardTransform, num_envs: int, gamma: float) -> None:
        self._kind: RewardTransform = kind
        self.scale = ReturnScale(num_envs, gamma)

    def observe(self, trajectory: Trajectory) -> None:
        """Takes a slab into account; to be called once for each."""
        if self._kind == "scale":
            self.scale.update(trajectory.reward, trajectory.valid, trajectory.slot)

    def restart_episodes(self) -> None:
        """Says that all slots are about to start an episode."""
        self.scale.ret.zero_()

    def __call__(self, reward: Tensor) -> Tensor:
        """Raw rewards, float32 of any shape, as training rewards."""
        match self._kind:
            case "raw":
                return reward
            case "clip":
                return reward.clamp(-1.0, 1.0)
            case "sign":
                return reward.sign()
            case "scale":
                return self.scale(reward)
