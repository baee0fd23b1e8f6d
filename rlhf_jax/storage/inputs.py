"""Inputs of a run, for its provenance."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Input:
    """A file, directory or model that a run reads.

    name: its role ('reward_model'). path: file, directory or run directory.
    fingerprint: identifies the content; None: computed from ``path``, local or a URL. Other paths (a hub id) need one, for instance
    the revision. step: of a run directory; None: the newest.

    """

    name: str
    path: str
    fingerprint: str | None = None
    step: int | None = None
