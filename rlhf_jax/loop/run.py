"""Resume, logging, checkpointing and signals for every training loop; a script's loop holds only the algorithm.

    bound = bound_config()                                   # the first line of the program's run()
    with open_run(run_dir, stage="sft", bound=bound, seed=0, loop=loop, inputs=[Input("data", path)]) as run:
        state, host = run.restore(state, {"epoch": 0})       # the run's newest checkpoint, or the arguments
        for step in run.steps(run.resumed_step, total):      # resumed_step + 1 ... total
            batch = next(batches)
            state, metrics = train_step(state, frozen, batch)
            if not run.log(step, metrics, batch=batch):      # a bad step, and on_bad_step is "rollback"
                state = run.rolled_back(state)
                continue
            run.save(step, state, {"epoch": epoch})          # every save_every, at the end, on a signal

Opening and closing: `loop.opening`. Signals: `loop.signals`. Bad steps: `loop.bad_steps`. Hangs: `loop.watchdog`. Fault
injection: `loop.faults`.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.checkpoint_files.manifest import checkpoint_dir, latest_step
from rlhf_jax.config.renamed import renamed_metric
from rlhf_jax.errors import InputError, RunStopped
from rlhf_jax.loop import bad_steps
from rlhf_jax.loop.cold_start import report_first_step
from rlhf_jax.loop.faults import PHASES, Faults
from rlhf_jax.loop.loop_config import LoopConfig, due
from rlhf_jax.loop.profile import Profile
from rlhf_jax.loop.progress import Display
from rlhf_jax.loop.signals import Signals
from rlhf_jax.loop.status import Status
from rlhf_jax.loop.unchecked import Unchecked
from rlhf_jax.loop.watchdog import Watchdog
from rlhf_jax.parallel.distributed import broadcast_from_first
from rlhf_jax.rundir.checkpoints import Checkpoints
from rlhf_jax.rundir.tracking import Metrics, Tracker, fetch
from rlhf_jax.storage.files import write_atomically

OWN = "run"
"""The key of a checkpoint's host values for those of this module."""


@dataclass
class Run:
    """An open run directory.

    resumed_step: the step of the checkpoint that the run resumes, 0 for a fresh start.
    phases: the phases of a step that the algorithm names. overview: a line to print after the first step.
    """

    directory: Path
    stage: str
    loop: LoopConfig
    resumed_step: int
    tracker: Tracker
    checkpoints: Checkpoints
    signals: Signals
    watchdog: Watchdog
    faults: Faults
    status: Status
    profile: Profile
    phases: tuple[str, ...] = ("train",)
    overview: str = ""
    total: int = 0
    bad: list[int] = field(default_factory=list)
    _step: int = 0
    _phase: tuple[str, float] = ("", 0.0)
    _seconds: dict[str, float] = field(default_factory=dict)
    _stopping: int = 0
    _saved: int = 0
    _offered: bool = False
    _going_back: bool = False
    _nan: bool = False
    _unchecked: Unchecked = field(default_factory=Unchecked)
    _values: dict[str, float | None] = field(default_factory=dict)
    _measured: tuple[int, dict[str, float | None]] = (0, {})
    _metric_names: set[str] = field(default_factory=set)
    _timed: tuple[int, float] = (0, 0.0)
    _tokens: int = 0
    _display: Display | None = None

    def restore(self, state: Any, host: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return (state, host) of the newest checkpoint, with the shardings of ``state``; the arguments when there is none.

        The arrays of ``state`` are freed before a checkpoint is read: the devices never hold two states.
        Raises InputError when the checkpoint holds other leaves, shapes, dtypes or host keys.
        """
        if not self.resumed_step:
            return state, dict(host)
        state, saved = self.checkpoints.restore(state, self.resumed_step, verified=True, donate=True)
        self.bad = list(saved.pop(OWN, {}).get("bad_steps", []))
        if saved.keys() != host.keys():
            place = checkpoint_dir(self.directory) / str(self.resumed_step)
            raise InputError(f"{place}: holds the host values {sorted(saved)}, this program keeps {sorted(host)}")
        return state, saved

    def steps(self, start: int, total: int) -> Iterator[int]:
        """Yield start + 1 ... total; nothing when the run is complete. start: ``resumed_step``.

        Raises InputError when the run is already past ``total``, SystemExit (143, 130) after a signal, once the step is saved.
        """
        if start != self.resumed_step:
            raise ValueError(f"steps must start at resumed_step={self.resumed_step}, not {start}")
        if start > total:
            raise InputError(
                f"{self.directory}: already at step {start}, asked for {total}: ask for more, or a new run_dir"
            )
        if start == total:
            print(f"{self.directory}: already complete ({total} steps)", file=sys.stderr)
            return
        self.total, self._saved, self._timed = total, start, (start, time.monotonic())
        self._display = Display(self.stage, start, total, self.loop.progress and jax.process_index() == 0)
        self._step, self.signals.in_loop = start, True
        self.profile.begin(start, total)
        try:
            while self._step < total:
                self._step += 1
                self.profile.before(self._step)
                self._enter(self.phases[0], first=True)
                yield self._step
                self.profile.after(self._step)
                if self._going_back:
                    raise ValueError("log() gave False: take run.rolled_back(state), then go on with the next step")
                if self._step == start + 1:
                    self._print_overview()
                    report_first_step()
                self._stopping = self._stopping or self.signals.agreed()
                # After a signal between save() and this line the step is unsaved: the run ends after the next step.
                if self._stopping and (self._saved == self._step or not self._offered):
                    self._leave(self._step)
            self._enter("end")
        finally:
            self.profile.end()
            self.signals.in_loop = False
            self.watchdog.enter("", 0)
            self.close_display()

    def _print_overview(self) -> None:
        """Print the numbers of parameters after the first step: until then an error of the user's stays one line."""
        if self.overview and jax.process_index() == 0:
            print(self.overview, file=sys.stderr)

    def close_display(self) -> None:
        """Restore the terminal, also when an exception ended the loop."""
        if self._display is not None:
            self._display.close()

    def _leave(self, step: int) -> None:
        print(f"stopped at step {step}; the same command goes on from here", file=sys.stderr)
        raise SystemExit(128 + self._stopping)

    # ---- phases

    def enter(self, phase: str) -> None:
        """Start ``phase`` (one of the algorithm's) of the step; it lasts until the next one is entered.

        The name selects its deadline and fault point, and labels its seconds in timing.jsonl and its entry in status.json.
        """
        if phase not in (*self.phases, *PHASES):
            raise ValueError(f"unknown phase {phase!r}; there are {', '.join((*self.phases, *PHASES))}")
        self._enter(phase)

    def _enter(self, phase: str, first: bool = False) -> None:
        time_now, (last, began) = time.monotonic(), self._phase
        if last:
            self._seconds[last] = self._seconds.get(last, 0.0) + time_now - began
        self._phase = (phase, time_now)
        self.watchdog.enter(phase, self._step, first=first)
        self.status.update(step=self._step, phase=phase)
        self._nan = self.faults.at(phase, self._step)

    # ---- metrics

    def log(
        self,
        step: int,
        metrics: Metrics,
        *,
        tokens: int = 0,
        timing: Mapping[str, float] | None = None,
        batch: Any = None,
    ) -> bool:
        """Log the metrics of a step. Call it every step; it writes every ``log_every`` steps and at the last one.

        tokens: the number trained on in this step, for tokens_per_second.
        timing: more wall-clock values for timing.jsonl.
        batch: written to disk when the step is bad.
        Returns False when the step is bad and undone (LoopConfig.on_bad_step = "rollback"): call ``rolled_back(state)`` and
        continue with the next step.
        Raises RunStopped for a bad step that may not be skipped, after writing the line if it was due.
        """
        self._enter("log")
        metrics = {**metrics, sorted(metrics)[0]: math.nan} if self._nan else metrics
        self._tokens += tokens
        self._unchecked.add(step, metrics, batch)
        is_due = due(step, self.loop.log_every, self.total)
        if not is_due and self.loop.on_bad_step == "stop":
            return True  # do not wait for the devices; the metrics are checked before the next write or save
        *_, (_, self._values) = self._check(but=step)
        if self._going_back:
            return False
        if is_due:
            self._write_timing(step, timing or {})
            self._record(step, self._values)
            if self._display is not None:
                self._display.update(step, self._values)
        if self.loop.on_bad_step == "stop":
            bad_steps.stop_if_bad(step, self._values)
        return True

    def _check(self, but: int | None = None) -> list[tuple[int, dict[str, float | None]]]:
        """Fetch and return the metrics of the steps since the last check, and handle the bad ones.

        but: the step that the caller logs before it stops the run.
        """
        checked = self._unchecked.take()
        for step, values, batch in checked:
            if problem := bad_steps.find_problem(values):
                bad_steps.record(self.directory, step, problem, self.loop.on_bad_step, values, batch)
                self._handle_bad_step(step, problem, values, but)
        return [(step, values) for step, values, _ in checked]

    def _handle_bad_step(self, step: int, problem: str, values: Mapping[str, float | None], but: int | None) -> None:
        policy = self.loop.on_bad_step
        if policy == "stop":
            if step != but:
                bad_steps.stop_if_bad(step, values)
            return
        self.bad.append(step)
        if len(self.bad) > self.loop.bad_steps:
            raise RunStopped(f"step {step}: {problem}; {len(self.bad)} bad steps, LoopConfig.bad_steps allows fewer")
        self.checkpoints.drain()  # a save in progress is the one to roll back to
        restored_step = broadcast_from_first(latest_step(self.directory) or 0) if policy == "rollback" else 0
        if policy == "rollback" and not restored_step:
            raise RunStopped(f"step {step}: {problem}; no checkpoint yet to roll back to (LoopConfig.save_every)")
        consequence = (
            f"going on from step {restored_step} with the next batches" if restored_step else "its batch is passed over"
        )
        print(f"warning: step {step}: {problem}; {consequence}", file=sys.stderr)
        self._going_back = policy == "rollback"

    def rolled_back(self, state: Any) -> Any:
        """Return the newest checkpoint's state with the shardings of ``state``, whose arrays are freed; the next step follows it.

        Host values such as the position in the data are not restored, so the batches since the checkpoint are skipped.
        """
        self.checkpoints.drain()
        step = broadcast_from_first(latest_step(self.directory) or 0)
        state, _ = self.checkpoints.restore(state, step, donate=True)
        self.tracker.rewind(step)
        self._step, self._saved, self._going_back = step, step, False
        self._timed, self._tokens = (step, time.monotonic()), 0
        return state

    def record(self, step: int, metrics: Metrics) -> None:
        """Write a line of metrics at once, for evaluations. Raises RunStopped for a number that is not finite."""
        bad_steps.stop_if_bad(step, self._record(step, metrics))

    def _record(self, step: int, metrics: Metrics) -> dict[str, float | None]:
        values = fetch({name: value for name, value in metrics.items() if value is not None})
        values = {name: values.get(name) for name in sorted(metrics)}
        values = {name: value for name, value in values.items() if value or name not in bad_steps.ONLY_WHEN_BAD}
        self.tracker.write(step, values)
        if self._display is not None:
            self._display.keep_heldout(values)
        earlier = self._measured[1] if self._measured[0] == step else {}
        self._measured = (step, earlier | values)
        self._metric_names |= values.keys()
        return values

    def _write_timing(self, step: int, timing: Mapping[str, float]) -> None:
        time_now, (last, began) = time.monotonic(), self._timed
        steps = max(step - last, 1)
        rate = {"tokens_per_second": self._tokens / (time_now - began)} if self._tokens and time_now > began else {}
        phases = {f"seconds_{phase}": seconds / steps for phase, seconds in self._seconds.items()}
        self.tracker.write_timing(step, {"seconds": (time_now - began) / steps, **rate, **phases, **timing})
        self._timed, self._tokens = (step, time_now), 0
        self._seconds.clear()

    def evaluation_due(self, step: int) -> bool:
        """Return whether to evaluate after ``step``: every ``evaluate_every`` steps and at the last one; never when that is 0."""
        if is_due := due(step, self.loop.evaluate_every, self.total):
            self._enter("evaluate")
        return is_due

    def write(self, name: str, text: str) -> None:
        """Write a file of the run directory atomically, in the first process only."""
        if jax.process_index() == 0:
            write_atomically(self.directory / name, text)

    # ---- saving

    def save(self, step: int, state: Any, host: Mapping[str, Any]) -> None:
        """Save a checkpoint if due; call it at the end of every step. Due: every ``save_every``, the last step, after a signal.

        Raises RunStopped for a step whose metrics are not finite, even one that was not due for logging.
        """
        self._offered = True
        self._stopping = self._stopping or self.signals.agreed()
        if not (self._stopping or due(step, self.loop.save_every, self.total)):
            return
        self._enter("save")
        self._check()
        self._check_best_metric(step)
        measured = self._measured[1] if self._measured[0] == step else {}
        self.checkpoints.save(step, state, {**host, OWN: {"bad_steps": list(self.bad)}}, measured)
        self._saved = step

    def _check_best_metric(self, step: int) -> None:
        metric, evaluated = self.loop.best_metric, step >= max(self.loop.evaluate_every, self.loop.log_every)
        if self.loop.keep_best and evaluated and self._metric_names and metric not in self._metric_names:
            raise InputError(
                f"LoopConfig.best_metric = {metric!r}: this run has no such metric{renamed_metric(metric)}; it has "
                f"{', '.join(sorted(self._metric_names))}"
            )
