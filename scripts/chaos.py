"""Kill a training run at random moments, resume it by the same command, and compare it bit for bit with one left alone.

    python scripts/chaos.py --stage=ppo --trials=20 --seed=0

The tiny model of configs/smoke. Each trial is one run, killed (SIGKILL) once to three times at moments drawn uniformly
over the wall time of an unbroken run, then left to finish. Phases that no random kill hit get a trial of their own,
killed there by an injected fault. Compared are metrics.jsonl byte for byte (no gap, no duplicate; of ppo it holds sums over the
log-probabilities of every sampled token), every array of the last checkpoint (parameters, optimisers, keys, KL
coefficient), what the checkpoint keeps on the host (data position) and, of reward, reward_normalisation.json.

OUT/inputs (made once) holds what the stage starts from, OUT/STAGE the runs and table.md. Lost: a trial that could not be
finished by its command, or lacks a step. Exit codes: 0 nothing lost, nothing different; 1 otherwise; 2 unusable flags.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags
from chaos_table import Kill, Trial, hit, table

from rlhf_jax.command import run_command
from rlhf_jax.saved import latest_step
from rlhf_jax.testing.same_run import difference
from rlhf_jax.types import InputError

FLAGS = flags.FLAGS
ROOT = Path(__file__).resolve().parents[1]
CHAIN = {
    "base": ("train_sft", "base", {}),
    "sft": ("train_sft", "sft", {"BASE": "base"}),
    "completions": ("generate", "completions", {"POLICY": "sft"}),
    "reward": ("train_reward", "reward", {"POLICY": "sft", "COMPARISONS": "completions/comparisons.jsonl"}),
    "ppo": ("train_ppo", "ppo", {"POLICY": "sft", "REWARD": "reward"}),
}
"""{stage: (experiment, config, macros with paths of earlier stages)}."""
STEPS = {"sft": 32, "reward": 48, "ppo": 12}
"""More than the smoke configs ask for, so that starting is not most of a run's time."""
SAVE_EVERY, EVALUATE_EVERY = 2, 4
IN_A_SAVE = ("write", "hash", "commit", "retain")
PHASES = {
    "sft": ("start", "train", "log", "evaluate", "save", "end", *IN_A_SAVE),
    "reward": ("start", "train", "log", "evaluate", "save", "end", *IN_A_SAVE),
    "ppo": ("start", "rollout", "score", "reward", "prepare", "update", "log", "save", "end", *IN_A_SAVE),
}
"""'start': before the run directory is open: imports, loading, restoring. IN_A_SAVE: in the background, or on the way."""


# ---- processes


def command(stage: str, inputs: Path, run_dir: Path, *bindings: str) -> list[str]:
    """What starts (and resumes) a run of ``stage``."""
    experiment, config, macros = CHAIN[stage]
    bound = [f"RUN_DIR = {str(run_dir)!r}", *(f"{name} = {str(inputs / path)!r}" for name, path in macros.items())]
    given = [f"--gin_bindings={text}" for text in [*bound, *bindings]]
    script = str(ROOT / "experiments" / f"{experiment}.py")
    return [sys.executable, script, f"--gin_file={ROOT}/configs/smoke/{config}.gin", *given]


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """The process, with its output in ``log`` and a compilation cache for all of them."""
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(Path(FLAGS.out).absolute() / "compilation_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    } | os.environ
    with log.open("ab") as file:
        return subprocess.Popen(
            arguments, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )


def finish(arguments: list[str], log: Path) -> float:
    """Seconds that the process took. Raises RuntimeError when it did not end well."""
    began = time.monotonic()
    if code := start(arguments, log).wait():
        raise RuntimeError(f"exit code {code}, see {log}")
    return time.monotonic() - began


# ---- kills


def last_logged(run_dir: Path) -> int:
    """The last whole line of metrics.jsonl, 0 without one."""
    file = run_dir / "metrics.jsonl"
    lines = [line for line in file.read_text().split("\n")[:-1] if line] if file.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


def where(run_dir: Path, pid: int) -> tuple[str, int]:
    """(phase, step) of a stopped process: 'start' until it has opened its run directory; 'train + hash' in a save."""
    try:
        status = json.loads((run_dir / "status.json").read_text())
    except (OSError, ValueError):
        return "start", 0
    if status["pid"] != pid:
        return "start", 0
    saving = status["saving"].split(" ")[0]
    return status["phase"] + (f" + {saving}" if saving else ""), status["step"]


def killed_after(seconds: float, arguments: list[str], run_dir: Path, log: Path) -> Kill | None:
    """Kill the process ``seconds`` after its start, held still while its phase is read; None when it was done before."""
    process = start(arguments, log)
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGSTOP)
        phase, step = where(run_dir, process.pid)
        process.kill()
        process.wait()
        return Kill(seconds, phase, step, last_logged(run_dir), latest_step(run_dir) or 0)
    if code:
        raise RuntimeError(f"exit code {code}, see {log}")
    return None


def killed_at(point: str, step: int, arguments: list[str], run_dir: Path, log: Path) -> Kill:
    """Kill the process at a fault point."""
    fault = [
        "LoopConfig.faults = [@Fault()]",
        f"Fault.point = {point!r}",
        f"Fault.step = {step}",
        "Fault.action = 'kill'",
    ]
    began = time.monotonic()
    code = start([*arguments, *(f"--gin_bindings={text}" for text in fault)], log).wait()
    if code != -signal.SIGKILL:
        raise RuntimeError(f"exit code {code} instead of a kill at {point}, see {log}")
    return Kill(time.monotonic() - began, point, step, last_logged(run_dir), latest_step(run_dir) or 0, aimed=True)


# ---- the trials


class Chaos:
    """The trials of one stage."""

    def __init__(self, stage: str, out: Path, inputs: Path) -> None:
        self.stage, self.out, self.inputs = stage, out / stage, inputs
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        self.unbroken = self.out / "unbroken"
        self.seconds = 0.0

    def command(self, run_dir: Path) -> list[str]:
        loop = [
            f"LoopConfig.save_every = {SAVE_EVERY}",
            "LoopConfig.progress = False",
            "LoopConfig.tensorboard = False",
        ]
        loop += [f"run.steps = {STEPS[self.stage]}", "LoopConfig.keep = 2"] + (
            [f"LoopConfig.evaluate_every = {EVALUATE_EVERY}"] * (self.stage != "ppo")
        )
        return command(self.stage, self.inputs, run_dir, *loop)

    def leave_alone(self) -> None:
        """Two unbroken runs: the first compiles, the second is what the others are compared with."""
        finish(self.command(self.out / "compiling"), self.out / "compiling.log")
        self.seconds = finish(self.command(self.unbroken), self.out / "unbroken.log")
        if found := difference(self.out / "compiling", self.unbroken):
            raise InputError(f"two unbroken runs are not the same ({found}): nothing can be said about broken ones")

    def trial(self, number: int, kills: Iterator[tuple[str, float]]) -> Trial:
        """kills: ('', seconds after the start) or (fault point, step); then the run is left to finish."""
        trial = Trial(number, self.out / f"trial_{number}")
        shutil.rmtree(trial.directory, ignore_errors=True)
        arguments, log = self.command(trial.directory), self.out / f"trial_{number}.log"
        try:
            for point, when in kills:
                began = time.monotonic()
                if point:
                    trial.kills.append(killed_at(point, int(when), arguments, trial.directory, log))
                elif kill := killed_after(when, arguments, trial.directory, log):
                    trial.kills.append(kill)
                else:
                    if not trial.kills:  # a whole run, and a quicker one than was thought
                        self.seconds = min(self.seconds, time.monotonic() - began)
                    break
            finish(arguments, log)
            trial.verdict = difference(self.unbroken, trial.directory) or "same"
        except (RuntimeError, InputError) as error:
            trial.verdict = f"lost: {error}"
        if trial.verdict == "same":
            shutil.rmtree(trial.directory)
        return trial

    def random_kills(self, rng: random.Random) -> Iterator[tuple[str, float]]:
        """One to three moments, each uniform over the wall time of the unbroken run."""
        for _ in range(rng.choice((1, 1, 2, 3))):
            yield "", rng.uniform(0.0, self.seconds)

    def aimed_kill(self, phase: str, rng: random.Random) -> Iterator[tuple[str, float]]:
        """One kill at the beginning of ``phase``, at a step that has it."""
        every = {"evaluate": EVALUATE_EVERY, "save": SAVE_EVERY} | dict.fromkeys(IN_A_SAVE, SAVE_EVERY)
        if phase == "start":  # long before the run directory is open
            yield "", rng.uniform(0.0, 1.0)
            return
        total = STEPS[self.stage]
        if phase == "end":
            yield phase, total
            return
        yield phase, rng.randrange(1, total // every.get(phase, 1) + 1) * every.get(phase, 1)


def make_inputs(stage: str, directory: Path) -> Path:
    """Run what comes before ``stage``; finished stages are skipped."""
    for name in list(CHAIN)[: list(CHAIN).index(stage)]:
        if name == "reward" and stage != "ppo":
            continue
        directory.mkdir(parents=True, exist_ok=True)
        done = directory / f"{name}.done"
        if not done.is_file():
            print(f"making {directory / name}", file=sys.stderr, flush=True)
            finish(command(name, directory, directory / name), directory / f"{name}.log")
            done.touch()
    return directory


def main() -> int:
    """Exit code; see the top of this file."""
    stage, out = FLAGS.stage, Path(FLAGS.out).absolute()
    inputs = Path(FLAGS.inputs).absolute() if FLAGS.inputs else make_inputs(stage, out / "inputs")
    chaos, rng = Chaos(stage, out, inputs), random.Random(f"{stage} {FLAGS.seed}")
    chaos.leave_alone()
    print(f"unbroken: {chaos.seconds:.1f} s", file=sys.stderr, flush=True)
    trials: list[Trial] = []

    def add(kills: Iterator[tuple[str, float]]) -> None:
        trials.append(chaos.trial(len(trials) + 1, kills))
        told = ", ".join(kill.phase for kill in trials[-1].kills)
        print(f"trial {trials[-1].number}: {told}: {trials[-1].verdict}", file=sys.stderr, flush=True)

    while len(trials) < FLAGS.trials:
        add(chaos.random_kills(rng))
        if not trials[-1].kills and trials[-1].verdict == "same":
            trials.pop()  # it was done before its moment came: no trial
    for phase in PHASES[stage] if FLAGS.aimed else ():
        if not hit(trials, PHASES[stage])[phase]:
            add(chaos.aimed_kill(phase, rng))
    text = table(stage, PHASES[stage], chaos.seconds, trials)
    (chaos.out / "table.md").write_text(text)
    print(text, end="")
    missed = [phase for phase in PHASES[stage] if FLAGS.aimed and not hit(trials, PHASES[stage])[phase]]
    if missed:
        print(f"never hit: {', '.join(missed)}", file=sys.stderr)
    return int(bool(missed) or any(trial.verdict != "same" for trial in trials))


if __name__ == "__main__":
    flags.DEFINE_enum("stage", "ppo", ["sft", "reward", "ppo"], "What is killed.")
    flags.DEFINE_integer("trials", 20, "Runs killed at random moments.", lower_bound=1)
    flags.DEFINE_bool("aimed", True, "Also kill once in every phase that no random kill hit.")
    flags.DEFINE_integer("seed", 0, "Of the moments.")
    flags.DEFINE_string("out", "runs/chaos", "Where everything goes.")
    flags.DEFINE_string(
        "inputs", "", "An existing run of configs/smoke/pipeline.gin to start from, instead of OUT/inputs."
    )
    sys.exit(run_command(main, sys.argv, __doc__ or "", ("stage", "trials", "aimed", "seed", "out", "inputs")))
