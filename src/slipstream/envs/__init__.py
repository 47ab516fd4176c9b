"""Environments behind one protocol with lanes; see `slipstream.types.Envs`."""

from slipstream.envs.make import list_envs, make_envs
from slipstream.envs.options import AtariOptions, EnvOptions
from slipstream.envs.rows import EnvError

__all__ = ["AtariOptions", "EnvError", "EnvOptions", "list_envs", "make_envs"]
