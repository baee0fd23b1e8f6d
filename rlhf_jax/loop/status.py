"""Current state of a run, for monitoring from outside."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.storage.names import STATUS


class Status:
    """RUN_DIR/status.json with the current step and phase, overwritten in place by the first process."""

    def __init__(self, directory: Path) -> None:
        first, mode = jax.process_index() == 0, os.O_CREAT | os.O_WRONLY | os.O_TRUNC
        self._file = os.open(directory / STATUS, mode, 0o644) if first else None
        self._fields: dict[str, Any] = {"pid": os.getpid(), "step": 0, "phase": "start", "saving": ""}
        self.update()

    def update(self, **fields: Any) -> None:
        """Update the fields: step; phase; saving (the part of a save that runs in the background, '' for none)."""
        self._fields |= fields
        if self._file is not None:
            os.pwrite(self._file, json.dumps(self._fields).ljust(95).encode() + b"\n", 0)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
