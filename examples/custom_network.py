"""Train with a network of your own: an `nn.Module` from observations `[N, *O]` to features `[N, F]`.

python examples/custom_network.py
"""

import torch
from torch import Tensor, nn

import slipstream


class Fourier(nn.Module):
    """Learned Fourier features of the observation, then one layer: `[N, 4]` to `[N, 64]`.

    The heads of policy and value (and a recurrent core, if `net.core` asks for one) are put on top by the library.
    """

    def __init__(self) -> None:
        super().__init__()
        self.frequencies = nn.Linear(4, 32)
        self.mix = nn.Linear(64, 64)

    def forward(self, obs: Tensor) -> Tensor:
        phase = self.frequencies(obs)
        return torch.tanh(self.mix(torch.cat([phase.sin(), phase.cos()], dim=1)))


def main() -> None:
    torch.manual_seed(1)  # a torso's initial weights are yours, and so is their seed
    agent = slipstream.train(
        "ppo", env="CartPole-v1", total_steps=15_000, seed=1, torso=Fourier(), config={"algo.lr": 1e-3}, quiet=True
    )
    trained = agent.evaluate(episodes=20).reward.mean
    print(f"mean return of 20 episodes: {trained:.0f}")
    # The weights are in the run, the module's code is not: give a module of the same shape to load them into.
    again = slipstream.load(agent.run, torso=Fourier())
    assert again.evaluate(episodes=20).reward.mean == trained, "the same agent and the same seeds: the same episodes"

    try:
        slipstream.train("ppo", env="Acrobot-v1", torso=Fourier(), quiet=True)
    except ValueError as error:
        print(f"checked before the first step: {error}")


if __name__ == "__main__":
    main()
