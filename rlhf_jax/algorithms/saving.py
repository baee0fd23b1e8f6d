"""The interface of the open run that saves the state of a job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class SavingRun(Protocol):
    """An open run directory (`loop.Run`). resumed_step: the step of the checkpoint it goes on from, 0 for a fresh start."""

    @property
    def resumed_step(self) -> int: ...
    def restore(self, state: Any, host: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]: ...
    def rolled_back(self, state: Any) -> Any: ...
    def save(self, step: int, state: Any, host: Mapping[str, Any]) -> None: ...
