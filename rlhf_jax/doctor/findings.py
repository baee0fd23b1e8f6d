"""Results of checks."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Finding:
    """verdict: 'ok', 'note' or 'WRONG'. words: what was seen and, when wrong, what to do."""

    verdict: str
    check: str
    words: str


def judge(check: str, good: bool, words: str, remedy: str = "") -> Finding:
    """Return a finding: 'ok', or 'WRONG' with the remedy."""
    return Finding("ok" if good else "WRONG", check, words if good else f"{words}: {remedy}")
