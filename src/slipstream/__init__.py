"""Slipstream: fast parallel deep reinforcement learning.

    agent = slipstream.train("ppo", env="CartPole-v1", total_steps=2e5)
    action, state = agent.predict(obs)

The same from a shell: `slipstream train ppo --env CartPole-v1 --total-steps 2e5`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slipstream.run.agent import Agent, load, resume, train

__all__ = ["Agent", "load", "resume", "train"]


def __getattr__(name: str) -> Any:
    """Imports the public names at their first use: worker processes import this package and need none of them."""
    if name not in __all__:
        raise AttributeError(f"module 'slipstream' has no attribute {name!r}")
    from slipstream.run import agent

    return getattr(agent, name)


def __dir__() -> list[str]:
    """The public names, so that completion finds them before their first use."""
    return __all__
