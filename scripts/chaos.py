"""Kill programs at random moments and chosen calls, give the same command again, and compare the result with one left alone.

    python scripts/chaos.py --stage=ppo --trials=20
    python scripts/chaos.py --size=nightly                      # every stage, more than 200 kills, hours
    python scripts/chaos.py --size=ci                           # SFT, generate and a sweep, minutes

The tiny models of configs/smoke. Stages: every kind of training (sft, reward, dpo, ppo, grpo, ppo_lora, one_step_off, rollback,
sync), completions (generate), evaluate, export, sweep, pipeline. A trial is one result, whose program is killed (SIGKILL) once
to three times and then left to finish. Kills fall
- at moments uniform over the wall time of an unbroken run,
- in the first second,
- before or after one of the renames and fsyncs that the unbroken run makes (--calls),
- in every phase of a step and of a save that no other kill hit, by an injected fault (--aimed).
Before the command is given again nothing may still run on the result: what a killed parent started must save and leave by
itself (sweep, pipeline), and is an orphan otherwise.

Compared are, of every run in the result, metrics.jsonl byte for byte (no gap, no duplicate; of ppo it holds sums over the
log-probabilities of every sampled token), every array of the last checkpoint and what it keeps on the host; of the others what
they wrote. OUT/inputs (made once) holds what stages start from, OUT/STAGE the results and table.md. Lost: a trial that could
not be finished by its command, or lacks a step. Exit codes: 0 nothing lost, different or orphaned; 1 otherwise; 2 unusable flags.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags
from chaos_kills import calls, finish, kill_after, killed_by_itself, left_running, start
from chaos_stages import EVALUATE_EVERY, IN_A_SAVE, KILLED, SAVE_EVERY, STAGES, command, compare, inputs_of
from chaos_table import Kill, Trial, hit, sums, table

from rlhf_jax.errors import InputError
from rlhf_jax.launch.command import run_command

FLAGS = flags.FLAGS
SIZES = {
    "ci": {"sft": (2, 2), "completions": (1, 1), "sweep": (1, 1)},
    "nightly": {name: (8, 5) if STAGES[name].steps else (5, 4) for name in KILLED},
}
"""{size: {stage: (trials at moments, trials at calls)}}. A trial at moments has one to three kills, two on average; the first
of them, and every fourth, begins with one in the first second."""


@dataclass(frozen=True)
class Moment:
    """When to kill. point: '' for ``when`` seconds after the start, a fault point at step ``when``, or a call of chaos_hook
    ('rename 7 before')."""

    point: str
    when: float = 0.0


class Chaos:
    """The trials of one stage."""

    def __init__(self, stage: str, out: Path, inputs: Path) -> None:
        self.stage, self.out, self.inputs = stage, out / stage, inputs
        self.cache = out / "compilation_cache"
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        self.unbroken = self.out / "unbroken"
        self.seconds = 0.0

    @property
    def phases(self) -> tuple[str, ...]:
        return ("start", *STAGES[self.stage].phases)

    def leave_alone(self) -> None:
        """Make two unbroken results: the first compiles and counts calls, the second is the reference of the comparison."""
        for name, hook in (("compiling", {"CHAOS_COUNT": str(self.out / "calls")}), ("unbroken", {})):
            arguments, log = command(self.stage, self.inputs, self.out / name), self.out / f"{name}.log"
            began = time.monotonic()
            finish(start(arguments, log, self.cache, **hook), log)
            self.seconds = time.monotonic() - began
        if words := compare(self.out / "compiling", self.unbroken):
            raise InputError(f"two unbroken runs are not the same ({words}): nothing can be said about broken ones")

    def trial(self, number: int, moments: Iterator[Moment]) -> Trial:
        """Kill at each moment, then leave it to finish."""
        trial = Trial(number, self.out / f"trial_{number:03d}")
        log = self.out / f"{trial.directory.name}.log"
        try:
            for moment in moments:
                began = time.monotonic()
                kill = self.kill(moment, trial.directory, log)
                if orphans := left_running(trial.directory):
                    raise RuntimeError(f"orphan: {len(orphans)} processes went on without their parent")
                if kill is None:
                    if not trial.kills and not moment.point:  # a whole run, and a quicker one than was thought
                        self.seconds = min(self.seconds, time.monotonic() - began)
                    break
                trial.kills.append(kill)
            if (
                self.stage != "export" or not trial.directory.exists()
            ):  # an export is complete or absent, never written over
                finish(start(command(self.stage, self.inputs, trial.directory), log, self.cache), log)
            trial.verdict = compare(self.unbroken, trial.directory) or "same"
        except (RuntimeError, InputError, OSError) as error:
            trial.verdict = str(error) if str(error).startswith("orphan") else f"lost: {error}"
        if trial.verdict == "same":
            for place in (trial.directory, Path(f"{trial.directory}.mirror")):
                shutil.rmtree(place, ignore_errors=True)
        return trial

    def kill(self, moment: Moment, run_dir: Path, log: Path) -> Kill | None:
        """Kill the program once. Returns None when it ended well before; raises RuntimeError when it ended otherwise."""
        fault, hook = [], {}
        if " " in moment.point:
            hook = {"CHAOS_KILL_AT": moment.point}
        elif moment.point:
            fault = [f"kill/Fault.point = {moment.point!r}", f"kill/Fault.step = {int(moment.when)}"]
            fault += ["kill/Fault.action = 'kill'", f"LoopConfig.faults = [{self.faults()}@kill/Fault()]"]
        process = start(command(self.stage, self.inputs, run_dir, more=tuple(fault)), log, self.cache, **hook)
        if moment.point:
            kill = killed_by_itself(process, moment.point, int(moment.when), run_dir)
        else:
            kill = kill_after(moment.when, process, run_dir)
        if kill is None and process.returncode:
            raise RuntimeError(f"exit code {process.returncode}, see {log}")
        return kill

    def faults(self) -> str:
        return "@bad/Fault(), " if self.stage == "rollback" else ""

    def at_moments(self, rng: random.Random, early: bool) -> Iterator[Moment]:
        """Draw one to three moments, uniform over the wall time of the unbroken run. early: the first is in the first second."""
        for index in range(rng.choice((1, 2, 2, 3))):
            yield Moment("", rng.uniform(0.0, 1.0 if early and not index else self.seconds))

    def at_a_call(self, rng: random.Random) -> Iterator[Moment]:
        """Draw one or two of the calls that the unbroken run makes."""
        counted = calls(self.out / "calls")
        for _ in range(rng.choice((1, 2))):
            kind = rng.choice([kind for kind in sorted(counted) if counted[kind]])
            yield Moment(f"{kind} {rng.randint(1, counted[kind])} {rng.choice(('before', 'after'))}")

    def aimed(self, phase: str, rng: random.Random) -> Iterator[Moment]:
        """Kill once at the beginning of ``phase``, at a step that has it."""
        every = {"evaluate": EVALUATE_EVERY, "save": SAVE_EVERY} | dict.fromkeys(IN_A_SAVE, SAVE_EVERY)
        total = STAGES[self.stage].steps
        if phase == "start":
            yield Moment("", rng.uniform(0.0, 1.0))
        elif phase == "end":
            yield Moment(phase, total)
        else:
            yield Moment(phase, rng.randrange(1, total // every.get(phase, 1) + 1) * every.get(phase, 1))


def make_inputs(stage: str, out: Path) -> Path:
    """Run what comes before ``stage``, as its configurations say; finished stages are skipped."""
    if FLAGS.inputs:
        return Path(FLAGS.inputs).absolute()
    directory = out / "inputs"
    for name in inputs_of(stage):
        directory.mkdir(parents=True, exist_ok=True)
        completions, log = directory / f"{name}.done", directory / f"{name}.log"
        if not completions.is_file():
            say(f"making {directory / name}")
            arguments = command(name, directory, directory / name, whole=False)
            finish(start(arguments, log, out / "compilation_cache"), log)
            completions.touch()
    return directory


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def kill_stage(stage: str, moments: int, at_calls: int, out: Path) -> list[Trial]:
    """Run all trials of a stage; write and print its table."""
    chaos, rng = Chaos(stage, out, make_inputs(stage, out)), random.Random(f"{stage} {FLAGS.seed}")
    chaos.leave_alone()
    say(f"{stage} unbroken: {chaos.seconds:.1f} s")
    trials: list[Trial] = []

    def add(subject: Iterator[Moment]) -> None:
        trials.append(chaos.trial(len(trials) + 1, subject))
        printed = ", ".join(kill.phase for kill in trials[-1].kills)
        say(f"{stage} trial {trials[-1].number}: {printed}: {trials[-1].verdict}")

    tries = 0
    while len(trials) < moments and tries < 3 * moments:
        tries += 1
        add(chaos.at_moments(rng, early=len(trials) % 4 == 0))
        if not trials[-1].kills and trials[-1].verdict == "same":
            trials.pop()  # it was done before its moment came: no trial
    for _ in range(at_calls if calls(chaos.out / "calls") else 0):
        add(chaos.at_a_call(rng))
    for phase in chaos.phases if FLAGS.aimed and FLAGS.size != "ci" else ():
        if not hit(trials, chaos.phases)[phase]:
            add(chaos.aimed(phase, rng))
    text = table(stage, chaos.phases, chaos.seconds, trials)
    (chaos.out / "table.md").write_text(text)
    print(text, flush=True)
    return trials


def kill_or_give_up(stage: str, moments: int, at_calls: int, out: Path) -> list[Trial]:
    """Run `kill_stage`; a stage that fails without kills counts as one lost trial, and the other stages run."""
    try:
        return kill_stage(stage, moments, at_calls, out)
    except (RuntimeError, InputError, OSError) as error:
        say(f"{stage}: {error}")
        return [Trial(1, out / stage, verdict=f"lost: {error}")]


def main() -> int:
    """Exit code; see the top of this file."""
    out = Path(FLAGS.out).absolute()
    plan = SIZES[FLAGS.size] if FLAGS.size else {FLAGS.stage: (FLAGS.trials, FLAGS.calls)}
    trials = {stage: kill_or_give_up(stage, moments, at_calls, out) for stage, (moments, at_calls) in plan.items()}
    every = [trial for created in trials.values() for trial in created]
    print(sums(trials), end="")
    return int(any(trial.verdict != "same" for trial in every))


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[1])
    flags.DEFINE_enum("stage", "ppo", KILLED, "What is killed.")
    flags.DEFINE_enum("size", None, sorted(SIZES), "A set of stages with their numbers of trials, instead of --stage.")
    flags.DEFINE_integer("trials", 20, "Results killed at random moments.", lower_bound=0)
    flags.DEFINE_integer("calls", 6, "Results killed at a rename or an fsync.", lower_bound=0)
    flags.DEFINE_bool("aimed", True, "Also kill once in every phase that no other kill hit.")
    flags.DEFINE_integer("seed", 0, "Of the moments.")
    flags.DEFINE_string("out", "runs/chaos", "Where everything goes.")
    flags.DEFINE_string(
        "inputs", "", "An existing run of configs/smoke/pipeline.gin to start from, instead of OUT/inputs."
    )
    names = ("stage", "size", "trials", "calls", "aimed", "seed", "out", "inputs")
    sys.exit(run_command(main, sys.argv, __doc__ or "", names))
