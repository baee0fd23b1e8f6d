"""The training loop around an algorithm: opening, signals, watchdog, fault injection, bad steps, progress."""

from rlhf_jax.loop.loop_config import LoopConfig, due
from rlhf_jax.loop.opening import Job, open_job, open_run
from rlhf_jax.loop.run import Run

__all__ = ["Job", "LoopConfig", "Run", "due", "open_job", "open_run"]
