"""gin at the root of a program: parsing, type checks, bindings that nothing reads, what may change on resume.

`config.surface` registers what a gin file may name; it is not imported here, because it imports nearly every package.
"""

from rlhf_jax.config.parsing import (
    BoundConfig,
    Change,
    bound_config,
    bound_reference,
    changes,
    fingerprint_asked,
    parse,
    scan,
    settable,
)

__all__ = [
    "BoundConfig",
    "Change",
    "bound_config",
    "bound_reference",
    "changes",
    "fingerprint_asked",
    "parse",
    "scan",
    "settable",
]
