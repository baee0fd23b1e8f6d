"""What makes a record unusable."""

from __future__ import annotations

from rlhf_jax.types import InputError


class UnusableRecord(InputError):
    """A record that cannot be encoded, raised where its id is not known. reason: what to count it under."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason
