"""What every loop needs and no algorithm is about, so that a script's loop holds only the algorithm.

    bound = bound_config()                                   # the first line of the program's run()
    with open_run(run_dir, stage="sft", bound=bound, seed=0, loop=loop, inputs=[Input("data", path)]) as run:
        state, host = run.restore(state, {"epoch": 0})       # the run's newest checkpoint, or what was given
        for step in run.steps(run.resumed_step, total):      # resumed_step + 1 ... total
            state, metrics = train_step(state, frozen, next(batches))
            run.log(step, metrics)                           # every log_every; stops on a number that is not finite
            run.save(step, state, {"epoch": epoch})          # every save_every, at the end, on a signal

Signals. The first SIGTERM or SIGINT inside the loop: the step under way is finished and saved, the save is drained,
the program exits with 143 or 130; the same command goes on from there. Outside the loop there is nothing to save and
the program exits at once, with the same codes. A second signal exits at once, whatever is under way.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from rlhf_jax.run.checkpoint import Checkpoints
from rlhf_jax.run.config import BoundConfig
from rlhf_jax.run.progress import Display
from rlhf_jax.run.provenance import Input, describe, write_atomically, write_provenance
from rlhf_jax.run.resume import forget, lock, make_directory, refuse_changes, refuse_foreign, refuse_steps
from rlhf_jax.run.tracking import Metrics, Tracker, fetch, stop_if_not_finite
from rlhf_jax.saved import checkpoint_dir, latest_step
from rlhf_jax.types import InputError


@dataclass(frozen=True)
class LoopConfig:
    """How often things happen, in steps. save_every, log_every: >= 1. evaluate_every: 0 = never.

    keep: newest checkpoints that stay, >= 1. tensorboard: write event files too. progress: a bar or lines on stderr.
    """

    save_every: int = 100
    keep: int = 3
    log_every: int = 1
    evaluate_every: int = 0
    tensorboard: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        for name, least in (("save_every", 1), ("keep", 1), ("log_every", 1), ("evaluate_every", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"LoopConfig.{name}: must be a whole number >= {least}, got {value!r}")
        for name in ("tensorboard", "progress"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"LoopConfig.{name}: must be True or False, got {getattr(self, name)!r}")


def due(step: int, every: int, total: int) -> bool:
    """Whether something that happens every ``every`` steps (0: never) and at the last one happens at ``step``."""
    return every > 0 and (step % every == 0 or step == total)


class Signals:
    """The first SIGTERM or SIGINT is remembered, or exits when nothing has to be saved; the second exits at once."""

    def __init__(self) -> None:
        self.received = 0
        self.in_loop = False
        self._before: dict[int, Any] = {}

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = number
        if not self.in_loop:
            raise SystemExit(128 + number)
        # os.write, not print: a handler may run in the middle of another print, whose buffer is not re-entrant.
        os.write(2, f"\n{signal.Signals(number).name}: finishing the step and saving; again to exit at once\n".encode())

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self) -> int:
        """The signal every process obeys: hosts get it at different steps, and one leaving alone hangs the rest."""
        if jax.process_count() == 1:
            return self.received
        return int(np.max(multihost_utils.process_allgather(np.int32(self.received))))


@dataclass
class Run:
    """An open run directory. resumed_step: the step of the checkpoint it goes on from, 0 for a fresh start."""

    directory: Path
    stage: str
    loop: LoopConfig
    resumed_step: int
    tracker: Tracker
    checkpoints: Checkpoints
    signals: Signals
    total: int = 0
    _stopping: int = 0
    _saved: int = 0
    _offered: bool = False
    _unchecked: list[tuple[int, Metrics]] = field(default_factory=list)
    _values: dict[str, float | None] = field(default_factory=dict)
    _timed: tuple[int, float] = (0, 0.0)
    _tokens: int = 0
    _display: Display | None = None

    def restore(self, state: Any, host: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """(state, host) of the newest checkpoint, onto the shardings of ``state``; those given when there is none.

        Raises InputError when the checkpoint holds other leaves, shapes, dtypes or host keys.
        """
        if not self.resumed_step:
            return state, dict(host)
        state, saved = self.checkpoints.restore(state, self.resumed_step)
        if saved.keys() != host.keys():
            place = checkpoint_dir(self.directory) / str(self.resumed_step)
            raise InputError(f"{place}: holds the host values {sorted(saved)}, this program keeps {sorted(host)}")
        return state, saved

    def steps(self, start: int, total: int) -> Iterator[int]:
        """start + 1 ... total; nothing when the run is complete. start: ``resumed_step``.

        Raises InputError when the run is already past ``total``, SystemExit (143, 130) after a saved signal.
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
        self.signals.in_loop = True
        try:
            for step in range(start + 1, total + 1):
                yield step
                self._stopping = self._stopping or self.signals.agreed()
                # A signal between save() and here found the step unsaved: the next step will be saved, then we leave.
                if self._stopping and (self._saved == step or not self._offered):
                    self._leave(step)
        finally:
            self.signals.in_loop = False
            self.close_display()

    def close_display(self) -> None:
        """Give the terminal back, also when an exception ended the loop."""
        if self._display is not None:
            self._display.close()

    def _leave(self, step: int) -> None:
        print(f"stopped at step {step}; the same command goes on from here", file=sys.stderr)
        raise SystemExit(128 + self._stopping)

    def log(self, step: int, metrics: Metrics, *, tokens: int = 0, timing: Mapping[str, float] | None = None) -> None:
        """The metrics of a step; call it every step, it writes every ``log_every`` and at the last one.

        tokens: trained on in this step, for tokens_per_second. timing: more wall-clock values for timing.jsonl, such
        as the seconds of a phase.
        Raises RunStopped when a written number is not finite, after writing it, or when one of an unwritten step was.
        """
        self._tokens += tokens
        self._unchecked.append((step, metrics))
        if not due(step, self.loop.log_every, self.total):
            return
        *_, (_, self._values) = self._check(but=step)
        self._write_timing(step, timing or {})
        self.record(step, self._values)
        if self._display is not None:
            self._display.update(step, self._values)

    def _check(self, but: int | None = None) -> list[tuple[int, dict[str, float | None]]]:
        """The numbers of the steps since the last look, fetched. Raises RunStopped for the first that is not finite (a
        step between two logged ones counts too); ``but``: the step that its caller writes before it checks."""
        looked = [(step, fetch(metrics)) for step, metrics in self._unchecked]
        self._unchecked.clear()
        for step, values in looked:
            if step != but:
                stop_if_not_finite(step, values)
        return looked

    def record(self, step: int, metrics: Metrics) -> None:
        """Write a line now, whatever the cadence: for evaluations. Raises RunStopped as ``log`` does."""
        values = fetch({name: value for name, value in metrics.items() if value is not None})
        values = {name: values.get(name) for name in sorted(metrics)}
        self.tracker.write(step, values)
        stop_if_not_finite(step, values)

    def _write_timing(self, step: int, timing: Mapping[str, float]) -> None:
        now, (last, began) = time.monotonic(), self._timed
        seconds = (now - began) / max(step - last, 1)
        rate = {"tokens_per_second": self._tokens / (now - began)} if self._tokens and now > began else {}
        self.tracker.write_timing(step, {"seconds": seconds, **rate, **timing})
        self._timed, self._tokens = (step, now), 0

    def evaluation_due(self, step: int) -> bool:
        """Whether to evaluate after ``step``: every ``evaluate_every`` and at the last one; never when that is 0."""
        return due(step, self.loop.evaluate_every, self.total)

    def save(self, step: int, state: Any, host: Mapping[str, Any]) -> None:
        """Call it at the end of every step: it saves every ``save_every``, at the last step and after a signal.

        Never saves a step whose metrics are not finite (RunStopped), even one that was not due for logging.
        """
        self._offered = True
        self._stopping = self._stopping or self.signals.agreed()
        if not (self._stopping or due(step, self.loop.save_every, self.total)):
            return
        self._check()
        self.checkpoints.save(step, state, host)
        self._saved = step


# ---- opening


@contextlib.contextmanager
def open_run(
    run_dir: str | Path,
    *,
    stage: str,
    bound: BoundConfig,
    seed: int,
    loop: LoopConfig,
    inputs: Sequence[Input] = (),
    mesh: Mesh | None = None,
    output: str | None = None,
) -> Iterator[Run]:
    """Open a run directory, new or to be resumed: lock, check, record; close drains the saves and the logs.

    run_dir: a local directory, created when missing. stage: 'sft', 'ppo', ... mesh: only recorded. output: the file that a
    run without checkpoints leaves when it is done. Raises InputError,
    before anything is written, when the directory belongs to something else, is in use, or was begun with another
    configuration.
    A directory without a checkpoint or output has nothing to lose: its configuration may change freely. An InputError before the
    first step of a new run removes its directory again.
    """
    directory = Path(run_dir).absolute()
    refuse_foreign(directory, stage)
    refuse_steps(directory, bound.operative, latest_step(directory) or 0)
    described = [describe(given) for given in inputs]
    first, fresh = jax.process_index() == 0, not directory.exists()
    make_directory(directory)
    try:
        with contextlib.ExitStack() as stack:
            if first:
                stack.callback(lock(directory).close)
            signals = stack.enter_context(Signals())
            resumed = latest_step(directory) or 0
            if resumed or (output is not None and (directory / output).is_file()):
                now = {"stage": stage, "seed": seed, "inputs": described}
                holds = f"is at step {resumed}" if resumed else f"holds {output}"
                refuse_changes(directory, now, bound.operative, holds)
            if first:
                write_provenance(directory, stage=stage, seed=seed, inputs=described, resumed_step=resumed, mesh=mesh)
                write_atomically(directory / "config.gin", bound.config)
                write_atomically(directory / "operative_config.gin", bound.operative)
            tracker = Tracker(directory, stage, resumed_step=resumed, tensorboard=loop.tensorboard)
            stack.callback(tracker.close)
            checkpoints = stack.enter_context(Checkpoints(directory, loop.keep))
            run = Run(directory, stage, loop, resumed, tracker, checkpoints, signals)
            stack.callback(run.close_display)
            yield run
    except InputError:
        if first and fresh:
            forget(directory)
        raise
