"""Atari 2600 games on ALE's native vector environment: one per lane, stepped by its own C++ threads."""

from __future__ import annotations

from collections.abc import Sequence

import gymnasium
import numpy as np
from ale_py.vector_env import AtariVectorEnv
from numpy.typing import NDArray

from slipstream import dice
from slipstream.envs.options import AtariProtocol
from slipstream.envs.receivers import Receivers
from slipstream.envs.slot import check_lanes, random_start
from slipstream.envs.spaces import Actions
from slipstream.types import BoolArray, EnvSpec, EnvStep

_Answer = tuple[NDArray[np.uint8], NDArray[np.int32], BoolArray, BoolArray, dict[str, NDArray[np.int32]]]


class AtariEnvs:
    """`num_envs` games of one ROM, observations uint8 `[stack, size, size]`.

    A slot is seeded once, by (seed, slot): seeding reloads the ROM, which costs some 40 ms. Later episodes go on with
    the emulator's own random numbers for no-ops and sticky actions, which no other slot and no thread touches, so the
    number of threads does not change one bit.

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
    ) -> None:
        size = num_envs // check_lanes(num_envs, lanes)
        starts = range(first_slot, first_slot + num_envs, size)
        self._lanes = [_Lane(_make(game, protocol, size, threads), protocol, start) for start in starts]
        self._receivers = Receivers(self._lanes)
        self._decorrelate_steps = decorrelate_steps
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
            if self._decorrelate_steps:
                lane.decorrelate(seed, self._decorrelate_steps, self._actions)
            else:
                lane.reset(seed)

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
        self._slots = range(first_slot, first_slot + env.num_envs)
        self._lives = np.zeros(env.num_envs, np.int32)
        self._step: EnvStep | None = None
        self.due = False

    def reset(self, seed: int) -> None:
        obs, info = self.env.reset(seed=self._seeds(seed))
        self._start(obs, info)

    def send(self, action: NDArray[np.int64]) -> None:
        self.env.send(action)
        self.due = True

    def settle(self) -> None:
        """Waits for the answer that is due, if one is."""
        if self.due:
            self._step, self.due = self._receive(), False

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

    def decorrelate(self, seed: int, most: int, actions: Actions) -> None:
        """Resets the slots one after the other, so that each has played its own number of random steps at the end."""
        starts = [random_start(seed, slot, most) for slot in self._slots]
        steps = np.array([count for count, _ in starts])
        seeds = self._seeds(seed)
        obs, info = self.env.reset()  # ALE wants a full reset before a partial one; nothing of it is left below
        over = np.zeros(len(starts), np.bool_)
        for left in range(int(steps.max()), -1, -1):
            due = steps == left
            if due.any():
                obs, info = self.env.reset(seed=seeds[due], options={"reset_mask": due})
                over &= ~due
            if left:
                playing = zip(starts, steps >= left, strict=True)
                drawn = [int(actions.sample(generator)) if on else 0 for (_, generator), on in playing]
                obs, _, terminated, truncated, info = self.env.step(np.array(drawn, np.int64))
                over = terminated | truncated
        if over.any():
            obs, info = self.env.reset(options={"reset_mask": over})
        self._start(obs, info)

    def _seeds(self, seed: int) -> NDArray[np.int64]:
        return np.array([dice.env_seed(seed, "env", slot) for slot in self._slots], np.int64)

    def _start(self, obs: NDArray[np.uint8], info: dict[str, NDArray[np.int32]]) -> None:
        self._lives = info["lives"]
        none = np.zeros(len(self._slots), np.bool_)
        self._step = EnvStep(obs, np.zeros(len(self._slots), np.float32), none, none.copy(), none.copy())


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
