"""The actor-critic: torso, optional recurrent core, policy head and value head behind one small contract.

    trunk(o) = core(torso(normalise(o)))        pi = policy_head(trunk(o))        V = value_head(trunk'(o))

where trunk' is the same trunk, or a second one with `share_torso=False`. The same forward serves rows `[T, B]`, flat
samples `[N]` and the `[B]` slots of a lane.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from slipstream.nets.initialize import initialise, keyed_initialisation
from slipstream.nets.policy import Outputs
from slipstream.nets.rows import ObservedRows
from slipstream.nets.trunk import Encoded, Network, Trunk
from slipstream.ops.distributions import distribution_of
from slipstream.ops.normalize import RunningMoments
from slipstream.tree import Tree
from slipstream.types import Act, EnvSpec


class ActorCritic(nn.Module):
    """The library's own `Policy`, built by `make_actor_critic`, which also seeds the weights.

    Attributes:
        dice_width: D, uniform numbers that `act` needs per slot.
        recurrent: Whether rows must be unrolled in order, from a state.
        remember: Whether `act` says the whole distribution.
        moments: Statistics of the observations, if they are normalised.

    Args:
        spec: What the environments show and want.
        network: Shape of the networks.
        torso: A user's own torso instead of `network.torso`: observations `[N, *O]` to features float32 `[N, F]`. A
            separate value torso starts as its copy. Its weights are left as they come.
        remember: Whether `act` says the whole distribution, for algorithms that replay.
    """

    def __init__(self, spec: EnvSpec, network: Network, torso: nn.Module | None = None, remember: bool = False) -> None:
        super().__init__()
        self.remember = remember
        self._head = distribution_of(spec.action_space)
        self._rows = ObservedRows(spec, self._head)
        self.dice_width: int = self._head.num_uniforms
        self.recurrent: bool = network.core != "none"
        self.moments = RunningMoments(spec.observation_space) if network.normalize_obs else None
        self.trunk = Trunk(spec, network, torso)
        self.value_trunk = None if network.share_torso else Trunk(spec, network, copy.deepcopy(torso))
        continuous = self._head.family == "diag_gaussian"
        # The standard deviation does not depend on the observation: half of the parameters are no outputs.
        self.policy_head = nn.Linear(self.trunk.features, self._head.num_params // (2 if continuous else 1))
        self.log_std = (
            nn.Parameter(torch.full((self._head.num_uniforms,), network.log_std_init)) if continuous else None
        )
        self.value_head = nn.Linear((self.value_trunk or self.trunk).features, 1)
        initialise(self.policy_head, network.init, gain=0.01)
        initialise(self.value_head, network.init, gain=1.0)

    def initial_state(self, batch: int) -> Tree:
        """Zeros `[B, H]`: `()`, the state of the core, or `(policy's, value's)` where the trunks are separate."""
        state = self.trunk.initial_state(batch)
        if self.value_trunk is None or not self.recurrent:
            return state
        return state, self.value_trunk.initial_state(batch)

    @property
    def plain(self) -> bool:
        """Whether it chooses one action out of A, by the observation of the row alone, as it comes and unmasked."""
        return self._head.family == "categorical" and not (self.recurrent or self.moments or self._rows.masked)

    @torch.no_grad()
    def act(self, obs: Tree, state: Tree, dice: Tensor, greedy: bool = False, slot: Tensor | None = None) -> Act:
        """Actions for `B` slots.

        Args:
            obs: Tree `[B, *O]`.
            state: Tree `[B, ...]`, zeroed by the caller in slots where an episode starts.
            dice: float32 `[B, D]`, uniform in `[0, 1)`, multiples of 2**-23.
            greedy: Whether to take the most probable action instead of a draw.
            slot: Ignored: all slots draw from the policy itself.

        Returns:
            `Act` with `extras["value"]`, float32 `[B]`, and if it remembers `extras["params"]`, float32 `[B, P]`, the
            parameters of the distribution; no gradient.
        """
        return self.answer(*self.judge(obs, state), dice, greedy)

    def judge(self, obs: Tree, state: Tree) -> tuple[Outputs, Tree]:
        """What the policy says to `B` slots, and their next states, both with a graph where gradients are enabled.

        Args:
            obs: Tree `[B, *O]`.
            state: Tree `[B, ...]`, as of `act`.
        """
        return self._forward(obs, state, None)

    @torch.no_grad()
    def answer(self, said: Outputs, state: Tree, dice: Tensor, greedy: bool = False) -> Act:
        """The actions that `act` draws from what `judge` said, with the state as it is; no other gradient."""
        distribution, value = said.distribution, said.value.detach()
        action = distribution.mode() if greedy else distribution.sample(dice)
        extras = {"value": value, "params": distribution.params()} if self.remember else {"value": value}
        return Act(action, distribution.log_prob(action), state, extras)

    def unroll(self, obs: Tree, state0: Tree = (), first: Tensor | None = None) -> Outputs:
        """Distributions and values of rows.

        Args:
            obs: Tree `[T, B, *O]`; a feed-forward policy also takes flat `[N, *O]`.
            state0: Tree `[B, ...]`, state before row 0; ignored by a feed-forward policy.
            first: bool `[T, B]`, True where an episode starts at that row, so that the state is zeroed before it;
                ignored by a feed-forward policy.

        Returns:
            `Outputs` with the leading dimensions of `obs`.

        Raises:
            ValueError: The policy is recurrent and `first` is missing.
        """
        if not self.recurrent:
            return self._forward(obs, (), None)[0]
        if first is None:
            raise ValueError("unroll: a recurrent policy needs `first` [T, B], True where an episode starts")
        return self._forward(obs, state0, first)[0]

    def encode(self, obs: Tree) -> Encoded:
        """What the policy's trunk makes of rows `[N, *O]` before any memory, for an auto-encoder."""
        flat, _ = self._rows.flat(obs if self.moments is None else self.moments(obs))
        return self.trunk.encode(flat)

    def observe(self, obs: Tree, valid: Tensor) -> None:
        """Updates the statistics of the observations, if there are any; the learner calls it once per update.

        Args:
            obs: Tree `[..., *O]`.
            valid: bool `[...]`, rows to take into account.
        """
        if self.moments is not None:
            self.moments.update(obs, valid)

    def _forward(self, obs: Tree, state: Tree, first: Tensor | None) -> tuple[Outputs, Tree]:
        """Rows `[..., *O]` to outputs `[...]`, and the next state."""
        if self.moments is not None:
            obs = self.moments(obs)
        flat, leading = self._rows.flat(obs)
        encoded = self.trunk.encode(flat)
        if self.value_trunk is None:
            features, state = self.trunk.remember(encoded.latent, state, first)
            value_features = features
        else:
            policy_state, value_state = state if self.recurrent else ((), ())
            features, policy_state = self.trunk.remember(encoded.latent, policy_state, first)
            value_features, value_state = self.value_trunk(flat, value_state, first)
            state = (policy_state, value_state) if self.recurrent else ()
        params = self.policy_head(features)
        value = self.value_head(value_features).squeeze(-1)
        if self.log_std is not None:
            params = torch.cat([params, self.log_std.expand_as(params)], dim=-1)
        if len(leading) == 2:
            params, value = params.unflatten(0, leading), value.unflatten(0, leading)
        return Outputs(self._head.distribution(params, self._rows.mask(obs)), value, encoded), state


def make_actor_critic(
    spec: EnvSpec, network: Network, torso: nn.Module | None = None, seed: int = 0, remember: bool = False
) -> ActorCritic:
    """An actor-critic on the CPU whose weights are a function of `seed`, the spec's spaces and `network` only.

    Args:
        spec: What the environments show and want.
        network: Shape of the networks.
        torso: A user's own torso, see `ActorCritic`.
        seed: The user's seed. torch's global generator is left as it was.
        remember: As of `ActorCritic`.

    Raises:
        ValueError: A space is not supported, an image is too small for the torso, or the user's torso gives something
            else than float features `[N, F]`.
    """
    with keyed_initialisation(seed, "policy"):
        return ActorCritic(spec, network, torso, remember)
