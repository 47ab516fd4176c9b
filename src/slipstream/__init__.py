"""Slipstream: fast parallel deep reinforcement learning."""
