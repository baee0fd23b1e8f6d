"""The doctor finds nothing wrong with the shipped training configs: tokens, templates and data, on stand-ins made here.

It stops before the first computation; tests/experiments/test_doctor.py takes the smoke configs, and computes.
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
from pathlib import Path

import pytest
from forked_programs import ROOT, Server

from rlhf_jax.data.support_desk_responses import DeskConfig, corpus_text, demonstration_records
from rlhf_jax.io import export_pretrained
from rlhf_jax.testing import tiny_model, train_bpe_tokenizer

# SmolLM2's: the token that begins a text also begins every turn.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DOCTOR = """
import runpy
import rlhf_jax.doctor.mode

def stop(*arguments, **keywords):
    raise SystemExit(0)

rlhf_jax.doctor.mode._number_checks = stop
rlhf_jax.algorithms.supervised.SupervisedJob.rehearse = stop
rlhf_jax.algorithms.rollout_job.RolloutJob.rehearse = stop
runpy.run_path({path!r}, run_name="__main__")
"""
FEW = ("desk_corpus.count", "desk_demonstrations.count", "desk_prompts.count", "desk_tokenizer.documents")
CONFIGS = sorted(
    file.relative_to(ROOT).as_posix()
    for file in (ROOT / "configs").rglob("*.gin")
    if re.search(r"^# +python experiments/train_", file.read_text(), re.MULTILINE)
    and file.parent.name not in ("plan", "smoke")
)
SLOW = ("base", "dpo", "grpo", "overoptimise", "sentiment_smollm2")


def chat_model(directory: Path, texts: list[str]) -> None:
    tokenizer = train_bpe_tokenizer(texts, 600, CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.bos_token, tokenizer.eos_token = "<|im_start|>", "<|im_end|>"
    network, params = tiny_model(vocab_size=len(tokenizer), max_length=1024)
    export_pretrained(directory, network, params, tokenizer)


def desk_models(directory: Path, desk: DeskConfig) -> None:
    tokenizer = train_bpe_tokenizer(list(corpus_text(desk, "train", 0, 300)), 512)
    for name, head in (("lm", "lm"), ("reward", "scalar")):
        network, params = tiny_model(vocab_size=512, max_length=256, head=head)
        export_pretrained(directory / name, network, params, tokenizer)


@pytest.fixture(scope="module")
def macros(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """{folder of configs: values of its macros}."""
    home_directory = tmp_path_factory.mktemp("shipped")
    desk = DeskConfig()
    desk_models(home_directory, desk)
    (home_directory / "gsm8k.jsonl").write_text(
        "".join(json.dumps({"question": f"{n} + {n}?", "answer": f"It is #### {2 * n}"}) + "\n" for n in range(300))
    )
    with gzip.open(home_directory / "hh.jsonl.gz", "wt") as file:
        for n in range(100):
            shared = f"\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: {n}?\n\nAssistant:"
            file.write(json.dumps({"chosen": f"{shared} Gladly: {n}.", "rejected": f"{shared} No."}) + "\n")
    for name, words in (("pos", ("moving", "funny")), ("neg", ("dull", "stale"))):
        lines = [f"in {name} number {n} of this old list a film that is {words[n % 2]} and short\n" for n in range(900)]
        (home_directory / f"rt-polarity.{name}").write_text("".join(lines), encoding="latin-1")
    chat_model(home_directory / "chat", lines)
    rows = demonstration_records(desk, "train", 0, 200)
    pairs = [
        {"prompt": row["prompt"], "chosen": row["response"], "rejected": other["response"] + " Bye."}
        for row, other in itertools.pairwise(rows)
    ]
    (home_directory / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    lm, chat = str(home_directory / "lm"), str(home_directory / "chat")
    shared = {
        "BASE": lm,
        "POLICY": lm,
        "REWARD": str(home_directory / "reward"),
        "COMPARISONS": str(home_directory / "pairs.jsonl"),
    }
    return {
        "support_desk": shared,
        "sft": {"MODEL": chat, "DATA": str(home_directory / "gsm8k.jsonl")},
        "grpo": {"MODEL": chat, "DATA": str(home_directory / "gsm8k.jsonl")},
        "reward": {"MODEL": chat, "DATA": str(home_directory / "hh.jsonl.gz")},
        "ppo": {"MODEL": chat, "DATA": str(home_directory)},
    }


@pytest.mark.parametrize(
    "config", [pytest.param(name, marks=[pytest.mark.slow] * (Path(name).stem in SLOW)) for name in CONFIGS]
)
def test_nothing_wrong(config: str, macros: dict[str, dict[str, str]], tmp_path: Path, server: Server) -> None:
    script = re.search(r"python experiments/(train_\w+)\.py", (ROOT / config).read_text())[1]
    (tmp_path / "doctor.py").write_text(DOCTOR.format(path=str(ROOT / "experiments" / f"{script}.py")))
    text = (ROOT / config).read_text()
    text += "".join((ROOT / name).read_text() for name in re.findall(r"^include '(.*)'", text, re.MULTILINE))
    values = {name: value for name, value in macros[config.split("/")[1]].items() if f"%{name}" in text}
    argv = ["doctor.py", "--doctor", f"--gin_file={config}", f"--gin_bindings=run.run_dir = {str(tmp_path / 'run')!r}"]
    if "RUN_DIR" in text:
        argv[-1] = f"--gin_bindings=RUN_DIR = {str(tmp_path / 'run')!r}"
    argv += [f"--gin_bindings={name} = {value!r}" for name, value in values.items()]
    argv += [f"--gin_bindings={key} = 300" for key in FEW if key.split(".")[0] in text]
    completions = server(tmp_path, argv)
    assert completions.returncode == 0, completions.stdout + completions.stderr
    assert "WRONG" not in completions.stdout and {"ok     BOS", "ok     batches"} <= {
        line.split(":")[0] for line in completions.stdout.splitlines()
    }, completions.stdout
