"""Acting of small perceptrons by NumPy, which computes a layer of 64 for a lane of 64 while PyTorch looks for it.

The answers are those of `ActorCritic.act` but for rounding, and the uniform numbers are used in the same way. NumPy's
OpenBLAS computes products of up to 2**18 multiplications in one thread, so that no bit depends on how many it may have.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slipstream.nets.actor_critic import ActorCritic
from slipstream.nets.policy import Policy
from slipstream.ops.distributions import drawn
from slipstream.tree import Tree
from slipstream.types import Act

Array = NDArray[np.float32]

_MULTIPLICATIONS = 2**18


class Acts(Protocol):
    """Who acts: a policy, or someone in its place."""

    def act(self, obs: Tree, state: Tree, dice: Tensor, greedy: bool = False, slot: Tensor | None = None) -> Act:
        """As of `Policy`."""
        ...


def acting(policy: Policy, slots: int, device: torch.device) -> Acts:
    """Who acts for `slots` slots: a policy on `device`, or in its place a `SmallActor`.

    To be asked again before every unroll, since a policy's parameters may lie elsewhere then.
    """
    if type(policy) is not ActorCritic or device.type != "cpu" or not policy.plain:  # a subclass may act otherwise
        return policy
    network, value_network = policy.trunk.perceptron, (policy.value_trunk or policy.trunk).perceptron
    if network is None or value_network is None:
        return policy
    layers = [*network, *value_network, policy.policy_head, policy.value_head]
    linear = [layer for layer in layers if type(layer) is nn.Linear]
    known = all(type(layer) in (nn.Linear, nn.Tanh, nn.ReLU) for layer in layers)
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in policy.modules())
    if not known or hooked or slots * max(layer.weight.numel() for layer in linear) > _MULTIPLICATIONS:
        return policy
    return SmallActor(policy, network, value_network)


class SmallActor:
    """Acts in place of a policy of perceptrons that chooses one action out of A.

    It shares the memory of the policy's parameters, and follows what is copied into them; it holds for as long as they
    lie where they are.

    Args:
        policy: The policy; `plain`.
        network: What the policy head sees comes from there.
        value_network: The same for the value head; it may be the same one.
    """

    def __init__(self, policy: ActorCritic, network: nn.Sequential, value_network: nn.Sequential) -> None:
        self._features, self._value_features = _Features.of(network), _Features.of(value_network)
        self._shared = network is value_network
        self._policy_head, self._value_head = _Linear.of(policy.policy_head), _Linear.of(policy.value_head)
        self._remember = policy.remember

    def act(self, obs: Tree, state: Tree, dice: Tensor, greedy: bool = False, slot: Tensor | None = None) -> Act:
        """As of `ActorCritic`, of observations float32 `[B, F]`."""
        shown = obs.numpy()
        features = self._features(shown)
        value = self._value_head(features if self._shared else self._value_features(shown))
        log_probs = self._policy_head(features)
        log_probs -= log_probs.max(-1, keepdims=True)
        log_probs -= np.log(np.exp(log_probs).sum(-1, keepdims=True))
        action = log_probs.argmax(-1) if greedy else drawn(log_probs, dice.numpy())
        extras = {"value": torch.from_numpy(value[:, 0])}
        if self._remember:
            extras["params"] = torch.from_numpy(log_probs)
        chosen = log_probs[np.arange(len(action)), action]
        return Act(torch.from_numpy(action), torch.from_numpy(chosen), state, extras)


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
    """Linear layers with the same activation after each."""

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
