"""What a run is doing now, for whoever watches from outside."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Status:
    """RUN_DIR/status.json: what the run is doing now, overwritten in place. For whoever watches from outside."""

    def __init__(self, directory: Path) -> None:
        self._file = os.open(directory / "status.json", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        self._now: dict[str, Any] = {"pid": os.getpid(), "step": 0, "phase": "start", "saving": ""}
        self.update()

    def update(self, **changed: Any) -> None:
        """step; phase; saving: the part of a save that runs in the background, '' for none."""
        self._now |= changed
        os.pwrite(self._file, json.dumps(self._now).ljust(95).encode() + b"\n", 0)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
