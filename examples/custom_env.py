"""Train on an environment of your own: any callable that makes a `gymnasium.Env`, no registration needed.

python examples/custom_env.py
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

import slipstream
from slipstream.envs import check_env


class Thermostat(gymnasium.Env[np.ndarray, np.ndarray]):
    """Hold a room at 20 degrees with a heater whose effect comes late.

    Observation float32 `[3]`: room, heater and outside temperature in degrees. Action float32 `[1]`: heating in
    [0, 1]. Reward: minus the distance from 20 degrees, a tenth of it. Truncated after 50 steps.
    """

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-50.0, 120.0, (3,), np.float32)
        self.action_space = spaces.Box(0.0, 1.0, (1,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)  # seeds self.np_random, the only randomness to use
        self.outside = float(self.np_random.uniform(-10.0, 15.0))
        self.room = self.heater = float(self.np_random.uniform(5.0, 25.0))
        self.steps = 0
        return self._obs(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.heater += 0.3 * (20.0 + 60.0 * float(action[0]) - self.heater)
        self.room += 0.2 * (self.heater - self.room) + 0.2 * (self.outside - self.room)
        self.steps += 1
        return self._obs(), -0.1 * abs(self.room - 20.0), False, self.steps == 50, {}

    def _obs(self) -> np.ndarray:
        return np.array([self.room, self.heater, self.outside], np.float32)


def main() -> None:
    for finding in check_env(Thermostat):  # what would go wrong in training, before it does
        print(finding)
    agent = slipstream.train(
        "ppo",
        env=Thermostat,
        total_steps=30_000,
        seed=1,
        config={"net.normalize_obs": True, "reward": "scale", "algo.lr": 1e-3, "algo.gamma": 0.95, "algo.epochs": 10},
        quiet=True,
    )
    trained = agent.evaluate(episodes=20).reward.mean
    print(f"mean return of 20 episodes: {trained:.1f}, that is {-trained / 50 * 10:.1f} degrees off on average")
    # A run on a callable is loaded with the callable, since a file can't hold it.
    again = slipstream.load(agent.run, env=Thermostat)
    assert again.evaluate(episodes=20).reward.mean == trained, "the same agent and the same seeds: the same episodes"


if __name__ == "__main__":
    main()
