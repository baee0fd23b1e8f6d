"""What a run reads, as its provenance names it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Input:
    """Something a run reads. name: its role ('reward_model'). path: file, directory or run directory.

    fingerprint: what identifies the content; None: computed from ``path``, a local one or a URL. What is neither (a hub id)
    needs one from whoever loaded it, for instance the revision. step: of a run directory; None: the newest.
    """

    name: str
    path: str
    fingerprint: str | None = None
    step: int | None = None
