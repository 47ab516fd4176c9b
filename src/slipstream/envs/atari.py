"""Atari 2600 games on ALE's native vector environment: one per lane, stepped by its own C++ threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import gymnasium
import numpy as np
from ale_py.vector_env import AtariVectorEnv
from numpy.typing import NDArray

from slipstream import dice
from slipstream.envs.options import AtariProtocol
from slipstream.envs.receivers import Receivers
from slipstream.envs.slot import check_lanes, random_start
from slipstream.envs.spaces import Actions
from slipstream.history import History
from slipstream.types import BoolArray, EnvSpec, EnvStep

SEED_EVERY = 8192
"""Rows after which a slot's next reset takes a seed of its own: it costs as much as some 200 steps."""

Moves = list[int]
"""Actions of one slot, one after the other."""

_Answer = tuple[NDArray[np.uint8], NDArray[np.int32], BoolArray, BoolArray, dict[str, NDArray[np.int32]]]


class AtariEnvs:
    """`num_envs` games of one ROM, observations uint8 `[stack, size, size]`.

    A slot is seeded at its first reset of `SEED_EVERY` rows, by (seed, slot, number of such resets): seeding reloads
    the ROM, which takes as long as many steps. Episodes between go on with the emulator's own random numbers for no-ops
    and sticky actions, which no other slot and no thread touches, so the number of threads does not change one bit.

    `send` returns at once; the threads of the lane step meanwhile. `recv` waits for all slots of the lane without
    holding the GIL.

    Args:
        id: What the user typed.
        game: ROM name in snake case (`ms_pacman`).
        protocol: Every choice of the experiment.
        num_envs: Slots.
        lanes: Lanes; divides `num_envs`.
        threads: Native threads per lane; 0 lets ALE choose (one per slot, at most one per core).
        decorrelate_steps: As in `EnvOptions`.
        first_slot: Slot of column 0.
        played: Called after every row of actions that brings slots back, as a sign of life.
    """

    def __init__(
        self,
        id: str,
        game: str,
        protocol: AtariProtocol,
        num_envs: int,
        lanes: int = 1,
        threads: int = 0,
        decorrelate_steps: int = 0,
        first_slot: int = 0,
        played: Callable[[], object] = bool,
    ) -> None:
        size = num_envs // check_lanes(num_envs, lanes)
        starts = range(first_slot, first_slot + num_envs, size)
        self._lanes = [_Lane(_make(game, protocol, size, threads), protocol, start) for start in starts]
        self._receivers = Receivers(self._lanes)
        self._decorrelate_steps, self._played = decorrelate_steps, played
        env = self._lanes[0].env
        self._spec = EnvSpec(
            id=id,
            observation_space=env.single_observation_space,
            action_space=env.single_action_space,
            num_envs=num_envs,
            lanes=lanes,
            frames_per_step=protocol.frame_skip,
            family="atari",
            first_slot=first_slot,
            frame_stack=protocol.frame_stack,
            seeded_every=SEED_EVERY,
        )
        self._actions = Actions(env.single_action_space, size, id)

    @property
    def spec(self) -> EnvSpec:
        """Spaces, slots and lanes."""
        return self._spec

    def reset(self, seed: int) -> None:
        """Starts every slot from its own seed, a function of (seed, slot) only."""
        for number, lane in enumerate(self._lanes):
            self._receivers.settle(number)
            lane.reset(seed, self._random_starts(seed, self._spec.slots(number)))

    def restore(self, lane: int, seed: int, history: History) -> None:
        """Plays what every slot of `lane` has played since it was last seeded, all of them at once."""
        self._receivers.settle(lane)
        random = self._random_starts(seed, self._spec.slots(lane))
        self._lanes[lane].restore(seed, history, random, self._actions, self._played)

    def send(self, action: NDArray[np.int64], lane: int) -> None:
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
        """Waits for the answer to the lane's last `reset` or `send`; the arrays are fresh and stay untouched."""
        self._receivers.settle(lane)
        return self._lanes[lane].row()

    def _random_starts(self, seed: int, slots: Sequence[int]) -> list[Moves]:
        """The random steps of decorrelation, by slot."""
        starts = [random_start(seed, slot, self._decorrelate_steps) for slot in slots]
        return [[int(self._actions.sample(generator)) for _ in range(count)] for count, generator in starts]

    def close(self) -> None:
        """Ends the threads and frees the emulators; the second call does nothing."""
        self._receivers.close()
        for lane in self._lanes:
            lane.env.close()
        # The emulators are freed with the last reference: ALE's own close does nothing.
        self._lanes.clear()


class _Lane:
    """A vector environment and what telling game over from a lost life takes."""

    def __init__(self, env: AtariVectorEnv, protocol: AtariProtocol, first_slot: int) -> None:
        self.env = env
        self._life_loss = protocol.life_loss
        size = env.num_envs
        self._slots = range(first_slot, first_slot + size)
        self._lives = np.zeros(size, np.int32)
        self._seed = 0
        self._starts, self._age = np.zeros(size, np.int64), np.zeros(size, np.int64)  # keyed ones; rows since the last
        self._step: EnvStep | None = None
        self.due = False

    def reset(self, seed: int, random: Sequence[Moves]) -> None:
        """Starts all slots, each after its own random moves."""
        self._seed = seed
        self._starts[:] = 0
        self._play(random, [[] for _ in random])
        self._age[:] = 0

    def restore(
        self, seed: int, history: History, random: Sequence[Moves], actions: Actions, played: Callable[[], object]
    ) -> None:
        """Brings all slots to where they were."""
        self._seed = seed
        self._starts = history.start.copy()
        self._play(
            [moves if start == 0 else [] for moves, start in zip(random, self._starts, strict=True)],
            [actions.encode_all(history.of(column)).tolist() for column in range(len(random))],
            played,
        )
        self._age = history.count.copy()

    def send(self, action: NDArray[np.int64]) -> None:
        self.env.send(action)
        self.due = True

    def settle(self) -> None:
        """Waits for the answer that is due, if one is."""
        if self.due:
            dead = self.row().ended
            self._step, self.due = self._receive(), False
            self._age += 1
            reseeded = dead & (self._age >= SEED_EVERY)
            if reseeded.any():
                self._starts += reseeded
                self._begin(reseeded)

    def row(self) -> EnvStep:
        """The newest answer that was taken."""
        assert self._step is not None, "recv before reset"
        return self._step

    def _receive(self) -> EnvStep:
        answer: _Answer = self.env.recv()
        obs, reward, game_over, truncated, info = answer
        lives = info["lives"]
        terminated = game_over
        if self._life_loss:
            # Counted here and not by ALE, whose own flag does not tell a lost life from game over.
            terminated = game_over | ((lives < self._lives) & (lives > 0))
        # The reset of a dead row brings all lives back, so the comparison never sees two episodes at once.
        self._lives = lives
        return EnvStep(obs, reward.astype(np.float32), terminated, truncated, game_over | truncated)

    def _begin(self, chosen: BoolArray) -> None:
        """Resets some slots from the seeds of their present starts; the others stay as they are."""
        pairs = zip(self._slots, self._starts, strict=True)
        seeds = np.array([dice.env_seed(self._seed, "env", slot, int(start)) for slot, start in pairs], np.int64)
        obs, info = self.env.reset(seed=seeds[chosen], options=None if chosen.all() else {"reset_mask": chosen})
        self._age[chosen] = 0
        self._show(chosen, obs, info["lives"])

    def _show(self, chosen: BoolArray, obs: NDArray[np.uint8], lives: NDArray[np.int32]) -> None:
        """Makes the rows of some slots first ones, without a reward or an end; the others stay as they are."""
        self._lives = lives
        if self._step is None:
            none = np.zeros(len(self._slots), np.bool_)
            self._step = EnvStep(obs, np.zeros(len(none), np.float32), none, none.copy(), none.copy())
            return
        _, reward, terminated, truncated, ended, *_ = self._step
        reward = np.where(chosen, np.float32(0.0), reward)
        self._step = EnvStep(obs, reward, terminated & ~chosen, truncated & ~chosen, ended & ~chosen)

    def _play(self, random: Sequence[Moves], actions: Sequence[Moves], played: Callable[[], object] = bool) -> None:
        """Begins every slot so that all have made their moves at the same time, the row that shows it being the newest.

        What a slot shows after its random moves is its first row: a game that ended with the last of them is reset
        without a dead row. The emulators are only ever stepped together: one that has to wait for its beginning plays
        anything.
        """
        moves = [[*some, *more] for some, more in zip(random, actions, strict=True)]
        left, own = (np.array([len(some) for some in each]) for each in (moves, actions))
        if left.min() < left.max():
            self.env.reset()  # ALE wants a full reset before a partial one; nothing of it is left below
        self._step = None
        for togo in range(int(left.max()), -1, -1):
            due = left == togo
            if due.any():
                self._begin(due)
            if (own == togo).any():
                self._end_random(own == togo)
            if togo:
                self.env.send(np.array([some[-togo] if len(some) >= togo else 0 for some in moves], np.int64))
                self._step = self._receive()
                played()

    def _end_random(self, chosen: BoolArray) -> None:
        """Makes the rows of slots whose random moves are over first ones, which are alive."""
        step = self.row()
        obs, lives = step.obs, self._lives
        over = step.ended & chosen
        if over.any():
            obs, info = self.env.reset(options={"reset_mask": over})
            lives = info["lives"]
        self._show(chosen, obs, lives)


def atari_game(id: str) -> str | None:
    """The ROM behind `ALE/Pong-v5` or `PongNoFrameskip-v4`; None for any other id."""
    if not (id.startswith("ALE/") and id.endswith("-v5")) and not id.endswith("NoFrameskip-v4"):
        return None
    spec = gymnasium.registry.get(id)
    return None if spec is None or "ram" in str(spec.kwargs.get("obs_type")) else str(spec.kwargs["game"])


def _make(game: str, protocol: AtariProtocol, size: int, threads: int) -> AtariVectorEnv:
    return AtariVectorEnv(
        game,
        size,
        num_threads=threads,
        max_num_frames_per_episode=protocol.max_frames,
        repeat_action_probability=protocol.sticky_actions,
        full_action_space=protocol.full_action_set,
        img_height=protocol.screen_size,
        img_width=protocol.screen_size,
        grayscale=protocol.grayscale,
        stack_num=protocol.frame_stack,
        frameskip=protocol.frame_skip,
        maxpool=protocol.maxpool,
        noop_max=protocol.noop_max,
        life_loss_info=False,
        reward_clipping=False,
        use_fire_reset=protocol.fire_on_reset,
    )
