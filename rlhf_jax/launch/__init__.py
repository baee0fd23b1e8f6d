"""Start of a program: entry point, flags, exit codes, child processes, checks of the bindings of later commands."""

from rlhf_jax.launch.child import STOPPED, run_child
from rlhf_jax.launch.launching import launch
from rlhf_jax.launch.modes import run_mode

__all__ = ["STOPPED", "launch", "run_child", "run_mode"]
