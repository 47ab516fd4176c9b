"""Train PPO on CartPole, evaluate it, load it again and act with it.

python examples/cartpole.py
"""

import gymnasium

import slipstream


def main() -> None:
    # The tuned preset of (ppo, CartPole-v1) with a smaller budget; `config` overrides any setting by its dotted name.
    agent = slipstream.train(
        "ppo", env="CartPole-v1", total_steps=15_000, seed=1, config={"log.metrics_every": 2_000}, quiet=True
    )
    result = agent.evaluate(episodes=20)
    print(f"trained for {agent.steps:,} steps; mean return of 20 episodes: {result.reward.mean:.0f}")

    # Another process would start here: the run directory is all it needs.
    loaded = slipstream.load(agent.run)
    env = gymnasium.make("CartPole-v1")
    obs, _ = env.reset(seed=7)
    steps, over = 0, False
    while not over:
        action, _ = loaded.predict(obs, deterministic=True)
        obs, _, terminated, truncated, _ = env.step(action)
        steps, over = steps + 1, terminated or truncated
    env.close()
    print(f"one episode with the most probable actions: {steps} steps")
    print(f"the run: {agent.run}")


if __name__ == "__main__":
    main()
