"""gin at the root of a program: parsing, type checks, unused bindings, changes that are allowed on resume.

`config.surface` registers what a gin file may name; it is not imported here, because it imports nearly every package.
"""

from rlhf_jax.config.parsing import (
    BoundConfig,
    Change,
    bound_config,
    bound_reference,
    changes,
    fingerprint_bindings,
    key_to_bind,
    parse,
    scan,
)

__all__ = [
    "BoundConfig",
    "Change",
    "bound_config",
    "bound_reference",
    "changes",
    "fingerprint_bindings",
    "key_to_bind",
    "parse",
    "scan",
]
