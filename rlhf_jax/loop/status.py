"""What a run is doing now, for whoever watches from outside."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.storage.names import STATUS


class Status:
    """RUN_DIR/status.json: what the run is doing now, overwritten in place. For whoever watches from outside. Of several
    processes the first writes it."""

    def __init__(self, directory: Path) -> None:
        first, how = jax.process_index() == 0, os.O_CREAT | os.O_WRONLY | os.O_TRUNC
        self._file = os.open(directory / STATUS, how, 0o644) if first else None
        self._now: dict[str, Any] = {"pid": os.getpid(), "step": 0, "phase": "start", "saving": ""}
        self.update()

    def update(self, **changed: Any) -> None:
        """step; phase; saving: the part of a save that runs in the background, '' for none."""
        self._now |= changed
        if self._file is not None:
            os.pwrite(self._file, json.dumps(self._now).ljust(95).encode() + b"\n", 0)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
