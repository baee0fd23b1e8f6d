"""A run directory: checkpoints, provenance, metrics files, what may be resumed, and its copy at a URL."""

from rlhf_jax.rundir.checkpoints import Checkpoints, fingerprint
from rlhf_jax.rundir.provenance import fingerprint_path, lineage, read_provenance
from rlhf_jax.rundir.resume import lock, make_directory
from rlhf_jax.rundir.tracking import Tracker, fetch

__all__ = [
    "Checkpoints",
    "Tracker",
    "fetch",
    "fingerprint",
    "fingerprint_path",
    "lineage",
    "lock",
    "make_directory",
    "read_provenance",
]
