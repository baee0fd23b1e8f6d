"""Every gin file below configs/ names its command, and that command builds: no unknown, unused or mistyped binding."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.gin"))
EXPERIMENTS = sorted(path.stem for path in (ROOT / "experiments").glob("*.py"))
Check = Callable[[list[str]], dict]


def header(text: str) -> list[str]:
    """Return the comment lines at the top, without their #."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].strip())
    return lines


def command_of(text: str) -> list[str] | None:
    """Return the words of the first command in the header, continued lines joined; None when there is none."""
    joined = re.sub(r"\\\n", " ", "\n".join(header(text)))
    match = re.search(r"^python (.*)$", joined, re.MULTILINE)
    return shlex.split(match[1]) if match else None


def problem(file: Path, check: Check) -> str:
    """Describe the problem of a config that has its own command; '' when there is none."""
    command = command_of(file.read_text())
    if command is None:
        return "the comment at its top names no command, 'python experiments/X.py --gin_file=...'"
    script = ROOT / command[0]
    if script.parent != ROOT / "experiments" or script.stem not in EXPERIMENTS:
        return f"its command runs {command[0]}, which is no experiment ({', '.join(EXPERIMENTS)})"
    name = file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else str(file)
    if f"--gin_file={name}" not in command:
        return f"its command does not say --gin_file={name}"
    verdict = check([str(script), *command[1:]])
    for stage in verdict["stages"]:
        stage_command = command_of((ROOT / stage[1].removeprefix("--gin_file=")).read_text())
        if stage_command is None or ROOT / stage_command[0] != Path(stage[0]):
            return f"a stage runs {stage[1]} with {Path(stage[0]).name}, but its own command is {stage_command}"
        if message := check(stage)["message"]:
            return f"a stage, {shlex.join(stage)}: {message}"
    return verdict["message"]


@pytest.fixture(scope="module")
def check() -> Iterator[Check]:
    command = [sys.executable, str(ROOT / "tests" / "config_check.py")]
    with subprocess.Popen(command, cwd=ROOT, stdin=PIPE, stdout=PIPE, text=True) as process:

        def ask(argv: list[str]) -> dict:
            assert process.stdin is not None and process.stdout is not None
            print(json.dumps(argv), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield ask


def is_fragment(file: Path) -> bool:
    """Return whether another config includes this file, which then has no command of its own."""
    name = file.relative_to(ROOT).as_posix()
    return any(f"include '{name}'" in other.read_text() for other in CONFIGS)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.relative_to(ROOT / "configs").as_posix())
def test_config_builds(file: Path, check: Check) -> None:
    if command_of(file.read_text()) is None:
        assert is_fragment(file), f"{file}: names no command, and no other config includes it"
        return
    assert problem(file, check) == ""


def test_every_experiment_has_a_smoke_config() -> None:
    smoke = [command_of(file.read_text()) for file in CONFIGS if file.parent.name == "smoke"]
    assert {Path(command[0]).stem for command in smoke if command} == set(EXPERIMENTS) - {
        "doctor",
        "export",
        "plan",
        "sweep",
    }  # which take those of others, or none


def test_smoke_configs_say_what_was_measured() -> None:
    for file in CONFIGS:
        if file.parent.name == "smoke" and command_of(file.read_text()):
            top = "\n".join(header(file.read_text()))
            for word in ("Measured on", "Expected:", "Must exist:"):
                assert word in top, (file, word)


GOOD = """\
include 'configs/smoke/desk.gin'
RUN_DIR = 'runs/x'
BASE = 'runs/base'
run.run_dir = %RUN_DIR
run.steps = 3
run.model = @ModelSource()
ModelSource.path = %BASE
run.records = @desk_demonstrations()
desk_demonstrations.desk = %DESK
desk_demonstrations.start = 0
desk_demonstrations.count = 20
run.batch = @BatchConfig()
BatchConfig.length = 64
run.optimizer = @OptimizerConfig()
run.loop = @LoopConfig()
"""


def test_the_check_lets_a_good_config_through(tmp_path: Path, check: Check) -> None:
    file = tmp_path / "x.gin"
    file.write_text(f"# python experiments/train_sft.py --gin_file={file}\n" + GOOD)
    assert problem(file, check) == ""


@pytest.mark.parametrize(
    ("top", "more", "message"),
    [
        pytest.param("# SFT\n", "", "names no command", id="no command"),
        pytest.param(
            "# python train_sft.py --gin_file={file}\n", "", "train_sft.py, which is no experiment", id="no script"
        ),
        pytest.param(
            "# python experiments/train_sft.py --gin_file=configs/y.gin\n", "", "does not say", id="other file"
        ),
        pytest.param(
            "# python experiments/evaluate.py --gin_file={file}\n", "", "unknown parameter", id="other script"
        ),
        pytest.param(
            None, "run.step = 3\n", "unknown parameter 'step' of run; did you mean 'steps'?", id="unknown key"
        ),
        pytest.param(None, "Optimizer.b1 = 0.9\n", "unknown configurable 'Optimizer'", id="unknown configurable"),
        pytest.param(None, "run.model = @Source()\n", "unknown configurable 'Source'", id="unknown reference"),
        pytest.param(None, "PPOConfig.epochs = 2\n", "PPOConfig.epochs: bound but nothing reads it", id="dead binding"),
        pytest.param(None, "EXTRA = 2\n", "EXTRA (macro): bound but nothing reads it", id="dead macro"),
        pytest.param(
            None, "a/BatchConfig.length = 9\n", "a/BatchConfig.length: bound but nothing reads it", id="wrong scope"
        ),
        pytest.param(None, "run.steps = '3'\n", "run.steps = '3': must be a whole number", id="wrong type"),
        pytest.param(
            None,
            "run.records = @OptimizerConfig()\n",
            "must be a reference that gives RecordSource",
            id="wrong reference",
        ),
        pytest.param(None, "OptimizerConfig.b1 = 1.5\n", "OptimizerConfig.b1 = 1.5: give a number", id="out of range"),
        pytest.param(
            None, "desk_demonstrations.start = -1\n", "start = -1: give a whole number >= 0", id="a builder refuses"
        ),
        pytest.param(None, "include 'configs/none.gin'\n", "no such gin file 'configs/none.gin'", id="missing file"),
        pytest.param(None, "run.steps = %STEPS\n", "unknown macro %STEPS", id="unknown macro"),
        pytest.param(None, "run.steps = (3\n", "cannot read gin", id="not gin"),
    ],
)
def test_the_check_can_fail(top: str | None, more: str, message: str, tmp_path: Path, check: Check) -> None:
    file = tmp_path / "x.gin"
    top = top or "# python experiments/train_sft.py --gin_file={file}\n"
    file.write_text(top.format(file=file) + GOOD + more)
    assert message in problem(file, check)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("ModelConfig.vocab_size = 100\n", "ModelConfig.vocab_size = 100: the tokenizer has"),
        (
            "ModelConfig.num_heads = 3\nModelConfig.num_kv_heads = 2\n",
            "num_heads = 3 is not a multiple of num_kv_heads",
        ),
    ],
)
def test_the_check_looks_at_new_models(more: str, message: str, tmp_path: Path, check: Check) -> None:
    file = tmp_path / "x.gin"
    base = (ROOT / "configs" / "smoke" / "base.gin").read_text().splitlines(keepends=True)
    lines = [line for line in base if not line.startswith("#") and "documents" not in line]
    file.write_text(f"# python experiments/train_sft.py --gin_file={file}\n" + "".join(lines) + more)
    assert message in problem(file, check)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("sft/Stage.macros = (('BASIS', 'base'),)\n", "has no macro BASIS"),
        ("sft/Stage.bindings = ('run.step = 3',)\n", "unknown parameter 'step' of run"),
        (
            "sft/Stage.experiment = 'train_reward'\n",
            "a stage runs --gin_file=configs/smoke/sft.gin with train_reward.py",
        ),
    ],
)
def test_the_check_looks_at_the_stages_of_a_pipeline(more: str, message: str, tmp_path: Path, check: Check) -> None:
    file = tmp_path / "x.gin"
    text = (ROOT / "configs" / "smoke" / "pipeline.gin").read_text().replace("configs/smoke/pipeline.gin", str(file))
    file.write_text(text + more)
    assert message in problem(file, check)
