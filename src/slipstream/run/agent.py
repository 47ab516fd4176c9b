"""The Python API: `train`, `resume` and `load` give an `Agent`, which predicts as in Stable-Baselines3."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import Space, spaces
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn

from slipstream import dice, slab, tree
from slipstream.arithmetic import adopted
from slipstream.descent import under
from slipstream.envs.factory import require_maker
from slipstream.envs.spaces import leaf_dtype, leaf_shape
from slipstream.nets.actor_critic import ActorCritic
from slipstream.nets.autoencoder import Decoder, make_decoder
from slipstream.nets.policy import ActorCriticPolicy, Policy
from slipstream.ops.spaces import space_tree
from slipstream.run import checkpoint, evaluate, loop
from slipstream.run.checkpoint import Checkpoint
from slipstream.run.config import CALLABLE, Config
from slipstream.run.directory import RunDirectory, to_yaml
from slipstream.run.evaluate import Evaluation
from slipstream.run.files import writing
from slipstream.run.loop import EnvFactory, Own, Trained
from slipstream.run.presets import configure, spelled_out
from slipstream.run.settings import ConfigError
from slipstream.tree import Tree
from slipstream.types import EnvSpec


class Agent:
    """A trained policy with all that it needs to act: network, normaliser, spaces.

    Attributes:
        policy: The policy.
        spec: Spaces that it was trained on; its number of slots means nothing here.
        config: The run's configuration.
        steps: Agent decisions that it was trained for.
        run: The run directory that it came from.
        env: The callable that makes its environment; None where the id in `config` does.
        decoder: Draws what the policy sees; None where the run has no auto-encoder, or only the agent was saved.
    """

    def __init__(
        self,
        policy: Policy,
        spec: EnvSpec,
        config: Config,
        steps: int,
        run: Path,
        env: EnvFactory | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        self.policy, self.spec, self.config, self.steps, self.run = policy, spec, config, steps, run
        self.env, self.decoder = env, decoder
        self._row = 0
        self._leaf_spaces = space_tree(spec.observation_space)

    @adopted()
    @torch.no_grad()
    def predict(
        self,
        obs: Tree,
        state: Tree | None = None,
        episode_start: NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[NDArray[Any], Tree | None]:
        """Chooses actions for one observation or a batch, as in Stable-Baselines3.

        Args:
            obs: `[*O]` or `[B, *O]`, a tree of those for Dict and Tuple spaces.
            state: What the last call returned; None at the start of an episode.
            episode_start: bool `[B]` (or one bool), slots whose episode starts here: their state is zeroed.
            deterministic: Whether to take the most probable action instead of a drawn one. Draws are keyed by the run's
                seed and the number of calls before.

        Returns:
            The action, `[*A]` or `[B, *A]` like `obs` (int64 counted from 0, or float32 inside the bounds), and the
            next state, None for a feed-forward policy.

        Raises:
            ValueError: If an observation does not have the shape or kind of numbers of `spec.observation_space`, or if
                `state` or `episode_start` is of another number of slots.
        """
        batch, single = self._batch(obs)
        device = next(self.policy.parameters()).device
        columns = int(tree.leaves(batch)[0].shape[0])

        start = np.asarray(False if episode_start is None else episode_start, np.bool_)
        if start.shape not in ((), (1,), (columns,)):
            raise ValueError(f"predict: expected episode_start of shape ({columns},), got {start.shape}")
        start = np.broadcast_to(start, (columns,))
        before = self._state(state, columns)
        before = slab.keep(slab.tensors(before, device), slab.tensors(~start, device))
        keys = dice.keys(self.config.seed, "predict", range(columns))
        draws = slab.tensors(dice.uniform(keys, self._row, 1, self.policy.dice_width)[0], device)
        self._row += 1
        act = self.policy.act(slab.tensors(batch, device), before, draws, deterministic)
        action = act.action.cpu().numpy()
        if isinstance(self.spec.action_space, spaces.Box):
            action = np.clip(action, self.spec.action_space.low, self.spec.action_space.high)
        after = tree.map(_to_numpy, act.state) if self.policy.recurrent else None
        return (action[0] if single else action), after

    def evaluate(self, episodes: int = 30, greedy: bool = False, seed: int | None = None) -> Evaluation:
        """Plays whole episodes in environments of their own, with seeds that training never uses.

        Normalisers are only read.

        Args:
            episodes: How many.
            greedy: Whether to take the most probable actions instead of drawn ones.
            seed: Another seed than the run's.

        Raises:
            ValueError: If there is no episode to play.
            CheckpointError: If the environment no longer has the spaces that the agent was trained on.
        """
        if episodes < 1:
            raise ValueError(f"expected at least 1 episode to evaluate, got {episodes}")
        loop.require_callable(self.config, self.env, self.run)
        envs = loop.evaluation_envs(self.config, episodes, self.env)
        try:
            checkpoint.require_spaces(str(self.run), self.spec, envs.spec)
            chosen = self.config.seed if seed is None else seed
            return evaluate.evaluate(self.policy, envs, episodes, chosen, greedy=greedy)
        finally:
            envs.close()

    def save(self, path: str | Path) -> None:
        """Writes the agent (not the optimiser) into a new directory that `load` and `slipstream eval` take.

        Raises:
            FileExistsError: If the directory exists; nothing in it is touched.
            CheckpointError: If it can't be written.
        """
        folder = Path(path)
        if folder.exists():
            raise FileExistsError(f"{folder} exists; save writes a new directory, so give it another name")
        with writing(folder):
            folder.mkdir(parents=True, mode=0o700)
            (folder / "config.yaml").write_text(to_yaml(self.config))
        tensors = {f"policy.{name}": value for name, value in self.policy.state_dict().items()}
        checkpoint.save(folder / "checkpoints", self.steps, checkpoint.copies(tensors), {}, self.spec)

    def _state(self, state: Tree | None, columns: int) -> Tree:
        """The state to act from, in the shape that the policy has for this many slots."""
        fresh = self.policy.initial_state(columns)
        if state is None:
            return fresh
        expected, given = ([tuple(np.shape(leaf)) for leaf in tree.leaves(each)] for each in (fresh, state))
        if expected != given:
            raise ValueError(
                f"predict: expected the state of {columns} slots, arrays of shapes {expected}, got {given}; pass what "
                "the last call for these slots returned, or None at the start"
            )
        return state

    def _batch(self, obs: Tree) -> tuple[Tree, bool]:
        """The observations as `[B, *O]` in the dtypes of training, and whether they were one without B."""

        def array_of(space: Space[Any], leaf: Any) -> NDArray[Any]:
            return np.asarray(leaf)

        try:
            arrays = tree.map(array_of, self._leaf_spaces, _plain(obs))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"predict: expected observations of {self.spec.observation_space}: {error!r}") from error
        first = tree.leaves(arrays)[0]
        single = first.ndim == len(leaf_shape(tree.leaves(self._leaf_spaces)[0]))
        columns = None if single else first.shape[0]

        def fit(space: Space[Any], array: NDArray[Any]) -> NDArray[Any]:
            expected = leaf_shape(space) if single else (columns, *leaf_shape(space))
            if array.shape != expected or not np.can_cast(array.dtype, leaf_dtype(space), "same_kind"):
                raise ValueError(
                    f"predict: expected an observation of shape {leaf_shape(space)} or (B, *shape) and dtype "
                    f"{leaf_dtype(space)}, got shape {array.shape} and dtype {array.dtype}"
                )
            array = array.astype(leaf_dtype(space))
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ValueError("predict: the observation has numbers that are not finite")
            return array[None] if single else array

        return tree.map(fit, self._leaf_spaces, arrays), single


def train(
    algo: str,
    env: str | EnvFactory,
    total_steps: int | float | None = None,
    seed: int | None = None,
    config: Mapping[str, Any] | None = None,
    torso: nn.Module | None = None,
    policy: ActorCriticPolicy | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Agent:
    """Trains an agent from the preset of (algo, env) and returns it; the run directory has the rest.

    Args:
        algo: `ppo`, `a2c`, ...
        env: A Gymnasium id, `envpool:ID`, or a callable that makes one environment.
        total_steps: Agent decisions; None for the preset's.
        seed: The one seed; None for 1.
        config: Any other settings, as dotted keys (`{"algo.lr": 3e-4}`) or nested mappings.
        torso: A network of your own: observations `[N, *O]` to features `[N, F]`.
        policy: A whole policy of your own.
        quiet: Whether to show no progress.
        settings: Those without a dot, beside `config`: `lr=3e-4`, `num_envs=16`, `schedule="concurrent"`.

    Raises:
        ConfigError: For an unknown setting or a value that does not fit; nothing has been written then.
    """
    require_maker(env)
    id, factory = _id_or_callable(env)
    name = id or CALLABLE + str(getattr(env, "__qualname__", type(env).__name__))
    chosen = configure(algo, name, _changes(config, settings, {"seed": seed, "total_steps": total_steps}))
    own = Own(factory, torso, policy)
    return _agent(loop.train(chosen, own, sys.argv, Console(quiet=quiet)), own)


def _changes(config: object, settings: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """All settings that a caller gave: in `config`, as keywords, and by name where they are not None."""
    if config is not None and not isinstance(config, Mapping):
        raise ConfigError(
            f"config: expected a mapping of settings, got {config!r}; for a file: config=yaml.safe_load(open(FILE))"
        )
    mapping: Mapping[str, Any] = config or {}
    if twice := settings.keys() & mapping.keys():
        raise ConfigError(f"{', '.join(sorted(twice))}: given twice, in config and as a keyword; leave one out")
    return {**mapping, **settings, **{key: value for key, value in named.items() if value is not None}}


def resume(
    run: str | Path,
    total_steps: int | float | None = None,
    env: str | EnvFactory | None = None,
    torso: nn.Module | None = None,
    policy: ActorCriticPolicy | None = None,
    quiet: bool = False,
    config: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Agent:
    """Trains a run on from its newest checkpoint; `torso` and `policy` are those that it was started with.

    Args:
        run: The run directory.
        total_steps: A new total of agent decisions; None keeps the run's own.
        env: The callable that it was started with; or another callable or id with the same spaces, to go on there.
        torso: The network, if it has one of your own.
        policy: The policy, if it has one of your own.
        quiet: Whether to show no progress.
        config: Settings to go on with, as of `train`: those that the result does not depend on, as `placement.workers`.
        settings: Those without a dot, as of `train`.

    Raises:
        ConfigError: If the run is finished (a higher `total_steps` lets it go on), or a setting can't be changed.
        CheckpointError: If the environment has other spaces.
    """
    id, factory = _id_or_callable(env)
    own = Own(factory, torso, policy)
    changes = _changes(config, settings, {"total_steps": total_steps, "env": id})
    return _agent(loop.resume(Path(run), own, changes, Console(quiet=quiet)), own)


def load(
    run: str | Path,
    checkpoint: str | int = "last",
    env: str | EnvFactory | None = None,
    torso: nn.Module | None = None,
    policy: ActorCriticPolicy | None = None,
) -> Agent:
    """The agent of a run (or of `Agent.save`), ready to predict; its environment need not be installed for that.

    Args:
        run: The directory.
        checkpoint: `last`, `best`, or a number of steps.
        env: The callable, if the run was trained on one and is to be evaluated; or another callable or id with the same
            spaces, to be evaluated there. It is made at once, to see whether they are the same.
        torso: The network, if the run was trained with one of your own (its weights are replaced).
        policy: The policy, if the run was trained with one of your own (its weights are replaced).

    Raises:
        ConfigError: If there is no run.
        CheckpointError: If the checkpoint is missing, damaged, or does not fit the network or `env`.
    """
    folder = RunDirectory(Path(run))
    id, factory = _id_or_callable(env)
    config = folder.config()
    if id is not None:
        config = spelled_out(replace(config, env=id))
    saved = _select(folder, str(checkpoint))
    spec = saved.spec()
    if env is not None:
        with closing(loop.evaluation_envs(config, 1, factory)) as envs:
            saved.require(envs.spec)
    slots = replace(spec, num_envs=config.num_envs)  # policies that explore by slot have a number for each
    made = policy or config.algo.make_policy(slots, config.net, torso, config.seed)
    tensors = saved.tensors()
    with saved.fitting():
        made.load_state_dict(under("policy.", tensors))
    return Agent(made, spec, config, saved.steps, folder.path, factory, _decoder(config, spec, made, tensors))


def _id_or_callable(env: str | EnvFactory | None) -> tuple[str | None, EnvFactory | None]:
    """The id and the callable that `env` is; anything else is refused."""
    if env is not None:
        require_maker(env)
    return (env, None) if isinstance(env, str) else (None, env)


def _agent(trained: Trained, own: Own) -> Agent:
    config, steps = trained.run.config(), trained.progress.steps
    return Agent(trained.policy, trained.spec, config, steps, trained.run.path, own.env, trained.decoder)


def _select(folder: RunDirectory, which: str) -> Checkpoint:
    return checkpoint.select(folder.checkpoints, which)


def _decoder(config: Config, spec: EnvSpec, policy: Policy, tensors: dict[str, Tensor]) -> Decoder | None:
    weights = under("decoder.", tensors)
    if not weights or not isinstance(policy, ActorCritic):
        return None
    bfloat16 = config.net.precision == "bfloat16"
    decoder = make_decoder(spec, config.autoencoder, *policy.trunk.encoded, config.seed, bfloat16)
    decoder.load_state_dict(weights)
    return decoder


def _plain(obs: Tree) -> Tree:
    """Mappings as dicts, tuples as tuples, everything else a leaf."""
    if isinstance(obs, Mapping):
        return {key: _plain(value) for key, value in obs.items()}
    return tuple(_plain(value) for value in obs) if isinstance(obs, tuple) else obs


def _to_numpy(leaf: Tensor) -> NDArray[Any]:
    return leaf.cpu().numpy()
