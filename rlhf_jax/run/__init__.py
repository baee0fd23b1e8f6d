"""What every program of this package needs around its algorithm: configuration, run directory, checkpoints, metrics.

``configurables`` is not imported here: it imports every room. Experiments import it themselves.
"""

from rlhf_jax.run.checkpoint import Checkpoints, fingerprint
from rlhf_jax.run.child import STOPPED, run_child
from rlhf_jax.run.config import (
    BoundConfig,
    Change,
    bound_config,
    changes,
    fingerprint_asked,
    parse,
    scan,
    settable,
)
from rlhf_jax.run.launching import launch
from rlhf_jax.run.loop import Run
from rlhf_jax.run.loop_config import LoopConfig, due
from rlhf_jax.run.opening import open_run
from rlhf_jax.run.provenance import Input, fingerprint_path, lineage, read_provenance
from rlhf_jax.run.resume import lock, make_directory
from rlhf_jax.run.tracking import Tracker, fetch

__all__ = [
    "STOPPED",
    "BoundConfig",
    "Change",
    "Checkpoints",
    "Input",
    "LoopConfig",
    "Run",
    "Tracker",
    "bound_config",
    "changes",
    "due",
    "fetch",
    "fingerprint",
    "fingerprint_asked",
    "fingerprint_path",
    "launch",
    "lineage",
    "lock",
    "make_directory",
    "open_run",
    "parse",
    "read_provenance",
    "run_child",
    "scan",
    "settable",
]
