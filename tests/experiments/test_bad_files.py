# ruff: noqa: E501  (tables)
"""Files that are not what they should be, through the real programs: data of every schema, tokenizers, weights,
checkpoints, run directories. One line that names the file and the remedy, exit code 2, nothing written."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from experiment_processes import ROOT
from forked_programs import Server
from safetensors.numpy import load_file, save_file
from stages_on_files import CONFIG, GOOD, STAGES, lines

from rlhf_jax.checkpoint_files.manifest import manifest_text
from rlhf_jax.loop.faults import flip_bit


def with_row(stage: str, change: Callable[[dict[str, Any]], Any]) -> str:
    """The good rows with the third one changed (or replaced by what ``change`` returns)."""
    rows: list[Any] = [dict(row) for row in GOOD[stage]]
    changed = change(rows[2])
    rows[2] = rows[2] if changed is None else changed
    return lines(rows)


# ---- data: (stage, file name, what to write, what the line says)

SFT, RM, GEN = "train_sft", "train_reward", "generate"
Content = str | bytes | None
DATA: dict[str, tuple[str, str, Content, str]] = {
    "no file": (SFT, "data.jsonl", None, "no such file"),
    "empty file": (SFT, "data.jsonl", "", "empty"),
    "not json": (SFT, "data.jsonl", lines(GOOD[SFT]) + "{'a': 1}\n", r"data\.jsonl:9: not JSON"),
    "a list in jsonl": (SFT, "data.jsonl", "[1, 2]\n", r"data\.jsonl:1: a JSON list, not an object"),
    "cut line": (SFT, "data.jsonl", lines(GOOD[SFT])[:-9], r"data\.jsonl:8: not JSON"),
    "not utf-8": (SFT, "data.jsonl", lines(GOOD[SFT]).replace("say 0", "caf\xe9").encode("latin-1"), "encoding"),
    "unknown ending": (SFT, "data.xyz", lines(GOOD[SFT]), "ending|format"),
    "directory": (SFT, ".", "", "is a directory"),
    "no response": (SFT, "data.jsonl", with_row(SFT, lambda r: r.pop("response") and None), r"data\.jsonl:3: field 'response' is missing"),
    "response a number": (SFT, "data.jsonl", with_row(SFT, lambda r: r | {"response": 3}), r":3: field 'response' is int"),
    "response null": (SFT, "data.jsonl", with_row(SFT, lambda r: r | {"response": None}), r":3: field 'response' is null"),
    "prompt a list of texts": (SFT, "data.jsonl", with_row(SFT, lambda r: r | {"prompt": ["a"]}), r":3: field 'prompt', message 1"),
    "unknown role": (
        SFT, "data.jsonl", with_row(SFT, lambda r: r | {"prompt": [{"role": "wizard", "content": "a"}]}), "role 'wizard' is unknown",
    ),
    "content a number": (
        SFT, "data.jsonl", with_row(SFT, lambda r: r | {"prompt": [{"role": "user", "content": 1}]}), "content is int, not text",
    ),
    "one id twice": (SFT, "data.jsonl", lines([{**row, "id": 7} for row in GOOD[SFT]]), r":2: id '7' is also that of line 1"),
    "nothing but empty replies": (SFT, "data.jsonl", lines([{**r, "response": " "} for r in GOOD[SFT]]), "empty|no example"),
    "one prompt only": (SFT, "data.jsonl", lines([{**r, "prompt": "a"} for r in GOOD[SFT]]), "side is empty"),
    "all too long": (SFT, "data.jsonl", lines([{**r, "response": "x" * 99} for r in GOOD[SFT]]), "too long|no example left"),
    "json object": (SFT, "data.json", json.dumps({"rows": GOOD[SFT]}), "not a list of objects"),
    "json list of numbers": (SFT, "data.json", "[1, 2]", "object"),
    "damaged gzip": (SFT, "data.jsonl.gz", gzip.compress(lines(GOOD[SFT]).encode())[:-12], "damaged gzip"),
    "not gzip at all": (SFT, "data.jsonl.gz", lines(GOOD[SFT]), "gzip"),
    "csv without header": (SFT, "data.csv", "", "empty|header"),
    "csv with a short row": (SFT, "data.csv", "prompt,response\na,b\nc\n", r"data\.csv:3"),
    "csv with a column twice": (SFT, "data.csv", "prompt,prompt\na,b\n", "occurs twice"),
    "csv of another schema": (SFT, "data.csv", "question,answer\na,b\nc,d\n", "field 'prompt' is missing; the row has 'question'"),
    "parquet of text": (SFT, "data.parquet", "not parquet", r"data\.parquet"),
    "text has no prompts": (SFT, "data.txt", "one\ntwo\n", "field 'prompt' is missing"),
    "no rejected": (RM, "data.jsonl", with_row(RM, lambda r: r.pop("rejected") and None), r":3: field 'rejected' is missing"),
    "chosen a list": (RM, "data.jsonl", with_row(RM, lambda r: r | {"chosen": ["a", "b"]}), r":3: one of chosen and rejected is a conv"),
    "chosen equals rejected everywhere": (RM, "data.jsonl", lines([{**r, "rejected": r["chosen"]} for r in GOOD[RM]]), ":1: chosen equals"),
    "demonstrations for comparisons": (RM, "data.jsonl", lines(GOOD[SFT]), r":1: field 'chosen' is missing"),
    "no prompt": (GEN, "data.jsonl", with_row(GEN, lambda r: r.pop("prompt") and None), r":3: field 'prompt' is missing"),
    "prompt a number": (GEN, "data.jsonl", with_row(GEN, lambda r: r | {"prompt": 1}), r":3: field 'prompt' is int"),
    "prompt empty": (GEN, "data.jsonl", with_row(GEN, lambda r: r | {"prompt": " "}), r":3: field 'prompt' is empty"),
    "assistant speaks last": (
        GEN, "data.jsonl", with_row(GEN, lambda r: r | {"prompt": [{"role": "assistant", "content": "a"}]}), "not the user's",
    ),
}  # fmt: skip


# ---- models: (what to start from, how to damage it, what the line says)


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        fields = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps({k: v for k, v in (fields | changes).items() if v != "REMOVE"}))

    return change


def rewrite(name: str, content: str | bytes) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def cut(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:-40])  # type: ignore[func-returns-value]


def remove(name: str) -> Callable[[Path], None]:
    def remove_path(directory: Path) -> None:
        path = directory / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove_path


def tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def resave(directory: Path) -> None:
        weights = load_file(directory / "model.safetensors")
        change(weights)
        save_file(weights, directory / "model.safetensors")

    return resave


def pickled(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def flip(name: str) -> Callable[[Path], None]:
    return lambda directory: flip_bit(directory / name)


def flip_arrays(directory: Path) -> None:
    files = [path for path in (directory / "checkpoints" / "1" / "state").rglob("*") if path.is_file()]
    flip_bit(max(files, key=lambda path: path.stat().st_size))


def no_steps(directory: Path) -> None:
    shutil.rmtree(directory / "checkpoints" / "1")


def forged(directory: Path) -> None:
    """A manifest that is consistent in itself, of other files."""
    body = {"step": 1, "files": {"../../../../etc/hostname": {"bytes": 1, "sha256": "0"}}, "layout": {}, "host": {}}
    (directory / "checkpoints" / "1" / "manifest.json").write_text(manifest_text(body))


STEP = "checkpoints/1"
MODELS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "hf: no config": ("hf", remove("config.json"), "neither a run directory"),
    "hf: config not json": ("hf", rewrite("config.json", "{"), r"config\.json.*not JSON"),
    "hf: config a list": ("hf", rewrite("config.json", "[]"), r"config\.json"),
    "hf: unknown architecture": ("hf", edit("config.json", architectures=["WizardForCausalLM"], model_type="wizard"), "WizardForCausalLM is not supported"),
    "hf: no hidden size": ("hf", edit("config.json", hidden_size="REMOVE"), "hidden_size"),
    "hf: hidden size a text": ("hf", edit("config.json", hidden_size="big"), "hidden_size"),
    "hf: unknown rope": ("hf", edit("config.json", rope_scaling={"rope_type": "spiral", "factor": 2.0}), "rope"),
    "hf: unknown activation": ("hf", edit("config.json", hidden_act="swish_of_mine"), "hidden_act|swish"),
    "hf: other shape than config": ("hf", edit("config.json", intermediate_size=33), "expected|shape|is "),
    "hf: more layers than weights": ("hf", edit("config.json", num_hidden_layers=9), "missing"),
    "hf: vocabulary below the tokenizer": ("hf", edit("config.json", vocab_size=9), "vocab|tokens"),
    "hf: no weights": ("hf", remove("model.safetensors"), "neither model.safetensors nor"),
    "hf: weights cut": ("hf", cut("model.safetensors"), "not a whole safetensors file"),
    "hf: weights empty": ("hf", rewrite("model.safetensors", b""), "not a whole safetensors file"),
    "hf: weights of text": ("hf", rewrite("model.safetensors", "hello, this is no tensor"), "not a whole safetensors file"),
    "hf: tensor missing": ("hf", tensors(lambda t: t.pop("model.norm.weight")), "model.norm.weight.*missing|missing.*model.norm.weight"),
    "hf: tensor too many": ("hf", tensors(lambda t: t.update(extra=np.ones(2, np.float32))), "extra"),
    "hf: integer tensor": ("hf", tensors(lambda t: t.update({"model.norm.weight": np.ones(16, np.int32)})), "model.norm.weight"),
    "hf: pickle only": ("hf", pickled, "only pickled weights"),
    "hf: index of files elsewhere": (
        "hf",
        lambda d: (remove("model.safetensors")(d), rewrite("model.safetensors.index.json", json.dumps({"weight_map": {"a": "../../x"}}))(d)),
        "not in this directory",
    ),
    "hf: index not a map": (
        "hf", lambda d: (remove("model.safetensors")(d), rewrite("model.safetensors.index.json", '{"weight_map": 3}')(d)), "weight_map",
    ),
    "hf: no tokenizer": ("hf", remove("tokenizer.json"), r"tokenizer\.json: no such file"),
    "hf: tokenizer not json": ("hf", rewrite("tokenizer.json", "{"), r"tokenizer\.json"),
    "hf: tokenizer of nothing": ("hf", rewrite("tokenizer.json", "{}"), r"tokenizer\.json"),
    "hf: tokenizer with code": ("hf", edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["a.B", None]}), "never run"),
    "gguf of text": ("gguf", rewrite("model.gguf", "hello"), "not a whole GGUF file"),
    "gguf empty": ("gguf", rewrite("model.gguf", b""), r"model\.gguf"),
    "gguf header only": ("gguf", rewrite("model.gguf", b"GGUF\x03\x00\x00\x00"), "not a whole GGUF file"),
    "run: no card": ("run", remove("model.json"), "neither a run directory"),
    "run: card not json": ("run", rewrite("model.json", "{"), r"model\.json"),
    "run: card of something else": ("run", rewrite("model.json", '{"a": 1}'), r"model\.json: damaged"),
    "run: card of another model": ("run", rewrite("model.json", json.dumps({"config": {"vocab_size": 4}, "subtree": "params"})), "model"),
    "run: no tokenizer": ("run", remove("tokenizer"), "tokenizer"),
    "run: no checkpoint": ("run", no_steps, "no complete checkpoint"),
    "run: checkpoints gone": ("run", remove("checkpoints"), "no complete checkpoint"),
    "run: bit flipped": ("run", flip_arrays, "damaged checkpoint: state/.*another sha256"),
    "run: metadata flipped": ("run", flip(f"{STEP}/state/_METADATA"), "damaged checkpoint: state/_METADATA"),
    "run: manifest flipped": ("run", flip(f"{STEP}/manifest.json"), "damaged checkpoint: manifest.json"),
    "run: manifest gone": ("run", remove(f"{STEP}/manifest.json"), "damaged checkpoint: manifest.json is missing"),
    "run: manifest forged": ("run", forged, "which lies elsewhere"),
    "run: arrays gone": ("run", remove(f"{STEP}/state"), "damaged checkpoint: state/.* is missing"),
    "run: step emptied": ("run", lambda d: (remove(STEP)(d), (d / STEP).mkdir()), "damaged checkpoint"),
    "run: newer step empty": ("run", lambda d: (d / "checkpoints" / "2").mkdir(), "2: damaged checkpoint: manifest.json is missing"),
    "run: subtree that is not there": ("run", edit("model.json", subtree="policy"), "no 'policy'"),
}  # fmt: skip


def refused(server: Server, tmp_path: Path, stage: str, model: Path, data: Path, words: str) -> None:
    config = tmp_path / "config.gin"
    config.write_text(CONFIG + STAGES[stage])
    before = sorted(os.listdir(tmp_path))
    paths = {"RUN_DIR": tmp_path / "run", "MODEL": model, "DATA": data}
    argv = [str(ROOT / "experiments" / f"{stage}.py"), f"--gin_file={config}"]
    result = server(tmp_path, [*argv, *(f"--gin_bindings={name} = {str(path)!r}" for name, path in paths.items())])
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
    assert re.search(words, result.stderr), result.stderr
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "stderr", "stdout"])


@pytest.mark.parametrize("name", DATA)
def test_data(name: str, models: Path, tmp_path: Path, server: Server) -> None:
    stage, file, content, words = DATA[name]
    (tmp_path / "given").mkdir()
    place = tmp_path / "given" / file
    if isinstance(content, str) and file != ".":
        content = content.encode()
    if isinstance(content, bytes):
        place.write_bytes(content)
    refused(server, tmp_path, stage, models / "run", place, words)


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, models: Path, tmp_path: Path, server: Server) -> None:
    kind, damage, words = MODELS[name]
    shutil.copytree(models / kind, tmp_path / "model")
    damage(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text(lines(GOOD[SFT]))
    model = tmp_path / "model" / ("model.gguf" if kind == "gguf" else "")
    refused(server, tmp_path, SFT, model, tmp_path / "data.jsonl", words)


def test_the_good_ones_are_good(models: Path, tmp_path: Path, server: Server) -> None:
    """What the tables damage runs when it is whole, so that what is refused is the damage."""
    (tmp_path / "data.jsonl").write_text(lines(GOOD[SFT]))
    config = tmp_path / "config.gin"
    config.write_text(CONFIG + STAGES[SFT])
    for kind in ("hf", "run"):
        paths = {"RUN_DIR": tmp_path / f"from_{kind}", "MODEL": models / kind, "DATA": tmp_path / "data.jsonl"}
        argv = [str(ROOT / "experiments" / "train_sft.py"), f"--gin_file={config}"]
        result = server(tmp_path, [*argv, *(f"--gin_bindings={name} = {str(path)!r}" for name, path in paths.items())])
        assert result.returncode == 0, result.stderr


def test_prompts_with_seeds(models: Path, tmp_path: Path, server: Server) -> None:
    """The same replies in another order of the file; a prompt without its number is named before anything is written."""
    config = tmp_path / "config.gin"
    settings = "\nrun.seeds = 'number'\nprompt_file.fields = @Fields()\nFields.extra = ('number',)\n"
    config.write_text(CONFIG + STAGES[GEN] + settings + "SamplingConfig.temperature = 5.0\n")
    rows = [{"id": n, "prompt": "say so", "number": 100 + n} for n in range(5)]
    argv = [str(ROOT / "experiments" / "generate.py"), f"--gin_file={config}"]
    responses = []
    for name, prompts in (("a", rows), ("b", rows[::-1]), ("c", [*rows[:2], rows[2] | {"number": -1}])):
        (tmp_path / f"{name}.jsonl").write_text(lines(prompts))
        paths = {"RUN_DIR": tmp_path / name, "MODEL": models / "run", "DATA": tmp_path / f"{name}.jsonl"}
        result = server(tmp_path, [*argv, *(f"--gin_bindings={key} = {str(path)!r}" for key, path in paths.items())])
        if name == "c":
            assert result.returncode == 2 and not (tmp_path / "c").exists()
            assert re.fullmatch(r"error: run.seeds = 'number': prompt 2 has -1 there; give a whole .*\n", result.stderr)
            continue
        assert result.returncode == 0, result.stderr
        replies = map(json.loads, (tmp_path / name / "completions.jsonl").read_text().splitlines())
        responses.append({reply["id"]: reply["response"] for reply in replies})
    assert responses[0] == responses[1] and len(set(responses[0].values())) == 5
