"""Acting of small perceptrons by NumPy, which computes a layer of 64 for a lane of 64 while PyTorch looks for it.

The answers are those of `ActorCritic.act` but for rounding, and the uniform numbers are used in the same way. BLAS
computes products of up to 2**18 multiplications in one thread, so that no bit depends on how many it may have.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from slipstream.nets.actor_critic import ActorCritic
from slipstream.nets.policy import Policy
from slipstream.ops.distributions import drawn
from slipstream.types import Act

Array = NDArray[np.float32]

_MULTIPLICATIONS = 2**18


class _Linear(NamedTuple):
    """A linear layer as arrays that share its memory: weights `[in, out]`, bias `[out]`."""

    weight: Array
    bias: Array

    @classmethod
    def of(cls, layer: nn.Linear) -> Self:
        return cls(layer.weight.detach().numpy().T, layer.bias.detach().numpy())

    def __call__(self, x: Array) -> Array:
        y = x @ self.weight
        y += self.bias
        return y


class _Features(NamedTuple):
    """A perceptron."""

    layers: list[_Linear]
    tanh: bool

    @classmethod
    def of(cls, network: nn.Sequential) -> Self:
        layers = [_Linear.of(layer) for layer in network if isinstance(layer, nn.Linear)]
        return cls(layers, any(isinstance(layer, nn.Tanh) for layer in network))

    def __call__(self, x: Array) -> Array:
        for layer in self.layers:
            x = layer(x)
            x = np.tanh(x, out=x) if self.tanh else np.maximum(x, 0.0, out=x)
        return x


class SmallActor:
    """Acts in place of a policy of perceptrons that chooses one action out of A.

    It shares the memory of the policy's parameters, and follows what is copied into them; it holds for as long as they
    lie where they are. Hooks of modules are not called.

    Args:
        policy: The policy; `plain`.
        networks: What policy head and value head see comes from there.
    """

    def __init__(self, policy: ActorCritic, networks: tuple[nn.Sequential, nn.Sequential]) -> None:
        self._features, self._value_features = (_Features.of(network) for network in networks)
        self._shared = networks[0] is networks[1]
        self._policy_head, self._value_head = _Linear.of(policy.policy_head), _Linear.of(policy.value_head)
        self._remember = policy.remember

    def act(self, obs: Array, dice: Array) -> Act:
        """Actions for `B` slots, without gradient.

        Args:
            obs: float32 `[B, F]`.
            dice: float32 `[B, 1]`, as of `ActorCritic.act`.
        """
        features = self._features(obs)
        value = self._value_head(features if self._shared else self._value_features(obs))
        log_probs = self._policy_head(features)
        log_probs -= log_probs.max(-1, keepdims=True)
        log_probs -= np.log(np.exp(log_probs).sum(-1, keepdims=True))
        action = drawn(log_probs, dice)
        extras = {"value": torch.from_numpy(value[:, 0])}
        if self._remember:
            extras["params"] = torch.from_numpy(log_probs)
        chosen = log_probs[np.arange(len(action)), action]
        return Act(torch.from_numpy(action), torch.from_numpy(chosen), (), extras)


def small_actor(policy: Policy, slots: int, device: torch.device) -> SmallActor | None:
    """Who acts for `slots` slots in place of a policy on `device`; None where it had better act itself."""
    if type(policy) is not ActorCritic or device.type != "cpu" or not policy.plain:  # a subclass may act otherwise
        return None
    network, value_network = policy.trunk.perceptron, (policy.value_trunk or policy.trunk).perceptron
    if network is None or value_network is None:
        return None
    layers = [*network, *value_network, policy.policy_head, policy.value_head]
    largest = max(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))
    return SmallActor(policy, (network, value_network)) if slots * largest <= _MULTIPLICATIONS else None
