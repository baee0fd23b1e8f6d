# ruff: noqa: E501  (tables)
"""More than five hundred bad inputs through the real programs: files, values, configurations, paths, flags, permissions.

Whatever is wrong ends in one line and exit code 2 (3 when the machine is to blame): no traceback, nothing left behind, nothing
waited for. What each line says is tested in test_bad_files.py and test_bad_values.py; here every program meets every kind of
damage. A twenty-fifth of the table runs by default.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from experiment_processes import ROOT
from forked_programs import Server
from stages_on_files import CONFIG, GOOD, STAGES, lines

EVERY = 25
Damage = Callable[[Path], None]


def content(data: bytes) -> Damage:
    def write(path: Path) -> None:
        path.write_bytes(data)

    return write


def changed(change: Callable[[bytes], bytes]) -> Damage:
    def write(path: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return write


def replaced(make: Callable[[Path], object]) -> Damage:
    def write(path: Path) -> None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)

    return write


def doubled(text: bytes) -> bytes:
    """The first key of the first object twice."""
    match = re.search(rb'\{\s*("[^"]*")', text)
    return text if match is None else text[: match.start()] + b"{" + match[1] + b": 0, " + text[match.start() + 1 :]


def without_permission(path: Path) -> None:
    path.chmod(0)


DAMAGES: dict[str, Damage] = {
    "empty": content(b""),
    "half": changed(lambda text: text[: len(text) // 2]),
    "first byte gone": changed(lambda text: text[1:]),
    "nul bytes": changed(lambda text: b"\0" * len(text)),
    "latin-1": content('{"a": "é"}'.encode("latin-1")),
    "utf-16": content('{"a": 1}'.encode("utf-16")),
    "deep": content(b'{"a":' * 100_000),
    "deep list": content(b"[" * 100_000),
    "a list": content(b"[]"),
    "a number": content(b"3"),
    "null": content(b"null"),
    "NaN": content(b'{"a": NaN}'),
    "many digits": content(b'{"a": ' + b"9" * 6000 + b"}"),
    "half a pair": content(b'{"a": "\\udead"}'),
    "doubled key": changed(doubled),
    "control characters": content(b'\x1b]0;owned\x07{"a": 1}'),
    "directory": replaced(Path.mkdir),
    "pipe": replaced(os.mkfifo),
    "dangling link": replaced(lambda path: path.symlink_to(path.parent / "nowhere")),
    "link to itself": replaced(lambda path: path.symlink_to(path)),
    "device": replaced(lambda path: path.symlink_to("/dev/null")),
    "no permission": without_permission,
}
FILES = {
    "run": ["model.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "checkpoints/1/manifest.json"],
    "hf": ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"],
    "data": ["data.jsonl", "data.json", "data.csv"],
    "gin": ["config.gin"],
}
HARMLESS = {
    "data.jsonl directory",  # a directory of rows is a data set of its own
    "data.csv doubled key",  # there is none in it
    "config.gin empty", "config.gin device",  # what is missing is said by the run, below
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """name: for the message. script: below the repository. flags: of it; {here} is the directory of the case.

    source, file: what of the good inputs is damaged, '' for nothing. prepare: what is made before.
    """

    name: str
    script: str
    flags: tuple[str, ...] = ()
    source: str = ""
    file: str = ""
    damage: Damage | None = None
    prepare: Damage | None = None
    config: str = field(default="", repr=False)


SFT = "experiments/train_sft.py"


def file_cases() -> Iterator[Case]:
    for source, files in FILES.items():
        for file in files:
            for name, damage in DAMAGES.items():
                macros = (
                    "RUN_DIR = '{here}/run'",
                    f"MODEL = '{{here}}/{'hf' if source == 'hf' else 'model'}'",
                    f"DATA = '{{here}}/{file if source == 'data' else 'data.jsonl'}'",
                )
                flags = ("--gin_file={here}/config.gin", *(f"--gin_bindings={text}" for text in macros))
                yield Case(f"{file} {name}", SFT, flags, source, file, damage)


# A value that is good ends in the model that does not exist, one line as well.
KEYS = """
base ModelConfig.hidden_size
base ModelConfig.num_layers
base ModelConfig.rope_theta
base ModelConfig.norm_epsilon
base OptimizerConfig.learning_rate
sft OptimizerConfig.b1
sft OptimizerConfig.weight_decay
sft OptimizerConfig.warmup_steps
sft BatchConfig.batch_size
sft BatchConfig.length
sft BatchConfig.microbatches
sft LoopConfig.save_every
sft LoopConfig.keep
sft LoopConfig.stop_within
sft LoopConfig.deadlines
sft LoopConfig.faults
sft desk_demonstrations.count
sft desk_demonstrations.heldout
sft run.steps
sft run.seed
sft run.run_dir
sft run.model
sft run.loop
sft run.optimizer
sft run.records
ppo PPOConfig.epochs
ppo PPOConfig.clip_low
ppo PPOConfig.kl_coefficient
ppo PPOConfig.discount
ppo SamplingConfig.temperature
ppo SamplingConfig.top_p
ppo SamplingConfig.max_new_tokens
""".strip().splitlines()
VALUES = [
    "'text'",
    "None",
    "[]",
    "{'a': 1}",
    "-7",
    "1e400",
    "float('nan')",
    "10**400",
    "(1, 2)",
    "@Nobody()",
    "%NOBODY",
    "'\\x1b[2J'",
]
PROGRAM_OF = {"base": SFT, "sft": SFT, "ppo": "experiments/train_ppo.py"}


def value_cases() -> Iterator[Case]:
    for line in KEYS:
        config, key = line.split()
        own = () if key == "run.run_dir" else ("--gin_bindings=RUN_DIR = '{here}/run'",)
        missing = {"sft": "BASE", "ppo": "POLICY"}.get(config)
        own += (f"--gin_bindings={missing} = '{{here}}/gone'",) if missing else ()
        for value in VALUES:
            if config == "base" and value == "None":
                continue  # a default of some
            flags = (f"--gin_file=configs/smoke/{config}.gin", *own, f"--gin_bindings={key} = {value}")
            yield Case(f"{key} = {value}", PROGRAM_OF[config], flags)


GIN = {
    "no equals sign": "run.steps 3",
    "no value": "run.steps =",
    "open bracket": "run.steps = (1,",
    "open text": "run.steps = 'a",
    "a statement": "import os",
    "a call": "run.steps = __import__('os').getpid()",
    "an include of nothing": "include 'nowhere.gin'",
    "an include of itself": "include '{here}/config.gin'",
    "unknown name": "Wizard.hat = 3",
    "unknown parameter": "LoopConfig.hat = 3",
    "unknown macro": "run.steps = %HAT",
    "unknown reference": "run.model = @Wizard()",
    "nobody reads it": "PPOConfig.epochs = 3",
    "escape sequence": "run.steps = '\x1b[31m'",
    "bidi": "run.\u202esteps = 3",
    "tabs and nul": "run.steps\t=\t'\x00'",
    "deep": "run.steps = " + "(" * 500,
    "very deep": "run.steps = " + "[" * 20_000,
    "indented": "   run.steps = 3",
    "two values": "run.steps = 3 4",
}


def gin_cases() -> Iterator[Case]:
    for name, text in GIN.items():
        for script in ("train_sft", "generate", "train_reward"):
            flags = (
                "--gin_file={here}/config.gin",
                "--gin_bindings=MODEL = '{here}/gone'",
                "--gin_bindings=RUN_DIR = '{here}/run'",
            )
            yield Case(
                f"gin {name} {script}", f"experiments/{script}.py", flags, config=f"{CONFIG}{STAGES[script]}\n{text}\n"
            )


FLAGS = ["--nothing=1", "word", "--gin_file=", "--gin_file=nowhere.gin", "--gin_file={here}", "--gin_bindings=", "--gin_bindings=x",
         "--gin_file=/dev/null", "--debug=perhaps", "--distributed=yes", "--distributed=host:1,2,9", "--sync=here", "--sync=xyz://a/b",
         "--compilation_cache=xyz://a/b", "--gin_file={here}/\x1b[2J", "--sync=https://me:secret@host/run"]  # fmt: skip
PROGRAMS = ["train_sft", "train_reward", "train_ppo", "train_dpo", "generate", "evaluate", "pipeline"]
SCRIPTS = {
    "experiments/sweep.py": [
        "--experiment=train_sft", "--experiment=wizard", "--out={here}", "--grid=x", "--grid==", "--grid=run.seed", "--grid=run.seed=1,1",
        "--seeds=a", "--seeds=1,1", "--average=0", "--average=x", "--point=a", "--metrics", "--out=/dev/null/x",
    ],
    "experiments/export.py": [
        "--run_dir={here}/gone", "--run_dir=", "--out={here}", "--dtype=float3", "--head=tail", "--run_dir=/dev/null",
        "--run_dir=https://a:b@host.invalid/x", "--adapter_only=perhaps", "--base=x",
    ],
    "scripts/launch.py": ["--processes=0", "--processes=x", "--grace=-1", "--devices=-1", "--", "--logs=/dev/null/x"],
}  # fmt: skip


def flag_cases() -> Iterator[Case]:
    for program in PROGRAMS:
        for flag in FLAGS:
            yield Case(f"{program} {flag!r}", f"experiments/{program}.py", (flag,))
    for script, flags in SCRIPTS.items():
        for flag in flags:
            more = ("--", "x.py") if script.endswith("launch.py") and flag != "--" else ()
            yield Case(f"{script} {flag}", script, (flag, *more))


PLACES: dict[str, tuple[str, Damage | None]] = {
    "a file": ("{here}/place", lambda directory: (directory / "place").write_text("")),  # type: ignore[dict-item,return-value]
    "below a file": ("{here}/place/run", lambda directory: (directory / "place").write_text("")),  # type: ignore[dict-item,return-value]
    "a pipe": ("{here}/place", lambda directory: os.mkfifo(directory / "place")),
    "a link to itself": ("{here}/place", lambda directory: (directory / "place").symlink_to("place")),
    "a device": ("/dev/null", None),
    "below /proc": ("/proc/run", None),
    "a long name": ("{here}/" + "x" * 300, None),
    "a long path": ("{here}/" + "x/" * 3000, None),
    "a nul": ("{here}/a\\0b", None),
    "empty": ("", None),
    "not empty": ("{here}", None),
    "a URL": ("gs://bucket/run", None),
}


def place_cases() -> Iterator[Case]:
    for name, (place, prepare) in PLACES.items():
        for program, config in (("train_sft", "base"), ("generate", "completions"), ("pipeline", "pipeline")):
            missing = ("--gin_bindings=POLICY = '{here}/gone'",) if program == "generate" else ()
            if name == "empty" and program != "train_sft":
                continue  # the working directory, which is the repository's here
            if program == "pipeline" and name not in ("a file", "a long name", "a nul"):
                continue  # its stages are checked first, which takes a process of its own
            flags = (f"--gin_file=configs/smoke/{config}.gin", f"--gin_bindings=RUN_DIR = '{place}'", *missing)
            yield Case(f"run_dir {name} {program}", f"experiments/{program}.py", flags, prepare=prepare)


CASES = [*file_cases(), *value_cases(), *gin_cases(), *flag_cases(), *place_cases()]


def problem(case: Case, directory: Path, good: Path, server: Server) -> str:
    """What is wrong with how a program met the case; '' for nothing."""
    directory.mkdir()
    if case.source:
        shutil.copytree(
            good / ("hf" if case.source == "hf" else "run"), directory / ("hf" if case.source == "hf" else "model")
        )
    rows = GOOD["train_sft"]
    (directory / "data.jsonl").write_text(lines(rows))
    (directory / "data.json").write_text(json.dumps(rows))
    (directory / "data.csv").write_text(
        "prompt,response\n" + "".join(f"{row['prompt']},{row['response']}\n" for row in rows)
    )
    (directory / "config.gin").write_text(case.config.replace("{here}", str(directory)) or CONFIG + STAGES["train_sft"])
    if case.damage is not None:
        folder = {"hf": directory / "hf", "run": directory / "model"}.get(case.source, directory)
        case.damage(folder / case.file)
    if case.prepare is not None:
        case.prepare(directory)
    before = sorted(os.listdir(directory))
    flags = [flag.replace("{here}", str(directory)) for flag in case.flags]
    result = server(directory, [str(ROOT / case.script), *flags])
    stderr = result.stderr.strip()
    after = sorted(set(os.listdir(directory)) - {"stdout", "stderr"})
    if result.returncode == 0 and case.name in HARMLESS:
        return ""
    if result.returncode not in (2, 3):
        return f"exit code {result.returncode}: {stderr[-300:]}"
    if "Traceback" in stderr or stderr.count("\n") or not stderr:
        return f"not one line: {stderr[-300:]}"
    if re.search("[\x00-\x1f\x7f-\x9f\u202e]|secret", stderr):
        return f"not printable, or a password: {stderr!r}"
    return "" if after == before else f"left behind: {sorted(set(after) ^ set(before))}"


def problems(cases: list[Case], tmp_path: Path, good: Path, server: Server) -> str:
    failures = []
    root = os.geteuid() == 0  # may read everything
    for number, case in enumerate(case for case in cases if not (root and case.damage is without_permission)):
        if words := problem(case, tmp_path / str(number), good, server):
            failures.append(f"{case.name}: {words}")
    return "\n".join(failures)


def test_the_table_is_large_and_names_differ() -> None:
    assert len({case.name for case in CASES}) == len(CASES) > 500


def test_a_part_of_the_bad_inputs(models: Path, tmp_path: Path, server: Server) -> None:
    assert problems(CASES[::EVERY], tmp_path, models, server) == ""


@pytest.mark.slow
@pytest.mark.parametrize("part", range(1, EVERY))
def test_the_other_bad_inputs(part: int, models: Path, tmp_path: Path, server: Server) -> None:
    assert problems(CASES[part::EVERY], tmp_path, models, server) == ""
