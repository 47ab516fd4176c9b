"""PPO as CleanRL's single file for Atari with EnvPool does it, since CleanRL can't be installed or imported.

The same structure, hyperparameters and costs, in our own words: 8 environments x 128 rows, 4 epochs of 4 minibatches,
one forward per environment step, torch's own threads, frames on the CPU as uint8. For CartPole the same with Gymnasium's
vector environment, 4 environments and an MLP. One JSON line.
"""

import argparse

import torch
from meter import Meter
from torch import nn
from torch.distributions import Categorical


def layer(module, gain=2**0.5):
    nn.init.orthogonal_(module.weight, gain)
    nn.init.zeros_(module.bias)
    return module


class Pixels(nn.Module):
    def __init__(self, actions):
        super().__init__()
        self.torso = nn.Sequential(
            layer(nn.Conv2d(4, 32, 8, 4)), nn.ReLU(),
            layer(nn.Conv2d(32, 64, 4, 2)), nn.ReLU(),
            layer(nn.Conv2d(64, 64, 3, 1)), nn.ReLU(), nn.Flatten(),
            layer(nn.Linear(3136, 512)), nn.ReLU(),
        )  # fmt: skip
        self.actor, self.critic = layer(nn.Linear(512, actions), 0.01), layer(nn.Linear(512, 1), 1.0)

    def forward(self, obs):
        features = self.torso(obs / 255.0)
        return self.actor(features), self.critic(features).squeeze(-1)


class Vectors(nn.Module):
    def __init__(self, inputs, actions):
        super().__init__()
        self.actor, self.critic = self._tower(inputs, actions, 0.01), self._tower(inputs, 1, 1.0)

    @staticmethod
    def _tower(inputs, outputs, gain):
        hidden = [layer(nn.Linear(inputs, 64)), nn.Tanh(), layer(nn.Linear(64, 64)), nn.Tanh()]
        return nn.Sequential(*hidden, layer(nn.Linear(64, outputs), gain))

    def forward(self, obs):
        return self.actor(obs), self.critic(obs).squeeze(-1)


def environments(name, count, seed):
    if name.startswith("CartPole"):
        import gymnasium

        envs = gymnasium.make_vec(name, count, vectorization_mode="sync")
        obs, _ = envs.reset(seed=seed)
        return envs, obs, 4, 2
    import envpool

    envs = envpool.make(name, env_type="gymnasium", num_envs=count, episodic_life=True, reward_clip=True, seed=seed)
    obs, _ = envs.reset()
    return envs, obs, obs.shape[1:], envs.action_space.n


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--env", default="Pong-v5")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--warmup", type=float, default=10)
    parser.add_argument("--envs", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    cartpole = args.env.startswith("CartPole")
    count, rows, parts = args.envs or (4 if cartpole else 8), 128, 4
    torch.manual_seed(args.seed)
    envs, first, inputs, actions = environments(args.env, count, args.seed)
    model = Vectors(inputs, actions) if cartpole else Pixels(actions)
    optimizer = torch.optim.Adam(model.parameters(), lr=2.5e-4, eps=1e-5)
    meter = Meter("cleanrl", "ppo", args.seconds, args.warmup, settings={"env": args.env, "envs": count, "rows": rows})

    obs = torch.zeros(rows, count, *first.shape[1:])
    action = torch.zeros(rows, count, dtype=torch.long)
    log_prob, reward, done, value = (torch.zeros(rows, count) for _ in range(4))
    now, over, steps = torch.as_tensor(first, dtype=torch.float32), torch.zeros(count), 0
    batch, size = rows * count, rows * count // parts
    while True:
        for t in range(rows):
            obs[t], done[t] = now, over
            with torch.no_grad():
                logits, value[t] = model(now)
                policy = Categorical(logits=logits)
                action[t] = policy.sample()
                log_prob[t] = policy.log_prob(action[t])
            seen, earned, terminated, truncated, _ = envs.step(action[t].numpy())
            now, reward[t] = torch.as_tensor(seen, dtype=torch.float32), torch.as_tensor(earned, dtype=torch.float32)
            over = torch.as_tensor(terminated | truncated, dtype=torch.float32)
            steps += count
            meter.first_k(steps)
        with torch.no_grad():
            following = model(now)[1]
        advantage, last = torch.zeros(rows, count), torch.zeros(count)
        for t in reversed(range(rows)):
            alive = 1.0 - (over if t == rows - 1 else done[t + 1])
            delta = reward[t] + 0.99 * (following if t == rows - 1 else value[t + 1]) * alive - value[t]
            advantage[t] = last = delta + 0.99 * 0.95 * alive * last
        flat = [leaf.flatten(0, 1) for leaf in (obs, action, log_prob, advantage, advantage + value, value)]
        for _ in range(args.epochs):
            order = torch.randperm(batch)
            for part in order.split(size):
                o, a, old, adv, target, before = (leaf[part] for leaf in flat)
                logits, v = model(o)
                policy = Categorical(logits=logits)
                ratio = (policy.log_prob(a) - old).exp()
                adv = (adv - adv.mean()) / (adv.std() + 1e-8)
                surrogate = torch.max(-adv * ratio, -adv * ratio.clamp(0.9, 1.1)).mean()
                clipped = before + (v - before).clamp(-0.1, 0.1)
                value_loss = 0.5 * torch.max((v - target) ** 2, (clipped - target) ** 2).mean()
                loss = surrogate - 0.01 * policy.entropy().mean() + 0.5 * value_loss
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
        if meter.tick(steps):
            break
    meter.finish()


if __name__ == "__main__":
    main()
