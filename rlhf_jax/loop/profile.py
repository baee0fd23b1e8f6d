"""--profile=10:12 writes a trace of steps 10 to 12 to RUN_DIR/profile, which TensorBoard and XProf open."""

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
    _tracing: bool = False

    @classmethod
    def asked(cls, directory: Path) -> Profile:
        """Return what --profile asks for. Raises InputError for another form than FIRST:LAST."""
        text = flags.FLAGS.profile if flags.FLAGS.is_parsed() and "profile" in flags.FLAGS else None
        if text is None:
            return cls(directory)
        match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
        first, last = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= first <= last:
            raise InputError(f"--profile={text}: give the first and the last step, for instance --profile=10:12")
        return cls(directory, first, last)

    def begin(self, start: int, total: int) -> None:
        """Say on stderr when no step of the window will run. start: the step that the run goes on from."""
        if self.first and (self.first <= start or self.first > total) and jax.process_index() == 0:
            words = "is done already" if self.first <= start else f"comes after the last step, {total}"
            print(f"--profile: step {self.first} {words}; nothing is traced", file=sys.stderr)

    def before(self, step: int) -> None:
        """Start the trace when ``step`` is the first of the window."""
        if step == self.first:
            jax.profiler.start_trace(str(self.directory / PROFILE))
            self._tracing = True

    def after(self, step: int) -> None:
        """End the trace when ``step`` is the last of the window."""
        if step >= self.last:
            self.end()

    def end(self) -> None:
        """End a trace that is under way; whatever ends the loop calls it."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            if jax.process_index() == 0:
                print(f"profile of steps {self.first} to {self.last}: {self.directory / PROFILE}", file=sys.stderr)
