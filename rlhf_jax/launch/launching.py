"""Start of an experiment: flags, gin and exit codes.

An experiment is a module with one ``@gin.configurable def run(...)`` and, at its end,
``if __name__ == "__main__": launch(run)``.

Exit codes of a launched program: 0 done; 1 a bug (traceback); 2 an error in the user's input (one line, nothing
written); 3 a guard stopped the run; 130 / 143 stopped by SIGINT / SIGTERM after saving (`loop.signals`).
"""

from __future__ import annotations

import inspect
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType

from absl import flags

from rlhf_jax.checkpoint_files.reading import one_choice
from rlhf_jax.config.gin_errors import Binding, explain_run
from rlhf_jax.config.parsing import parse
from rlhf_jax.errors import InputError, RunStopped
from rlhf_jax.launch.command import asks_for_help, exit_code_for, explain_os_error, finish, parse_flags, usage
from rlhf_jax.launch.modes import MODE_FLAGS
from rlhf_jax.loop.cold_start import watch
from rlhf_jax.messages import steady_output
from rlhf_jax.parallel.distributed import broadcast_from_first, connect
from rlhf_jax.processes import watch_parent

flags.DEFINE_multi_string("gin_file", [], "A gin file; give the flag again to add files, later ones win.")
flags.DEFINE_multi_string("gin_bindings", [], "One binding, for instance 'run.seed = 1'; wins over every file.")
flags.DEFINE_bool("debug", False, "Show the whole traceback of an error.")
flags.DEFINE_string(
    "compilation_cache",
    None,
    "Keep all compiled programs there, a directory or gs://..., for later starts; 'off' keeps none. Default: "
    "$JAX_COMPILATION_CACHE_DIR, or ~/.cache/rlhf_jax/compiled for those that took a second or more.",
)
flags.DEFINE_string(
    "distributed", None, "Join other processes: auto, or HOST:PORT,PROCESSES,INDEX (parallel/distributed.py)."
)
flags.DEFINE_string("profile", None, "Trace these steps, FIRST:LAST, into RUN_DIR/profile for TensorBoard or XProf.")
flags.DEFINE_string(
    "sync",
    None,
    "Keep a copy of the run directory at this URL (gs://...), and fetch what is there first (rundir/mirror.py).",
)


def _is_raised_in_body(run_fn: Callable[..., object], error: BaseException) -> bool:
    """Return whether the error was raised in the body of ``run_fn``; otherwise gin was still building its arguments."""
    code, frame = inspect.unwrap(run_fn).__code__, error.__traceback__
    while frame is not None and frame.tb_frame.f_code is not code:
        frame = frame.tb_next
    return frame is not None


def _usage(run_fn: Callable[..., object]) -> str:
    """Return the text of --help: the experiment's docstring and the flags of all experiments."""
    words = inspect.getdoc(sys.modules[run_fn.__module__]) or inspect.getdoc(run_fn) or ""
    return usage(
        words, ("gin_file", "gin_bindings", "debug", "distributed", "compilation_cache", "sync", "profile", *MODE_FLAGS)
    )


def _suppress_save_tracebacks() -> None:
    """Suppress the tracebacks of a failed save in Orbax's threads: the run ends with RunStopped, which names the failure.

    They come from Orbax's log, and from tensorstore, which calls event loops that Orbax has closed.
    """

    def is_unrelated(record: logging.LogRecord) -> bool:
        return record.exc_info is None or "orbax" not in record.pathname

    report, report_unraisable = sys.excepthook, sys.unraisablehook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not _is_closed_loop_error(error, trace):
            report(kind, error, trace)

    def unraisable_hook(unraisable: sys.UnraisableHookArgs) -> None:
        if not _is_closed_loop_error(unraisable.exc_value, unraisable.exc_traceback):
            report_unraisable(unraisable)

    logging.getLogger("absl").addFilter(is_unrelated)
    sys.excepthook, sys.unraisablehook = hook, unraisable_hook


def _is_closed_loop_error(error: BaseException | None, trace: TracebackType | None) -> bool:
    """Return whether tensorstore called a closed event loop: the first frame is asyncio's, without a Python caller."""
    called = trace is not None and trace.tb_frame.f_code.co_name == "call_soon_threadsafe"
    return called and isinstance(error, RuntimeError)


def _launch(run_fn: Callable[[], object], argv: Sequence[str]) -> int:
    if asks_for_help(argv):
        print(_usage(run_fn))
        return 0
    try:
        parse_flags(argv)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not flags.FLAGS.debug:
        _suppress_save_tracebacks()
    scanned: list[Binding] = []
    try:
        if flags.FLAGS.distributed is not None:
            connect(flags.FLAGS.distributed)
        watch(flags.FLAGS.compilation_cache)
        from rlhf_jax.config import surface  # noqa: F401  registers what a gin file may name; it imports nearly everything

        scanned = parse(flags.FLAGS.gin_file, flags.FLAGS.gin_bindings)
        with one_choice(broadcast_from_first):
            run_fn()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        building, code = not _is_raised_in_body(run_fn, error), exit_code_for(error)
        if code is None and not building:
            raise
        if flags.FLAGS.debug:
            traceback.print_exception(error)
        hint = "" if isinstance(error, InputError | RunStopped) else f" ({type(error).__name__}; --debug shows where)"
        if isinstance(error, OSError) and not building:
            message = explain_os_error(error)
        else:
            message = explain_run(error, scanned, building)
        print(f"{'stopped' if code == 3 else 'error'}: {message}{hint}", file=sys.stderr)
        return code or 2
    return 0


def launch(run_fn: Callable[[], object]) -> None:
    """Parse the flags, parse gin, call ``run_fn()``, exit. This is the whole body of a script's ``__main__``.

    An error in the user's input (a flag, a file, a name, a type, a value) ends in ONE line on stderr that names the place
    and the remedy, with exit code 2; so does an error of the operating system (path and message). A guard's RunStopped and
    a full disk end in one line with exit code 3. Any other error is a bug, whose traceback is shown. ``--debug`` shows all
    tracebacks.
    """
    watch_parent()
    steady_output()
    sys.exit(finish(_launch(run_fn, sys.argv)))
