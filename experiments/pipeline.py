"""Run stages one after another, each a process of its own and a run directory of its own below one directory.

    python experiments/pipeline.py --gin_file=configs/pipeline/quickstart.gin

Finished stages are skipped (each experiment resumes its own run directory), so the same command goes on after a stop. A
stage's provenance.json names the run directories and fingerprints it started from.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gin

from rlhf_jax.evaluate.report import write_report
from rlhf_jax.run import bound_config, launch
from rlhf_jax.types import InputError, RunStopped

ROOT = Path(__file__).resolve().parents[1]


@gin.register
@dataclasses.dataclass(frozen=True)
class Stage:
    """name: sub-directory of run_dir. experiment: script name. macros: gin macros that name earlier stages' directories.
    bindings: more gin bindings. done: the file that says this stage is complete (None: let the stage resume itself)."""

    name: str
    experiment: str
    gin_file: str
    macros: tuple[tuple[str, str], ...] = ()
    bindings: tuple[str, ...] = ()
    done: str | None = None

    def __post_init__(self) -> None:
        if not (ROOT / "experiments" / f"{self.experiment}.py").is_file():
            raise InputError(f"Stage.experiment = {self.experiment!r}: no experiments/{self.experiment}.py")


@gin.configurable
def run(run_dir: str, stages: Sequence[Stage], seed: int = 0) -> None:
    """stages: run in order; the first that fails stops the pipeline with its exit code in the message."""
    bound_config()
    directory = Path(run_dir).absolute()
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(directory / "compilation_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
    }
    for number, stage in enumerate(stages, 1):
        print(f"[{number}/{len(stages)}] {stage.name}", file=sys.stderr, flush=True)
        if stage.done is not None and (directory / stage.name / stage.done).is_file():
            continue
        macros = {"RUN_DIR": str(directory / stage.name)} | {name: str(directory / path) for name, path in stage.macros}
        bindings = [f"{name} = {value!r}" for name, value in macros.items()] + [f"SEED = {seed}", *stage.bindings]
        began = time.monotonic()
        command = [sys.executable, str(ROOT / "experiments" / f"{stage.experiment}.py"), f"--gin_file={stage.gin_file}"]
        finished = subprocess.run(
            [*command, *(f"--gin_bindings={binding}" for binding in bindings)], env=environment, check=False
        )
        if finished.returncode:
            raise RunStopped(f"stage {stage.name} ended with exit code {finished.returncode}; its message is above")
        print(f"    {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    report = write_report(directory, [stage.name for stage in stages])
    print(f"report: {report}")


if __name__ == "__main__":
    launch(run)
