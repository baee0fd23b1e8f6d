"""Configuration of the training loop: intervals, checkpoints to keep, bad steps, deadlines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_jax.errors import InputError
from rlhf_jax.loop.bad_steps import POLICIES
from rlhf_jax.loop.faults import PHASES, SAVING, Fault


@dataclass(frozen=True)
class LoopConfig:
    """Settings of the training loop. Intervals are in steps.

    save_every, log_every: >= 1.
    keep: the number of newest checkpoints to keep, >= 1.
    keep_best, best_metric, best: also keep this many checkpoints with the "lowest" or "highest" value of a metric in
        metrics.jsonl, measured at the saved step.
    evaluate_every: 0 for never.
    tensorboard: also write event files.
    progress: show a bar or lines on stderr.
    on_bad_step: after a metric that is not finite or a skipped update: "stop" the run, "skip" its batch, or "rollback" to
        the newest checkpoint (skip and rollback wait for the metrics of every step).
    bad_steps: the maximum number of skips or rollbacks in a run.
    deadlines: (phase, seconds), 'step' for the whole step; a hang ends the run with exit code 4 (the first step compiles).
    stop_within: seconds from a signal until the run ends, saved or not.
    faults: to inject, for tests.
    """

    save_every: int = 100
    keep: int = 3
    keep_best: int = 0
    best_metric: str = ""
    best: Literal["lowest", "highest"] = "lowest"
    log_every: int = 1
    evaluate_every: int = 0
    tensorboard: bool = True
    progress: bool = True
    on_bad_step: Literal["stop", "skip", "rollback"] = "stop"
    bad_steps: int = 10
    deadlines: Sequence[tuple[str, float]] = ()
    stop_within: float = 600.0
    faults: Sequence[Fault] = ()

    def __post_init__(self) -> None:
        counts = {"save_every": 1, "keep": 1, "keep_best": 0, "log_every": 1, "evaluate_every": 0, "bad_steps": 0}
        for name, least in counts.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"LoopConfig.{name}: must be a whole number >= {least}, got {value!r}")
        for name in ("tensorboard", "progress"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"LoopConfig.{name}: must be True or False, got {getattr(self, name)!r}")
        for name, allowed in {"on_bad_step": POLICIES, "best": ("lowest", "highest")}.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"LoopConfig.{name}: must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if bool(self.keep_best) != bool(self.best_metric):
            raise InputError(
                "LoopConfig.keep_best, LoopConfig.best_metric: one says how many, the other by what; give both"
            )
        if not self.stop_within > 0:
            raise InputError(f"LoopConfig.stop_within: must be seconds > 0, got {self.stop_within!r}")
        for phase, seconds in self.deadlines:
            if not seconds > 0:
                raise InputError(f"LoopConfig.deadlines: must be ('phase', seconds > 0), got {(phase, seconds)!r}")

    def check_phases(self, phases: Sequence[str]) -> None:
        """Check the phases that deadlines and faults name. phases: those of the algorithm.

        Raises InputError for a phase that the run does not have.
        """
        valid_phases = (*phases, *PHASES)
        for phase, _ in self.deadlines:
            if phase not in ("step", *valid_phases):
                raise InputError(
                    f"LoopConfig.deadlines: no phase {phase!r}; use one of step, {', '.join(valid_phases)}"
                )
        for fault in self.faults:
            if fault.point not in (*valid_phases, *SAVING):
                raise InputError(f"Fault.point = {fault.point!r}: one of {', '.join((*valid_phases, *SAVING))}")


def due(step: int, every: int, total: int) -> bool:
    """Return whether an action that runs every ``every`` steps (0: never) and at the last one runs at ``step``."""
    return every > 0 and (step % every == 0 or step == total)
