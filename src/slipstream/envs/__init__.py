"""Environments behind one protocol with lanes; see `slipstream.types.Envs`."""

from slipstream.envs.check import Finding, check_env
from slipstream.envs.make import list_envs, make_envs
from slipstream.envs.options import AtariOptions, EnvOptions
from slipstream.envs.rows import EnvError

__all__ = ["AtariOptions", "EnvError", "EnvOptions", "Finding", "check_env", "list_envs", "make_envs"]
