"""Run one experiment with several settings and seeds, one run directory each, and print a table of the results.

    python experiments/sweep.py --experiment=train_ppo --gin_file=configs/support_desk/ppo.gin \\
        --grid="PPOConfig.kl_coefficient=0.02,0.05" --seeds=0,1,2 --metrics=score,kl --out=runs/sweeps/kl

Several --grid flags: every combination. --point="A.b=1; C.d=2" (once for each point): a list instead of a grid.
A sweep in a file has one flag per line (# begins a comment): --flagfile=configs/sweeps/NAME.flags.

The same command continues after a stop: finished runs are skipped, a half-done run is resumed, a failed run is tried
again; more values or seeds may be added. A failure is recorded, and the other runs go on. OUT holds a directory for each run
(kl_coefficient=0.02__seed=1), logs/, sweep.json (state), summary.json and summary.csv: for each setting the mean of
every metric over the seeds with its 95 % interval.

Names of metrics: those of metrics.jsonl (last value, or mean of the last --average ones), and of evaluation.json:
ppo/gold, sft->ppo/gold. A sweep over pipeline has the stage in front: ppo/score, evaluation/sft->ppo/gold.

Exit codes: 0 done; 2 unusable flags; 3 some run failed; 130, 143 stopped.
"""

from __future__ import annotations

import csv
import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from absl import flags
from rich.console import Console
from rich.table import Table

from rlhf_jax.config import fingerprint_bindings, key_to_bind, scan
from rlhf_jax.config.renamed import renamed_metric
from rlhf_jax.errors import InputError
from rlhf_jax.launch import STOPPED, run_child
from rlhf_jax.launch.check_bindings import Command, check
from rlhf_jax.launch.command import run_command
from rlhf_jax.loop.cold_start import cache_environment
from rlhf_jax.messages import behind, printable
from rlhf_jax.rundir import lock, make_directory
from rlhf_jax.rundir.outputs import changed_outputs
from rlhf_jax.rundir.provenance import changed_inputs
from rlhf_jax.rundir.resume import check_run_place, names_in
from rlhf_jax.statistics.intervals import Interval, across_seeds
from rlhf_jax.storage.files import field, json_text, read_object, write_atomically
from rlhf_jax.storage.shipped import experiments, script_path
from rlhf_jax.sweep.settings import PlannedRun, expand, final_metrics, plan

flags.DEFINE_string("experiment", None, "train_ppo, pipeline, ...: a script below experiments/.")
flags.DEFINE_multi_string("grid", [], "KEY=VALUE,VALUE: values of a gin key or macro; give the flag again for another.")
flags.DEFINE_multi_string("point", [], "KEY=VALUE; KEY=VALUE: one setting; give the flag again for another.")
flags.DEFINE_list("seeds", [], "Seeds of every setting; none: the configuration's own.")
flags.DEFINE_string("out", None, "Directory of the sweep.")
flags.DEFINE_list("metrics", [], "Metrics of the printed table; the files hold all of them.")
flags.DEFINE_integer("average", 1, "Last logged values of a metric to average over.", lower_bound=1)
flags.DEFINE_bool("dry_run", False, "Show the runs and their commands; start and write nothing.")

FLAGS = flags.FLAGS
RECORD = "sweep.json"
USUAL = ("heldout/loss", "loss", "heldout/accuracy", "score", "kl", "monitor/gold", "ppo/gold", "sft->ppo/gold")
"""The metrics of the table without --metrics, as far as they exist."""
Record = dict[str, Any]


# ---- one run


def bindings_of(run: PlannedRun, run_dir: Path | None) -> list[str]:
    """Return the bindings on the command line of a run; run_dir: None leaves it out."""
    bound = [*FLAGS.gin_bindings, *(f"{key} = {value}" for key, value in run.values.items())]
    scanned = scan(FLAGS.gin_file, bound)
    if run.seed is not None:
        bound.append(f"{key_to_bind(scanned, 'run.seed')} = {run.seed}")
    if run_dir is not None:
        bound.append(f"{key_to_bind(scanned, 'run.run_dir')} = {str(run_dir)!r}")
    return bound


def command_of(run: PlannedRun, out: Path) -> list[str]:
    """Return the command line of a run."""
    arguments = [f"--gin_file={file}" for file in FLAGS.gin_file]
    arguments += [f"--gin_bindings={text}" for text in bindings_of(run, out / run.name)]
    return [sys.executable, str(script_path(FLAGS.experiment)), *arguments]


def state_of(run: PlannedRun, out: Path, record: Record) -> str:
    """Return 'done', 'failed', 'half done' or 'to do', for the present configuration."""
    entry = record["runs"].get(run.name)
    if not (out / run.name).is_dir():
        return "failed" if entry and entry["state"] == "failed" else "to do"
    if entry is None or entry["asked"] != fingerprint_bindings(scan(FLAGS.gin_file, bindings_of(run, None))):
        return "half done"
    if entry["state"] == "done" and (changed := changed_outputs(out / run.name)):
        raise InputError(
            f"{out / run.name / changed[0]}: not what the run wrote: put it back, or remove {out / run.name} to run it again"
        )
    if entry["state"] == "done" and changed_inputs(out / run.name):
        return "half done"  # its data or models have changed: its own resume says what to do
    return str(entry["state"])


def execute(run: PlannedRun, out: Path) -> Record:
    """Run it to its end and return its entry of sweep.json. Its output goes to logs/NAME.log."""
    log = out / "logs" / f"{run.name}.log"
    log.parent.mkdir(exist_ok=True)
    began = time.monotonic()
    code = run_child(command_of(run, out), cache_environment(out), output=log)
    lines = last_lines(log)
    return {
        "state": "done" if code == 0 else "half done" if code in STOPPED else "failed",
        "exit_code": code,
        "seconds": round(time.monotonic() - began, 1),
        "message": lines[-1] if code and lines else "",
        "asked": fingerprint_bindings(scan(FLAGS.gin_file, bindings_of(run, None))),
    }


def last_lines(log: Path) -> list[str]:
    """Return the non-empty lines in the last 64 KiB of a log: it may be larger than memory."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
        text = file.read().decode(errors="replace")
    return [printable(line) for line in text.splitlines() if line.strip()]


# ---- the sweep


def planned_runs() -> list[PlannedRun]:
    """Return the runs that the flags describe. Raises InputError for flags that are wrong."""
    for name in ("experiment", "out"):
        if not getattr(FLAGS, name):
            raise InputError(f"--{name}: give it (--help explains)")
    if FLAGS.experiment not in experiments():
        names = ", ".join(experiments())
        raise InputError(f"--experiment={FLAGS.experiment}: no such script; there are {names}")
    try:
        seeds = [int(seed) for seed in FLAGS.seeds]
    except ValueError as error:
        raise InputError(f"--seeds={','.join(FLAGS.seeds)}: give whole numbers") from error
    runs = plan(expand(FLAGS.grid, FLAGS.point), seeds)
    for run in runs:
        scan(FLAGS.gin_file, bindings_of(run, Path("x")))
    return runs


def read_record(out: Path) -> Record:
    """Read sweep.json. Raises InputError when OUT belongs to something else."""
    check_run_place(out)
    file, files = out / RECORD, names_in(out) - {".lock", f"{RECORD}.tmp"}
    if RECORD not in files:
        if files:
            raise InputError(f"{out}: not empty and not a sweep ({min(files)} is there); give another --out")
        return {"experiment": FLAGS.experiment, "runs": {}}
    remedy = "delete it: finished runs are then looked at again"
    record: Record = read_object(file, remedy)
    runs = field(record, "runs", dict, str(file), remedy)
    kinds: dict[str, type | tuple[type, ...]] = {
        "state": str,
        "exit_code": int,
        "seconds": (int, float),
        "message": str,
        "asked": str,
    }
    for name, entry in runs.items():
        if not isinstance(entry, dict):
            raise InputError(f"{file}: the entry of run {name!r} is no object; {remedy}")
        for key, kind in kinds.items():
            field(entry, key, kind, f"{file}: run {name!r}", remedy)
    if field(record, "experiment", str, str(file), remedy) != FLAGS.experiment:
        raise InputError(f"{out}: a sweep over {record['experiment']}, not {FLAGS.experiment}; give another --out")
    return record


def write_record(out: Path, record: Record) -> None:
    """Write sweep.json."""
    write_atomically(out / RECORD, json_text(record, indent=2))


def sweep(runs: Sequence[PlannedRun], out: Path) -> list[str]:
    """Start the runs that are not done and return the names of the failed ones. Raises SystemExit after a signal."""
    make_directory(out)
    with lock(out):
        record = read_record(out)
        failed: list[str] = []
        write_record(out, record)  # before the first run, so that a directory that a kill leaves is known as a sweep
        for number, run in enumerate(runs, 1):
            before = state_of(run, out, record)
            print(f"[{number}/{len(runs)}] {run.name}", file=sys.stderr, flush=True)
            if before == "done":
                print("    done before", file=sys.stderr, flush=True)
                continue
            entry = record["runs"][run.name] = execute(run, out)
            write_record(out, record)
            message = f": {entry['message']}" if entry["state"] == "failed" else ""
            print(f"    {entry['state']}, {entry['seconds']:.0f} s{message}", file=sys.stderr, flush=True)
            if entry["state"] == "failed":
                failed.append(run.name)
            elif entry["state"] != "done":
                print(f"stopped in {run.name}; the same command goes on from here", file=sys.stderr)
                raise SystemExit(entry["exit_code"])
        summarise(runs, out, record)
    return failed


# ---- results


def summarise(runs: Sequence[PlannedRun], out: Path, record: Record) -> None:
    """Write summary.json and summary.csv, and print the table. Raises InputError for an unknown metric."""
    finished = {
        run.name: final_metrics(out / run.name, FLAGS.average) for run in runs if state_of(run, out, record) == "done"
    }
    for problem in [problem for measured in finished.values() for problem in measured.problems]:
        print(f"warning: {problem}", file=sys.stderr)
    metrics_of = {name: measured.metrics for name, measured in finished.items()}
    settings: list[Record] = []
    for name in dict.fromkeys(run.setting for run in runs):
        own = [run for run in runs if run.setting == name]
        measured = [metrics_of[run.name] for run in own if run.name in metrics_of]
        key_sets: list[set[str]] = [set(metrics) for metrics in measured]
        everywhere = set.intersection(*key_sets) if key_sets else set()
        values = across_seeds([{key: metrics[key] for key in everywhere} for metrics in measured]) if measured else {}
        partly = sorted(set[str]().union(*key_sets) - everywhere)
        settings.append({"name": name, "values": own[0].values, "runs": len(own), "done": len(measured)})
        settings[-1] |= {"metrics": values, "not_in_every_run": partly}
    names = sorted({metric for setting in settings for metric in setting["metrics"]})
    with (out / "summary.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["setting", "metric", "mean", "low", "high", "n"])
        for setting in settings:
            for metric, interval in setting["metrics"].items():
                writer.writerow([setting["name"], metric, interval.mean, *_bounds(interval, ""), interval.n])
    rows = [s | {"metrics": {m: _as_json(interval) for m, interval in s["metrics"].items()}} for s in settings]
    entries: list[Record] = [{"name": r.name, "seed": r.seed, "state": state_of(r, out, record)} for r in runs]
    entries = [entry | {"metrics": metrics_of.get(entry["name"])} for entry in entries]
    for entry in entries:
        if entry["name"] in finished and finished[entry["name"]].problems:
            entry["problems"] = finished[entry["name"]].problems
    summary = {"experiment": FLAGS.experiment, "average": FLAGS.average, "settings": rows, "runs": entries}
    write_atomically(out / "summary.json", json_text(summary, indent=1))
    unknown = [metric for metric in FLAGS.metrics if names and metric not in names]
    columns = [m for m in FLAGS.metrics if m in names] or [m for m in names if m.split("evaluation/")[-1] in USUAL][:6]
    print_table(settings, columns)
    if unknown:
        listed = ", ".join(f"{metric}{renamed_metric(metric)}" for metric in unknown)
        raise InputError(f"--metrics: there is no {listed}; there are {', '.join(names)}")


def _bounds(interval: Interval, missing: Any) -> list[Any]:
    return [missing if math.isnan(bound) else bound for bound in (interval.low, interval.high)]


def _as_json(interval: Interval) -> dict[str, Any]:
    low, high = _bounds(interval, None)
    return asdict(interval) | {"low": low, "high": high}


def print_table(settings: Sequence[dict[str, Any]], metrics: Sequence[str]) -> None:
    """Print the table, settings down and metrics across: mean [95 % interval over seeds]."""
    table = Table(title=f"{FLAGS.experiment}: mean [95 % interval over seeds]")
    for column in ("setting", "runs", *metrics):
        table.add_column(printable(column))
    for setting in settings:
        cells = []
        for metric in metrics:
            interval = setting["metrics"].get(metric)
            text = "" if interval is None else f"{interval.mean:.4g} [{interval.low:.4g}, {interval.high:.4g}]"
            cells.append(text)
        count = (
            f"{setting['done']}" if setting["done"] == setting["runs"] else f"{setting['done']} of {setting['runs']}"
        )
        table.add_row(printable(setting["name"]), count, *(cell.replace("[nan, nan]", "") for cell in cells))
    Console(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False, file=behind(sys.stdout)).print(table)


# ---- command line


def main(argv: Sequence[str]) -> int:
    """Run the program and return its exit code, as the docstring of the module describes."""
    names = ("experiment", "gin_file", "gin_bindings", "grid", "point", "seeds", "out", "metrics", "average", "dry_run")
    return run_command(command, argv, __doc__ or "", names)


def command() -> int:
    """Run the sweep of the flags. Raises InputError."""
    runs, out = planned_runs(), Path(FLAGS.out).expanduser().absolute()
    record = read_record(out)
    gin_files = tuple(FLAGS.gin_file)
    check([Command(FLAGS.experiment, gin_files, tuple(bindings_of(run, out)), run.name) for run in runs])
    if FLAGS.dry_run:
        for run in runs:
            print(f"{run.name}: {state_of(run, out, record)}\n    {shlex.join(command_of(run, out))}")
        return 0
    failed = sweep(runs, out)
    print(f"summary: {out / 'summary.json'}")
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed, see {out / 'logs'}: {', '.join(failed)}", file=sys.stderr)
    return 3 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
