"""Profiler traces: --profile=10:12 writes a trace of steps 10 to 12 to RUN_DIR/profile, which TensorBoard and XProf open."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import jax
from absl import flags

from rlhf_jax.errors import InputError
from rlhf_jax.storage.names import PROFILE


@dataclasses.dataclass
class Profile:
    """A window of steps to trace. first, last: steps, both included; 0 for none. directory: of the run."""

    directory: Path
    first: int = 0
    last: int = 0
    _traced: list[int] = dataclasses.field(default_factory=list)
    _tracing: bool = False

    @classmethod
    def from_flags(cls, directory: Path) -> Profile:
        """Return the window that --profile sets. Raises InputError for another form than FIRST:LAST."""
        text = flags.FLAGS.profile if flags.FLAGS.is_parsed() and "profile" in flags.FLAGS else None
        if text is None:
            return cls(directory)
        match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
        first, last = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= first <= last:
            raise InputError(f"--profile={text}: give the first and the last step, for instance --profile=10:12")
        return cls(directory, first, last)

    def begin(self, start: int, total: int) -> None:
        """Print which steps of the window this run will not run. start: the step that the run resumes from."""
        if not self.first or jax.process_index() != 0:
            return
        if self.first <= start:
            print(f"--profile: step {self.first} is done already; nothing is traced", file=sys.stderr)
        elif self.first > total:
            print(
                f"--profile: step {self.first} comes after the last step, {total}; nothing is traced", file=sys.stderr
            )
        elif self.last > total:
            print(
                f"--profile: step {self.last} comes after the last step, {total}; the trace ends there", file=sys.stderr
            )

    def before(self, step: int) -> None:
        """Start the trace when ``step`` is the first of the window; a window that a rollback repeats is traced once."""
        if step == self.first and not self._traced:
            jax.profiler.start_trace(str(self.directory / PROFILE))
            self._tracing = True
        if self._tracing:
            self._traced.append(step)

    def after(self, step: int) -> None:
        """End the trace when ``step`` is the last of the window."""
        if step >= self.last:
            self.end()

    def end(self) -> None:
        """End a trace in progress; called whenever the loop ends."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            if jax.process_index() == 0:
                steps = f"{self._traced[0]} to {self._traced[-1]}"
                print(f"profile of steps {steps}: {self.directory / PROFILE}", file=sys.stderr)
