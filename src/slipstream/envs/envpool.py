"""EnvPool's families on its native threads, typed as `envpool:ID`; the only file that imports envpool."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
import warnings
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from slipstream import dice, tree
from slipstream.envs import spaces
from slipstream.envs.ids import unknown_id
from slipstream.envs.options import AtariProtocol, EnvOptions, NonFinite
from slipstream.envs.receivers import Receivers
from slipstream.envs.rows import EnvError, RowCheck, require_single_resets
from slipstream.envs.slot import check_lanes, random_start
from slipstream.envs.spaces import Actions
from slipstream.history import History
from slipstream.ops.spaces import space_tree
from slipstream.tree import Tree
from slipstream.types import BoolArray, EnvSpec, EnvStep

_log = logging.getLogger(__name__)

PREFIX = "envpool:"
_OURS = frozenset({"num_envs", "batch_size", "num_threads", "seed", "env_seed", "max_num_players", "base_path"})
_FAMILIES = {
    "envpool.atari": "atari",
    "envpool.gfootball": "gfootball",
    "envpool.mujoco": "mujoco",
    "envpool.classic_control": "classic",
    "envpool.box2d": "box2d",
    "envpool.toy_text": "toy",
}


class EnvPoolEnvs:
    """`num_envs` environments of one EnvPool id, one pool per lane; EnvPool's NEXT_STEP autoreset is the rule itself.

    Seeds are fixed when a pool is made, one per slot, a function of (seed, slot). A pool is therefore made by `reset`,
    and a further `reset` makes a new one. EnvPool does not give all memory of a closed pool back (about 51 MB per
    Google Research Football environment): reset such environments rarely.

    `send` returns at once; the pool's threads step meanwhile. The number of threads does not change one bit.

    Args:
        id: `envpool:ID`.
        num_envs: Slots.
        lanes: Lanes; divides `num_envs`.
        options: Choices. For Atari games `options.atari` counts; at least one no-op frame is played at the start
            (`noop_max` in `[1, noop_max]` here) and frames are always max-pooled.
        threads: Native threads per lane; 0 lets EnvPool choose (one per slot, at most one per core).
        first_slot: Slot of column 0.

    Raises:
        ImportError: EnvPool is not installed.
        ValueError: An unknown id or option, an unsupported space, or lanes that don't divide `num_envs`.
    """

    def __init__(
        self, id: str, num_envs: int, lanes: int, options: EnvOptions, threads: int = 0, first_slot: int = 0
    ) -> None:
        require_single_resets(id, options)
        task = id.removeprefix(PREFIX)
        size = num_envs // check_lanes(num_envs, lanes)
        family = envpool_family(id)
        protocol = options.atari.spelled_out() if family == "atari" else None
        config = {**_config(id, options, protocol), "num_envs": size, "num_threads": threads}
        observation_space, action_space = _spaces(id, task, config)
        spaces.check_observation_space(observation_space, id)
        self._spec = EnvSpec(
            id=id,
            observation_space=observation_space,
            action_space=spaces.policy_action_space(action_space),
            num_envs=num_envs,
            lanes=lanes,
            frames_per_step=protocol.frame_skip if protocol else 1,
            family=family,
            first_slot=first_slot,
            frame_stack=protocol.frame_stack if protocol else 1,
        )
        self._actions = Actions(action_space, size, id)
        self._life_loss = protocol is not None and protocol.life_loss
        self._non_finite: NonFinite = options.non_finite
        self._task, self._config, self._decorrelate_steps = task, config, options.decorrelate_steps
        self._lanes: list[_Lane] = []
        self._receivers = Receivers(self._lanes)

    @property
    def spec(self) -> EnvSpec:
        """Spaces, slots and lanes."""
        return self._spec

    def reset(self, seed: int) -> None:
        """Makes pools whose slots are seeded by (seed, slot) and starts them."""
        self.close()
        for lane in range(self._spec.lanes):
            slots = self._spec.slots(lane)
            seeds = [dice.env_seed(seed, "env", slot) for slot in slots]
            pool = _make(self._task, {**self._config, "seed": seeds})
            self._lanes.append(_Lane(pool, self._spec, self._actions, slots.start, self._life_loss, self._non_finite))
        for lane in self._lanes:
            lane.start(seed, self._decorrelate_steps)

    def restore(self, lane: int, seed: int, history: History) -> None:
        """Not possible: episodes after a slot's first have no seeds of their own."""
        raise NotImplementedError(f"{self._spec.id} can't be brought back to where it was")

    def send(self, action: NDArray[Any], lane: int) -> None:
        """Hands the actions of `lane` to its threads.

        Raises:
            ValueError: Actions of the wrong shape, dtype or range.
        """
        self._receivers.settle(lane)
        self._lanes[lane].send(self._actions.encode(action))

    def wait(self, lanes: Sequence[int]) -> list[int]:
        """Waits until at least one of `lanes` has answered, in a thread per lane that blocks in the native wait."""
        return self._receivers.wait(lanes)

    def recv(self, lane: int) -> EnvStep:
        """Waits for the answer to the lane's last `reset` or `send`; the arrays are fresh and stay untouched.

        Raises:
            EnvError: A reward or observation is not finite or not as the spaces promise.
        """
        self._receivers.settle(lane)
        return self._lanes[lane].row()

    def close(self) -> None:
        """Ends the pools; may be called twice."""
        self._receivers.close()
        for lane in self._lanes:
            lane.pool.close()
        self._lanes.clear()


class _Lane:
    """A pool, and what bringing its answers to an `EnvStep` takes."""

    def __init__(
        self, pool: Any, spec: EnvSpec, actions: Actions, first_slot: int, life_loss: bool, non_finite: NonFinite
    ) -> None:
        self.pool = pool
        self._spec, self._actions, self._first_slot, self._life_loss = spec, actions, first_slot, life_loss
        self._check = RowCheck(actions, spec.observation_space, first_slot, non_finite)
        self._spaces = space_tree(spec.observation_space)
        self._lives = np.zeros(spec.lane_size, np.int32)
        self._count, self.due = 0, False
        self._step: EnvStep | None = None

    def start(self, seed: int, decorrelate_steps: int) -> None:
        obs, info = self.pool.reset()
        if decorrelate_steps:
            obs, info = self._decorrelate(seed, decorrelate_steps, obs, info)
        if self._life_loss:
            self._lives = info["lives"]
        none = np.zeros(self._spec.lane_size, np.bool_)
        row = EnvStep(self._convert(obs), np.zeros(len(none), np.float32), none, none.copy(), none.copy())
        self._step = self._check(row, 0)

    def send(self, action: NDArray[Any]) -> None:
        self.pool.send(action)
        self._count, self.due = self._count + 1, True

    def settle(self) -> None:
        """Waits for the answer that is due, if one is."""
        if self.due:
            self._step, self.due = self._receive(), False

    def row(self) -> EnvStep:
        """The newest answer that was taken."""
        assert self._step is not None
        return self._step

    def _receive(self) -> EnvStep:
        answer: tuple[Tree, NDArray[np.float32], BoolArray, BoolArray, dict[str, Any]] = self.pool.recv()
        obs, reward, over, truncated, info = answer
        terminated = over
        if self._life_loss:
            lives = info["lives"]
            terminated = over | ((lives < self._lives) & (lives > 0))
            self._lives = lives
        reward = reward.astype(np.float32, copy=False)
        return self._check(EnvStep(self._convert(obs), reward, terminated, truncated, over | truncated), self._count)

    def _decorrelate(self, seed: int, most: int, obs: Tree, info: Any) -> tuple[Tree, Any]:
        """Steps every slot its own number of random steps; a slot whose episode ended is reset before it goes on."""
        actions, size = self._actions, self._spec.lane_size
        starts = [random_start(seed, self._first_slot + column, most) for column in range(size)]
        obs = tree.map(np.copy, obs)
        lives = info["lives"].copy() if self._life_loss else None
        for t in range(max(count for count, _ in starts)):
            playing = np.array([column for column, (count, _) in enumerate(starts) if t < count], np.int32)
            drawn = [actions.sample(starts[column][1]) for column in playing]
            blank = np.zeros(actions.shape, actions.dtype if actions.dtype.kind == "i" else np.float32)
            blank[playing] = np.stack(drawn)
            answer = self.pool.step(actions.encode(blank)[playing], playing)
            over = answer[2] | answer[3]
            self._put(obs, lives, playing, answer[0], answer[4])
            if over.any():
                reset_obs, reset_info = self.pool.reset(playing[over])
                self._put(obs, lives, playing[over], reset_obs, reset_info)
        return obs, {"lives": lives}

    @staticmethod
    def _put(obs: Tree, lives: NDArray[np.int32] | None, columns: NDArray[np.int32], some: Tree, info: Any) -> None:
        def put(leaf: NDArray[Any], part: NDArray[Any]) -> None:
            leaf[columns] = part

        tree.map(put, obs, some)
        if lives is not None:
            lives[columns] = info["lives"]

    def _convert(self, obs: Tree) -> Tree:
        def convert(space: gymnasium.Space[Any], leaf: NDArray[Any]) -> NDArray[Any]:
            dtype, shape = spaces.leaf_dtype(space), (self._spec.lane_size, *spaces.leaf_shape(space))
            # EnvPool answers int32 where Gymnasium's Discrete says int64; float64 is narrowed as everywhere.
            widened = leaf.dtype.kind == dtype.kind == "i" or (leaf.dtype == np.float64 and dtype == np.float32)
            if leaf.shape != shape or not (leaf.dtype == dtype or widened):
                raise EnvError(
                    f"{self._spec.id}: expected observations {dtype} {list(shape)}, got {leaf.dtype} {list(leaf.shape)}"
                )
            return leaf.astype(dtype, copy=False)

        return tree.map(convert, self._spaces, obs)


def envpool_family(id: str) -> str:
    """The preset family of `envpool:ID`.

    Raises:
        ImportError: EnvPool is not installed.
        ValueError: EnvPool does not know the id; the nearest ones are named.
    """
    registered = _registry(id).specs
    task = id.removeprefix(PREFIX)
    if task not in registered:
        raise ValueError(unknown_id(id, [PREFIX + name for name in registered]))
    module = registered[task][0]
    return next((family for prefix, family in _FAMILIES.items() if module.startswith(prefix)), "other")


def list_envpool() -> list[str]:
    """All ids, or none where EnvPool is not installed."""
    if importlib.util.find_spec("envpool") is None:
        return []
    return sorted(PREFIX + name for name in _registry(PREFIX).specs)


def _registry(id: str) -> Any:
    if importlib.util.find_spec("envpool") is None:
        raise ImportError(f'{id} needs EnvPool: pip install "slipstream[envpool]"')
    importlib.import_module("envpool")
    return importlib.import_module("envpool.registration").registry


def _config(id: str, options: EnvOptions, protocol: AtariProtocol | None) -> dict[str, Any]:
    """EnvPool's arguments for our options."""
    if options.frame_stack != 1:
        raise ValueError(f"{id}: frame_stack is for Gymnasium environments; set the family's own option in kwargs")
    ours = _OURS & options.kwargs.keys()
    if ours:
        raise ValueError(f"{id}: env kwargs {sorted(ours)} are set by num_envs, lanes, threads and seed")
    config: dict[str, Any] = dict(options.kwargs)
    if options.max_episode_steps is not None:
        config["max_episode_steps"] = options.max_episode_steps
    if protocol is None:
        return config
    if not protocol.maxpool:
        raise ValueError(f"{id}: EnvPool always max-pools frames; atari.maxpool False needs ALE/...-v5")
    if protocol.noop_max == 0:
        _log.info("%s: EnvPool plays one no-op frame at the start where atari.noop_max is 0", id)
    limit = protocol.max_frames // protocol.frame_skip
    return {
        "max_episode_steps": limit,
        **config,
        "repeat_action_probability": protocol.sticky_actions,
        "noop_max": max(protocol.noop_max, 1),  # 0 crashes EnvPool 1.2
        "episodic_life": False,
        "reward_clip": False,
        "use_fire_reset": protocol.fire_on_reset,
        "frame_skip": protocol.frame_skip,
        "stack_num": protocol.frame_stack,
        "img_height": protocol.screen_size,
        "img_width": protocol.screen_size,
        "gray_scale": protocol.grayscale,
        "full_action_space": protocol.full_action_set,
    }


def _spaces(id: str, task: str, config: dict[str, Any]) -> tuple[gymnasium.Space[Any], gymnasium.Space[Any]]:
    """Spaces of one environment, without making a pool."""
    registry = _registry(id)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*precision lowered by casting", UserWarning)
        known = set(registry.make_spec(task)._config_keys)
        unknown = sorted(config.keys() - known)
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, n=3)
            raise ValueError(
                f"{id}: unknown env kwarg '{unknown[0]}'; it has {', '.join(near or sorted(known - _OURS))}"
            )
        spec = registry.make_spec(task, **config)
        return spec.gymnasium_observation_space, spec.gymnasium_action_space


def _make(task: str, config: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*precision lowered by casting", UserWarning)
        pool = _registry(task).make_gymnasium(task, **config)
        _ = pool.observation_space, pool.action_space  # made on first use, and it is then that they warn
        return pool
