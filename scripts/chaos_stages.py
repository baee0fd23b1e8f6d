"""The stages that scripts/chaos.py kills: their commands, their phases, and the comparison of two results."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from rlhf_jax.testing.same_run import difference

ROOT = Path(__file__).resolve().parents[1]
IN_A_SAVE = ("write", "hash", "commit", "retain")
SUPERVISED = ("train", "log", "evaluate", "save", "end", *IN_A_SAVE)
ROLLOUTS = ("rollout", "score", "reward", "prepare", "update", "log", "save", "end", *IN_A_SAVE)
SAVE_EVERY, EVALUATE_EVERY = 2, 4
FILES = (
    "completions.jsonl",
    "comparisons.jsonl",
    "annotation.json",
    "summary.csv",
    "config.json",
    "generation_config.json",
    "template.json",
    "model.safetensors",
    "tokenizer.json",
)
"""Of programs that save no steps: the same bytes. Others hold times, commits or paths."""


@dataclass(frozen=True)
class Stage:
    """One thing to kill.

    script: below the repository. config: below configs/smoke; '' for none. needs: {macro or flag: stage and path below it}.
    steps: 0 for a program that saves no steps. phases: fault points beyond 'start', which is before the run is open.
    bindings: more gin bindings. flags: more flags, {run} is the run directory.
    """

    script: str
    config: str = ""
    needs: tuple[tuple[str, str], ...] = ()
    steps: int = 0
    phases: tuple[str, ...] = ()
    bindings: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


POLICY, REWARD = ("POLICY", "sft"), ("REWARD", "reward")
COMPARISONS = ("COMPARISONS", "completions/comparisons.jsonl")
OF_POLICY = (POLICY, REWARD)
STAGES = {
    "base": Stage("experiments/train_sft.py", "base"),
    "sft": Stage("experiments/train_sft.py", "sft", (("BASE", "base"),), 32, SUPERVISED),
    "completions": Stage("experiments/generate.py", "completions", (POLICY,)),
    "reward": Stage("experiments/train_reward.py", "reward", (POLICY, COMPARISONS), 48, SUPERVISED),
    "ppo": Stage("experiments/train_ppo.py", "ppo", OF_POLICY, 12, ROLLOUTS),
    "grpo": Stage("experiments/train_grpo.py", "grpo", OF_POLICY, 12, ROLLOUTS),
    "dpo": Stage("experiments/train_dpo.py", "dpo", (POLICY, COMPARISONS), 24, SUPERVISED),
    "ppo_lora": Stage("experiments/train_ppo.py", "ppo_lora", OF_POLICY, 10, ROLLOUTS),
    "one_step_off": Stage(
        "experiments/train_ppo.py", "ppo", OF_POLICY, 12, ROLLOUTS, bindings=("run.one_step_off = True",)
    ),
    "sync": Stage(
        "experiments/train_sft.py", "sft", (("BASE", "base"),), 24, SUPERVISED, flags=("--sync=file://{run}.mirror",)
    ),
    "rollback": Stage(
        "experiments/train_sft.py",
        "sft",
        (("BASE", "base"),),
        24,
        SUPERVISED,
        bindings=(
            "LoopConfig.on_bad_step = 'rollback'",
            "LoopConfig.bad_steps = 50",
            "LoopConfig.faults = [@bad/Fault()]",
            "bad/Fault.point = 'log'",
            "bad/Fault.action = 'nan'",
            "bad/Fault.step = 7",
        ),
    ),
    "evaluate": Stage(
        "experiments/evaluate.py", "evaluate", (("BASE", "base"), ("SFT", "sft"), ("PPO", "ppo"), REWARD)
    ),
    "export": Stage("experiments/export.py", flags=("--run_dir={inputs}/sft", "--out={run}")),
    "sweep": Stage(
        "experiments/sweep.py",
        "base",
        flags=("--experiment=train_sft", "--grid=OptimizerConfig.learning_rate=1e-3,1e-2", "--out={run}"),
        bindings=("run.steps = 6", "LoopConfig.save_every = 2", "LoopConfig.progress = False"),
    ),
    "pipeline": Stage("experiments/pipeline.py", "pipeline"),
}
KILLED = [name for name in STAGES if name != "base"]
ORDER = ("base", "sft", "completions", "reward", "ppo")
"""What others start from, in the order in which it is made."""


def inputs_of(name: str) -> list[str]:
    """List the stages that must have run before ``name``, in order."""
    stage = STAGES[name]
    expected = {path.split("/")[0] for _, path in stage.needs} | ({"sft"} if name == "export" else set())
    for created in reversed(ORDER):
        if created in expected:
            expected |= set(inputs_of(created))
    return [created for created in ORDER if created in expected]


def command(name: str, inputs: Path, run_dir: Path, *, whole: bool = True, more: tuple[str, ...] = ()) -> list[str]:
    """Return the command that starts (and resumes) ``name``. whole: with the steps and saves of a trial, else as configured."""
    stage = STAGES[name]
    bound = [f"{macro} = {str(inputs / path)!r}" for macro, path in stage.needs]
    if stage.config and not any("{run}" in flag for flag in stage.flags if flag.startswith("--out")):
        bound.append(f"RUN_DIR = {str(run_dir)!r}")
    if whole and stage.steps:
        bound += [f"run.steps = {stage.steps}", f"LoopConfig.save_every = {SAVE_EVERY}", "LoopConfig.keep = 2"]
        bound += ["LoopConfig.progress = False", "LoopConfig.tensorboard = False"]
        bound += [f"LoopConfig.evaluate_every = {EVALUATE_EVERY}"] * ("evaluate" in stage.phases)
    bound += [*(stage.bindings if whole else ()), *more]
    flags = [flag.format(run=run_dir, inputs=inputs) for flag in stage.flags]
    if stage.config:
        flags.append(f"--gin_file={ROOT}/configs/smoke/{stage.config}.gin")
    return [sys.executable, str(ROOT / stage.script), *flags, *(f"--gin_bindings={text}" for text in bound)]


def compare(unbroken: Path, broken: Path) -> str:
    """Return '' when two results are equal bit for bit, else 'different: ...' or 'lost: ...'.

    Every run with checkpoints in the two trees is compared as `difference` does; of other runs the files in `FILES`, and
    evaluation.json without its commit. Names that differ (temporary files left behind) are lost or left.
    """
    for place in sorted(path.parent for path in unbroken.rglob("checkpoints") if any(path.glob("[0-9]*"))):
        inner = place.relative_to(unbroken)
        if words := difference(place, broken / inner):
            return f"{words} ({inner})" if inner.parts else words
    for file in sorted(path for path in unbroken.rglob("*") if path.name in FILES and "checkpoints" not in path.parts):
        inner = file.relative_to(unbroken)
        if not (broken / inner).is_file():
            return f"lost: {inner}"
        if (broken / inner).read_bytes() != file.read_bytes():
            return f"different: {inner}"
    remaining = [path.name for path in broken.rglob("*") if path.name.endswith((".tmp", ".saving", ".deleting"))]
    return f"different: {min(remaining)} is left behind" if remaining else ""
