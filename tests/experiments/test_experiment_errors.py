"""Mistakes of users: one line on stderr with the place and the remedy, exit code 2, nothing written.

One process imports the package and forks itself for each case (importing takes seconds); what runs in the fork is the
real script with a real command line.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from experiment_processes import ROOT
from forked_programs import Server


class Case(NamedTuple):
    """bindings: after the config's own; {chain} and {tmp} stand for directories. message: what the line begins with."""

    experiment: str
    config: str
    bindings: list[str]
    message: str
    flags: tuple[str, ...] = ()


SFT, REWARD, PPO = ("train_sft", "sft"), ("train_reward", "reward"), ("train_ppo", "ppo")
GENERATE, EVALUATE, PIPELINE = ("generate", "completions"), ("evaluate", "evaluate"), ("pipeline", "pipeline")
CASES = {
    # flags and files
    "unknown flag": Case(
        *SFT, [], "Unknown command line flag 'gin_bindigs'. Did you mean: gin_bindings", ("--gin_bindigs=x",)
    ),
    "argument": Case(*PPO, [], "unexpected argument 'run.steps=3'; everything is a flag", ("run.steps=3",)),
    "missing gin file": Case("train_sft", "sfd", [], "--gin_file=configs/smoke/sfd.gin: no such gin file"),
    "config of another experiment": Case(
        "train_reward", "base", ["BatchConfig.packed = False"], "Comparison records are needed here, got Demonstration"
    ),
    # keys
    "unknown key": Case(
        *SFT, ["run.step = 3"], "--gin_bindings='run.step = 3': unknown parameter 'step' of run; did you mean 'steps'?"
    ),
    "unknown configurable": Case(
        *PPO,
        ["PPOConfg.epochs = 3"],
        "--gin_bindings='PPOConfg.epochs = 3': unknown configurable 'PPOConfg'; did you mean 'PPOConfig'?",
    ),
    "dead key": Case(
        *SFT,
        ["MeshConfig.data = 1"],
        "--gin_bindings='MeshConfig.data = 1': MeshConfig.data: bound but nothing reads it",
    ),
    "dead macro": Case(
        *GENERATE, ["BASE = 'x'"], "--gin_bindings=\"BASE = 'x'\": BASE (macro): bound but nothing reads it"
    ),
    "unknown macro": Case(*SFT, ["run.steps = %STEPS"], "--gin_bindings='run.steps = %STEPS': unknown macro %STEPS"),
    "not gin": Case(*SFT, ["run.steps : 3"], "--gin_bindings='run.steps : 3': cannot read gin"),
    # scopes
    "wrong scope": Case(
        *PPO,
        ["polcy/OptimizerConfig.b1 = 0.8"],
        "--gin_bindings='polcy/OptimizerConfig.b1 = 0.8': polcy/OptimizerConfig.b1: bound but nothing reads it",
    ),
    "scope without its values": Case(
        *PPO,
        ["run.policy = @polcy/ModelSource()"],
        "polcy/ModelSource: give either path (an existing model) or config (a new one)",
    ),
    # types
    "number in quotes": Case(
        *SFT, ["run.steps = '3'"], "--gin_bindings=\"run.steps = '3'\": run.steps = '3': must be a whole"
    ),
    "fraction of a step": Case(
        *REWARD, ["run.steps = 2.5"], "--gin_bindings='run.steps = 2.5': run.steps = 2.5: must be a whole"
    ),
    "text as truth": Case(
        *SFT,
        ["BatchConfig.packed = 'no'"],
        "--gin_bindings=\"BatchConfig.packed = 'no'\": BatchConfig.packed = 'no': must be True or False",
    ),
    "reference without parentheses": Case(
        *GENERATE,
        ["run.sampling = @SamplingConfig"],
        "--gin_bindings='run.sampling = @SamplingConfig': run.sampling = @SamplingConfig: must be a reference that gives "
        "SamplingConfig, '@...()'; write @SamplingConfig()",
    ),
    "reference to another kind": Case(
        *EVALUATE,
        ["run.prompts = @desk_gold()"],
        "--gin_bindings='run.prompts = @desk_gold()': run.prompts = @desk_gold(): must be a reference that "
        "gives RecordSource",
    ),
    "list of the wrong things": Case(
        *EVALUATE,
        ["run.policies = ['base']"],
        "--gin_bindings=\"run.policies = ['base']\": run.policies = ['base']: must be",
    ),
    # values
    "out of range": Case(
        *SFT,
        ["OptimizerConfig.b1 = 1.5"],
        "--gin_bindings='OptimizerConfig.b1 = 1.5': OptimizerConfig.b1 = 1.5: give a number",
    ),
    "a file of another program": Case(
        "train_sft",
        "dpo",
        [],
        "{root}/configs/smoke/dpo.gin:N: unknown parameter 'dpo' of run",
        ("--plan=local",),
    ),
    "a plan and a check at once": Case(
        *SFT, [], "--plan, --doctor, --preview: give one of them", ("--plan=local", "--doctor")
    ),
    "rollouts of an older policy, uncorrected": Case(
        *PPO,
        ["run.one_step_off = True"],
        "run.one_step_off: rollouts are of an older policy; weigh them with PPOConfig.imp",
    ),
    "no steps": Case(*SFT, ["run.steps = 0"], "run.steps = 0: give a whole number >= 1"),
    "negative seed": Case(*SFT, ["SEED = -1"], "seed = -1: must lie in [0, 2**32)"),
    "a policy as the reward model": Case(
        *PPO, ["REWARD = '{chain}/sft'"], "{chain}/sft: has no scalar head: it is no reward or value model"
    ),
    "a policy as the judge": Case(
        *EVALUATE, ["REWARD = '{chain}/sft'"], "{chain}/sft: has no scalar head: it is no reward or value model"
    ),
    "negative steps": Case(*SFT, ["run.steps = -1"], "run.steps = -1: give a whole number >= 1"),
    "negative centring": Case(*REWARD, ["run.centring = -0.01"], "run.centring = -0.01: give a number >= 0"),
    "packing pairs": Case(*REWARD, ["BatchConfig.packed = True"], "BatchConfig.packed = True: has no effect here"),
    "packing prompts": Case(*PPO, ["BatchConfig.packed = True"], "BatchConfig.packed = True: has no effect here"),
    "evaluating in PPO": Case(*PPO, ["LoopConfig.evaluate_every = 2"], "LoopConfig.evaluate_every = 2: has no effect"),
    "microbatches to sample": Case(*GENERATE, ["BatchConfig.microbatches = 2"], "BatchConfig.microbatches = 2: has no"),
    "microbatches to evaluate": Case(
        *EVALUATE, ["BatchConfig.microbatches = 2"], "BatchConfig.microbatches = 2: has no"
    ),
    "a mesh that does not fit": Case(
        *SFT,
        ["run.mesh = @MeshConfig()", "MeshConfig.data = 3"],
        "MeshConfig",
    ),
    "two rewards": Case(*PPO, ["run.reward_texts = @desk_gold()"], "run.reward, run.reward_texts: give exactly one"),
    "rows that do not divide": Case(*PPO, ["PPOConfig.minibatches = 3"], "a rollout of 16 rows does not divide into"),
    "prompts too long for the model": Case(
        *GENERATE,
        ["SamplingConfig.max_new_tokens = 100"],
        "BatchConfig.length + SamplingConfig.max_new_tokens: sequences of 196 tokens; the model's max_length is 160",
    ),
    "annotator with one sample": Case(*GENERATE, ["run.samples = 1"], "run.annotator: compares two scored responses"),
    "nothing held out": Case(
        *REWARD,
        ["comparison_file.heldout = 1e-9"],
        "comparison_file.heldout = 1e-09: the held-out side is empty",
    ),
    "one name twice": Case(
        *EVALUATE,
        ["run.policies = [('a', %BASE), ('a', %SFT), ('b', %PPO)]"],
        "run.policies: two have the same name",
    ),
    # paths
    "no such model": Case(*SFT, ["BASE = '{tmp}/absent'"], "{tmp}/absent: no such file or directory"),
    "a directory that is no model": Case(
        *SFT, ["BASE = '{chain}'"], "{chain}: neither a run directory (model.json) nor"
    ),
    "no such data": Case(
        *REWARD,
        ["COMPARISONS = '{tmp}/absent.jsonl'"],
        "{tmp}/absent.jsonl: no such file",
    ),
    "foreign run directory": Case(
        *SFT, ["RUN_DIR = '{tmp}/photos'"], "{tmp}/photos: not empty and not a run (a.jpg is there)"
    ),
    "run directory below a file": Case(
        *SFT, ["RUN_DIR = '{tmp}/photos/a.jpg/run'"], "{tmp}/photos/a.jpg/run: cannot make it"
    ),
    "run directory of another stage": Case(
        *SFT, ["RUN_DIR = '{chain}/completions'"], "{chain}/completions: belongs to a run of"
    ),
    "resumed with another rate": Case(
        *SFT,
        ["RUN_DIR = '{chain}/sft'", "OptimizerConfig.learning_rate = 0.5"],
        "OptimizerConfig.learning_rate changed from 0.005 to 0.5: may not change on resume",
    ),
    "resumed with fewer steps": Case(
        *SFT, ["RUN_DIR = '{chain}/sft'", "run.steps = 3"], "{chain}/sft: already at step 12, asked for 3"
    ),
    # pipelines
    "unknown experiment": Case(
        *PIPELINE,
        ["base/Stage.experiment = 'train_sfd'"],
        "--gin_bindings=\"base/Stage.experiment = 'train_sfd'\": base/Stage.experiment = 'train_sfd': no experiments/",
    ),
    "stage file missing": Case(
        *PIPELINE, ["sft/Stage.gin_file = 'x.gin'"], "--gin_file=x.gin: no such gin file 'x.gin'"
    ),
    "macro of a stage": Case(
        *PIPELINE,
        ["sft/Stage.macros = (('BASIS', 'base'),)"],
        "sft/Stage.macros: configs/smoke/sft.gin has no macro BASIS; it defines BASE, DESK, RUN_DIR, SEED",
    ),
    "stage read too early": Case(
        *PIPELINE,
        ["sft/Stage.macros = (('BASE', 'ppo'),)"],
        "sft/Stage.macros: BASE = 'ppo' is not below a stage before it (base)",
    ),
    "two stages of one name": Case(*PIPELINE, ["sft/Stage.name = 'base'"], "run.stages: two are named 'base'"),
    "pipeline into a foreign directory": Case(
        *PIPELINE, ["RUN_DIR = '{tmp}/photos'"], "{tmp}/photos: not empty and not a pipeline's (a.jpg is there)"
    ),
}
PLACES = {
    "sft": {"BASE": "base"},
    "completions": {"POLICY": "sft"},
    "reward": {"POLICY": "sft", "COMPARISONS": "completions/comparisons.jsonl"},
    "dpo": {"POLICY": "sft", "COMPARISONS": "completions/comparisons.jsonl"},
    "ppo": {"POLICY": "sft", "REWARD": "reward"},
    "evaluate": {"BASE": "base", "SFT": "sft", "PPO": "ppo", "REWARD": "reward"},
}


def contents(directory: Path) -> dict[str, bytes]:
    """Everything below a directory but lock files, which say who looked last."""
    paths = [path for path in directory.rglob("*") if path.name != ".lock"]
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in paths}


def launch(server: Server, argv: list[str], cwd: Path) -> str:
    """Runs a command that must fail as a user's mistake does; returns its one line."""
    result = server(cwd, argv)
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: "), result.stderr
    return result.stderr.removeprefix("error: ")


@pytest.mark.parametrize("name", CASES)
def test_one_line_exit_code_2_nothing_written(name: str, chain: Path, tmp_path: Path, server) -> None:
    case = CASES[name]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    macros = {"RUN_DIR": tmp_path / "run"} | {key: chain / path for key, path in PLACES.get(case.config, {}).items()}
    bindings = [f"{key} = '{path}'" for key, path in macros.items()]
    bindings += [text.format(chain=chain, tmp=tmp_path) for text in case.bindings]
    script = str(ROOT / "experiments" / f"{case.experiment}.py")
    checked = [str(ROOT / "tests" / "forked_children.py"), "check"] if case.experiment == "pipeline" else []
    argv = [
        *checked,
        script,
        f"--gin_file=configs/smoke/{case.config}.gin",
        *(f"--gin_bindings={text}" for text in bindings),
    ]
    looked_at = chain if any("{chain}" in text for text in case.bindings) else tmp_path / "photos"
    before = contents(looked_at)
    line = launch(server, [*argv, *case.flags], tmp_path)
    line = re.sub(r"\.gin:\d+:", ".gin:N:", line)
    assert line.startswith(case.message.format(chain=chain, tmp=tmp_path, root=ROOT))
    assert sorted(os.listdir(tmp_path)) == ["photos", "stderr", "stdout"]
    assert os.listdir(tmp_path / "photos") == ["a.jpg"]
    assert contents(looked_at) == before


def test_a_score_that_the_reward_does_not_give(chain: Path, tmp_path: Path, server) -> None:
    """Known only once something was scored; nothing of the run is left even so."""
    text = (ROOT / "configs" / "smoke" / "ppo.gin").read_text()
    remaining = [line for line in text.splitlines() if "REWARD" not in line and "reward" not in line]
    config = tmp_path / "gold.gin"
    config.write_text("\n".join([*remaining, "run.reward_texts = @desk_gold()", "run.reward_key = 'golf'"]))
    bindings = [f"--gin_bindings=RUN_DIR = '{tmp_path / 'run'}'", f"--gin_bindings=POLICY = '{chain / 'sft'}'"]
    line = launch(server, [str(ROOT / "experiments" / "train_ppo.py"), f"--gin_file={config}", *bindings], tmp_path)
    assert line.startswith("run.reward_key = 'golf': reward_texts gives gold, gold/fact, gold/honesty")
    assert not (tmp_path / "run").exists()


def test_an_evaluation_with_nothing_to_score(chain: Path, tmp_path: Path, server) -> None:
    """Bound to None, reward's own keys would be dead bindings: the file leaves both out."""
    text = (ROOT / "configs" / "smoke" / "evaluate.gin").read_text()
    removed = ("REWARD", "run.reward", "ModelSource", "run.score_texts")
    config = tmp_path / "unscored.gin"
    config.write_text("\n".join(line for line in text.splitlines() if not line.startswith(removed)))
    places = {"RUN_DIR": tmp_path / "run"} | {key: chain / key.lower() for key in ("BASE", "SFT", "PPO")}
    bindings = [f"--gin_bindings={key} = '{place}'" for key, place in places.items()]
    line = launch(server, [str(ROOT / "experiments" / "evaluate.py"), f"--gin_file={config}", *bindings], tmp_path)
    assert line.startswith("run.score_texts, run.reward: nothing to score with; give one of them, or both")
    assert not (tmp_path / "run").exists()
