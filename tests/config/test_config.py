"""Errors in a configuration end in one line with the place and the remedy. Real processes, real files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from forked_programs import Result, Server

from rlhf_jax.config.gin_errors import Name
from rlhf_jax.config.parsing import Change, changes, fingerprint_bindings, key_to_bind, scan
from rlhf_jax.errors import InputError

PROGRAM = '''
"""Trains a toy."""
from dataclasses import dataclass
import os, sys
import gin
from rlhf_jax.config import bound_config; from rlhf_jax.launch import launch
from rlhf_jax.errors import InputError, RunStopped

@gin.register
@dataclass(frozen=True)
class ToyConfig:
    learning_rate: float
    decay: float = 0.0
    def __post_init__(self):
        if not self.learning_rate > 0:
            raise InputError(f"ToyConfig.learning_rate: must be > 0, got {self.learning_rate!r}")

@gin.register
def built(size: int = 1):
    return [0] * (4 // size)

@gin.configurable
def run(optimizer, steps=3, other=None, crash=""):
    bound = bound_config()
    if crash == "input":
        raise InputError("data/x.jsonl:12: no field 'prompt'; add it")
    if crash == "stopped":
        raise RunStopped("step 7: not finite: loss=nan")
    if crash == "bug":
        raise ValueError("a bug")
    print("operative:", "ToyConfig.decay = 0.0" in bound.operative, optimizer.learning_rate, steps)

if __name__ == "__main__":
    launch(run)
'''
GOOD = """\
LR = 0.5
run.optimizer = @ToyConfig()
ToyConfig.learning_rate = %LR
"""


@pytest.fixture
def program(tmp_path: Path, server: Server) -> Callable[..., Result]:
    """Return a function that runs the toy program on the text of x.gin (which may include shared.gin)."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "shared.gin").write_text("UNUSED = 1\nSHARED = 2.0\n")

    def call(text: str, *arguments: str, file: str = "x.gin") -> Result:
        (tmp_path / "x.gin").write_text(text)
        return server(tmp_path, ["program.py", f"--gin_file={file}", *arguments])

    return call


def test_a_good_config_runs(program) -> None:
    result = program('include "shared.gin"\n' + GOOD, "--gin_bindings=run.steps = 9", "--gin_bindings=LR = %SHARED")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "operative: True 2.0 9\n"


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        pytest.param(
            GOOD + "ToyConfig.learning_rat = 1\n",
            [],
            "x.gin:4: unknown parameter 'learning_rat' of ToyConfig; did you mean 'learning_rate'? "
            "known: decay, learning_rate",
            id="unknown parameter",
        ),
        pytest.param(
            GOOD + "\nToyConfg.decay = 1\n",
            [],
            "x.gin:5: unknown configurable 'ToyConfg'; did you mean 'ToyConfig'? known: AnnotatorConfig, ",
            id="unknown configurable",
        ),
        pytest.param(
            GOOD + "run.other = @bilt()\n",
            [],
            "x.gin:4: unknown configurable 'bilt'; did you mean 'built'? known: AnnotatorConfig, ",
            id="unknown reference",
        ),
        pytest.param(
            GOOD,
            ["--gin_bindings=run.step = 1"],
            "--gin_bindings='run.step = 1': unknown parameter 'step' of run; did you mean 'steps'? "
            "known: crash, optimizer, other, steps",
            id="unknown parameter on the command line",
        ),
        pytest.param(
            GOOD + "run.steps = %STEPS\n",
            [],
            "x.gin:4: unknown macro %STEPS: define it (STEPS = ...) before the run",
            id="unknown macro",
        ),
        pytest.param(GOOD + "run.steps = = 3\n", [], "x.gin:4: cannot read gin: Unable to parse value.", id="syntax"),
        pytest.param(GOOD + "run.steps = (3,\n", [], "x.gin:", id="open bracket"),
        pytest.param(GOOD + 'include "no.gin"\n', [], "x.gin:4: no such gin file 'no.gin'", id="missing include"),
        pytest.param(GOOD + 'include "x.gin"\n', [], "x.gin:4: 'x.gin' includes itself", id="include cycle"),
        pytest.param(
            GOOD + "ToyConfig.learning_rate = -1.0\n",
            [],
            "x.gin:4: ToyConfig.learning_rate: must be > 0, got -1.0",
            id="out of range",
        ),
        pytest.param(
            "run.optimizer = @ToyConfig()\n",
            [],
            "ToyConfig.learning_rate has no value; bind it: --gin_bindings='ToyConfig.learning_rate = ...'",
            id="no value",
        ),
        pytest.param(
            GOOD + "ToyConfig.learning_rate = 'big'\n",
            [],
            "x.gin:4: ToyConfig.learning_rate = 'big': must be a number",
            id="wrong type",
        ),
        pytest.param(
            GOOD + "run.other = @built()\nbuilt.size = 0\n",
            [],
            "built: integer division or modulo by zero (ZeroDivisionError; --debug shows where)",
            id="any error while building",
        ),
        pytest.param(
            GOOD + "built.size = 2\n",
            [],
            "x.gin:4: built.size: bound but nothing reads it; remove it or reference its object, '@...()'",
            id="dead binding",
        ),
        pytest.param(GOOD + "EXTRA = 2\n", [], "x.gin:4: EXTRA (macro): bound but nothing reads it", id="dead macro"),
        pytest.param(
            'include "shared.gin"\n' + GOOD + "UNUSED = 3\n",
            [],
            "x.gin:5: UNUSED (macro): bound but nothing reads it",
            id="a shared macro redefined without effect",
        ),
        pytest.param(
            GOOD,
            ["--gin_bindings=policy/ToyConfig.decay = 1.0"],
            "--gin_bindings='policy/ToyConfig.decay = 1.0': policy/ToyConfig.decay: bound but nothing",
            id="dead scope",
        ),
        pytest.param(GOOD, ["--gin_fil=x"], "Unknown command line flag 'gin_fil'. Did you mean: gin_file ?", id="flag"),
        pytest.param(GOOD, ["x.gin"], "unexpected argument 'x.gin'; everything is a flag", id="argument"),
        pytest.param(
            GOOD,
            ["--gin_bindings=run.crash = 'input'"],
            "data/x.jsonl:12: no field 'prompt'; add it",
            id="InputError inside the run",
        ),
    ],
)
def test_one_line_and_exit_code_2(program, text: str, arguments: list[str], message: str) -> None:
    result = program(text, *arguments)
    lines = result.stderr.splitlines()
    assert (result.returncode, len(lines), result.stdout) == (2, 1, ""), result.stderr
    assert lines[0].startswith("error: " + message)


SHARED = """\
run.optimizer = @ToyConfig()
ToyConfig.learning_rate = 1.0
run.other = %OTHER
OTHER = @small/built()
small/built.size = %UNDEFINED
"""


@pytest.mark.parametrize("other", ["run.other = None", "run.other = @built()", "OTHER = @built()"])
def test_keys_of_a_replaced_builder_are_reported(program, tmp_path: Path, other: str) -> None:
    """The including file need not unbind the keys of a builder that it replaces, nor define macros that only they use."""
    (tmp_path / "base.gin").write_text(SHARED)
    result = program(f'include "base.gin"\n{other}\n')
    assert (result.returncode, result.stdout) == (0, "operative: True 1.0 3\n"), result.stderr
    assert result.stderr == "left out, since what they belong to was replaced: base.gin:5: small/built.size\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'include "base.gin"\nrun.other = None\nsmall/built.size = 2\n',
            "x.gin:3: small/built.size: bound but nothing",
        ),
        ('include "typo.gin"\n', "typo.gin:3: smal/built.size: bound but nothing reads it"),
        (SHARED + "run.other = None\nUNDEFINED = 2\n", "x.gin:5: small/built.size: bound but nothing reads it"),
    ],
    ids=["the file's own key", "a builder that nothing ever referenced", "not included"],
)
def test_other_unused_keys_are_errors(program, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "base.gin").write_text(SHARED)
    (tmp_path / "typo.gin").write_text(GOOD.replace("%LR", "1.0").replace("LR = 0.5\n", "") + "smal/built.size = 3\n")
    result = program(text)
    assert result.returncode == 2 and message in result.stderr, result.stderr


def test_missing_file(program) -> None:
    result = program(GOOD, file="y.gin")
    assert result.returncode == 2
    assert result.stderr.startswith("error: --gin_file=y.gin: no such gin file 'y.gin'; paths are relative to")


def test_scoped_reference_uses_the_unscoped_binding(program) -> None:
    result = program(
        "run.optimizer = @policy/ToyConfig()\nToyConfig.learning_rate = 1.0\npolicy/ToyConfig.learning_rate = 2.0\n"
    )
    assert result.returncode == 0, result.stderr
    assert " 2.0 3" in result.stdout


def test_guard_bug_and_debug(program) -> None:
    stopped = program(GOOD, "--gin_bindings=run.crash = 'stopped'")
    assert (stopped.returncode, stopped.stderr) == (3, "stopped: step 7: not finite: loss=nan\n")
    bug = program(GOOD, "--gin_bindings=run.crash = 'bug'")
    assert bug.returncode == 1 and "Traceback" in bug.stderr and "a bug" in bug.stderr
    debug = program(GOOD, "--gin_bindings=run.crash = 'input'", "--debug")
    assert debug.returncode == 2 and "Traceback" in debug.stderr and debug.stderr.endswith("add it\n")


def test_help(program) -> None:
    result = program(GOOD, "--help")
    assert result.returncode == 0
    assert "Trains a toy." in result.stdout and "--gin_bindings" in result.stdout


def test_scan_gives_places(tmp_path: Path) -> None:
    (tmp_path / "a.gin").write_text(f'include "{tmp_path}/b.gin"\n\na/X.p = [%M, @Y()]\nX:\n  q = 2\n')
    (tmp_path / "b.gin").write_text("M = 1\n")
    macro, p, q, last = scan([str(tmp_path / "a.gin")], ["X.r = 3"])
    assert (macro.selector, macro.argument, macro.included) == ("M", "", True)
    assert macro.place == f"{tmp_path}/b.gin:1"
    assert (p.scope, p.argument, p.value, p.place) == ("a", "p", [Name("%M"), Name("@Y()")], f"{tmp_path}/a.gin:3")
    assert (q.selector, q.argument, q.place) == ("X", "q", f"{tmp_path}/a.gin:5")
    assert last.place == "--gin_bindings='X.r = 3'"


def test_changes_expands_macros_and_names_keys() -> None:
    old = "LR = 1e-3\nO.lr = %LR\nO.betas = (%LR, 2)\na/M.size = 4\nMeshConfig.data = 1\n"
    same = "O.lr = 0.001\nO.betas = (0.001, 2)\na/M.size = 4\nMeshConfig.data = 1\n"
    assert changes(old, same) == []
    new = "O.lr = 0.001\nO.betas = (0.001, 3)\nMeshConfig.data = 8\np/LoopConfig.keep = 2\n"
    assert changes(old, new) == [
        Change("MeshConfig.data", 1, 8),
        Change("O.betas", (0.001, 2), (0.001, 3)),
        Change("a/M.size", 4, None),
        Change("p/LoopConfig.keep", None, 2),
    ]
    assert [change.allowed for change in changes(old, new)] == [True, False, False, True]


def test_scan_of_text_that_is_not_gin() -> None:
    with pytest.raises(InputError, match=r"--gin_bindings='run.steps 3'.*cannot read gin"):
        scan([], ["run.steps 3"])


def test_key_to_bind_is_the_macro_of_a_parameter() -> None:
    scanned = scan([], ["SEED = 0", "OTHER = %SEED", "run.seed = %OTHER", "run.run_dir = 'x'", "run.steps = %UNKNOWN"])
    assert key_to_bind(scanned, "run.seed") == "SEED"
    assert key_to_bind(scanned, "run.run_dir") == "run.run_dir"
    assert key_to_bind(scanned, "run.steps") == "run.steps"
    assert key_to_bind(scanned, "run.absent") == "run.absent"
    assert key_to_bind(scan([], ["A = %B", "B = %A", "run.seed = %A"]), "run.seed") == "B"  # a cycle ends


def test_fingerprint_of_bindings(tmp_path: Path) -> None:
    def fingerprint_of(*bindings: str) -> str:
        return fingerprint_bindings(scan([], bindings))

    (tmp_path / "a.gin").write_text("# comment\nX.q = 2\n\nM=1\nX.p = %M\n")
    same = fingerprint_bindings(scan([str(tmp_path / "a.gin")], []))
    assert fingerprint_of("M = 1", "X.p = 0", "X.p = %M", "X.q = 2") == same
    different = [
        fingerprint_of("M = 2", "X.p = %M", "X.q = 2"),
        fingerprint_of("M = 1", "X.p = 1", "X.q = 2"),
        fingerprint_of("M = 1", "a/X.p = %M", "X.q = 2"),
    ]
    assert len({same, *different}) == 4
