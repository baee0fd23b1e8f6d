"""The configs for a pretrained model on real data, on a tiny model and small data made here; and the builders they use."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
from compiler_flags import COMPILER

from rlhf_jax.data import Message, Template
from rlhf_jax.errors import InputError
from rlhf_jax.io import export_pretrained
from rlhf_jax.records import Response
from rlhf_jax.rewards import SentimentCorpus, opening_prompts
from rlhf_jax.rewards.builders import sentiment_prompts, sentiment_scores
from rlhf_jax.testing import byte_tokenizer, tiny_model

ROOT = Path(__file__).resolve().parents[2]
CHAT = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<|eos|>{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
CONFIGS = {
    "sft/gsm8k_smollm2": "train_sft",
    "reward/hh_smollm2": "train_reward",
    "grpo/gsm8k_smollm2": "train_grpo",
    "ppo/sentiment_smollm2": "train_ppo",
    "ppo/sentiment_evaluate": "evaluate",
}

# Importing takes seconds; so one process imports and then forks itself for every command. It stays free of threads: no
# device is touched before the fork.
FORKING = """
import json, os, runpy, sys
import rlhf_jax.config.surface
for line in sys.stdin:
    stderr, argv = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(stderr, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")
        os._exit(99)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """A directory like rt-polarity: 300 sentences of each kind, 14 words, in latin-1."""
    directory = tmp_path / "reviews"
    directory.mkdir()
    for name, opinions in (("pos", ("moving", "funny", "très warm")), ("neg", ("dull", "stale", "grim"))):
        lines = [
            f"in {name} number {'i' * (n + 1)} of this old list a film that is {opinions[n % 3]} and {opinions[n % 2]}\n"
            for n in range(300)
        ]
        (directory / f"rt-polarity.{name}").write_text("".join(lines), encoding="latin-1")
    return directory


@pytest.fixture
def locations(tmp_path: Path, reviews: Path) -> dict[str, Path]:
    """What DATA is for each config."""
    questions = [
        {"question": f"What is {n} + {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"} for n in range(300)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    head = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Tell me {n}.\n\nAssistant:"
    dialogues = [
        {"chosen": head.replace("{n}", str(n)) + f" Gladly: {n}.", "rejected": head.replace("{n}", str(n)) + " No."}
        for n in range(100)
    ]
    with gzip.open(tmp_path / "pairs.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in dialogues)
    data = dict.fromkeys(("sft", "grpo"), tmp_path / "train.jsonl")
    data |= {"reward": tmp_path / "pairs.jsonl.gz", "ppo": reviews}
    return {name: data[name.split("/")[0]] for name in CONFIGS}


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"XLA_FLAGS": COMPILER}  # one device
    command = [sys.executable, "-c", FORKING]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=PIPE, stdout=PIPE, text=True) as process:
        yield process


@pytest.fixture
def start(server: subprocess.Popen[str], tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Runs a config with more bindings; gives (exit code, stderr)."""

    def call(name: str, **bindings: Any) -> tuple[int, str]:
        flags = [f"--gin_bindings={key} = {(str(v) if isinstance(v, Path) else v)!r}" for key, v in bindings.items()]
        argv = [f"experiments/{CONFIGS[name]}.py", f"--gin_file=configs/{name}.gin", *flags]
        print(json.dumps([str(tmp_path / "stderr"), argv]), file=server.stdin, flush=True)
        assert server.stdout is not None
        return int(server.stdout.readline()), (tmp_path / "stderr").read_text()

    return call


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_builds_everything_before_it_asks_for_the_model(
    name: str, start: Callable[..., tuple[int, str]], locations: dict[str, Path], tmp_path: Path
) -> None:
    """Every name and type is right, nothing is bound in vain, the data was read: what is missing is the model."""
    absent, run_dir = tmp_path / "absent", tmp_path / "run"
    code, printed = start(name, MODEL=absent, DATA=locations[name], RUN_DIR=run_dir)
    assert code == 2 and printed.count("\n") == 1 and printed.startswith("error: ")
    assert f"{absent}: no such" in printed
    assert not run_dir.exists()


@pytest.mark.parametrize("macro", ["MODEL", "DATA"])
def test_what_must_be_set_is_named(
    macro: str, start: Callable[..., tuple[int, str]], locations: dict[str, Path]
) -> None:
    macros = {"MODEL": "absent", "DATA": locations["sft/gsm8k_smollm2"]}
    del macros[macro]
    code, printed = start("sft/gsm8k_smollm2", **macros)
    assert code == 2 and printed.count("\n") == 1
    assert f"unknown macro %{macro}: define it" in printed


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Hugging Face directory of a tiny model that reads bytes and has a chat template."""
    network, params = tiny_model(vocab_size=259, max_length=1024)
    directory = tmp_path / "model"
    export_pretrained(directory, network, params, byte_tokenizer(CHAT))
    return directory


@pytest.fixture
def train(
    start: Callable[..., tuple[int, str]], model: Path, locations: dict[str, Path], tmp_path: Path
) -> Callable[..., list[dict[str, Any]]]:
    """Runs a config on the tiny model; gives the lines of metrics.jsonl."""

    def call(name: str, **bindings: Any) -> list[dict[str, Any]]:
        run_dir = tmp_path / name.replace("/", "-")
        code, printed = start(name, MODEL=model, DATA=locations[name], RUN_DIR=run_dir, **bindings)
        assert code == 0, printed
        return lines(run_dir)

    return call


@pytest.mark.slow
def test_sft_reports_the_held_out_loss_before_training(train: Callable[..., list[dict[str, Any]]]) -> None:
    metrics = train("sft/gsm8k_smollm2", **{"run.steps": 3, "OptimizerConfig.learning_rate": 0.01})
    heldout = {line["step"]: line["heldout/loss"] for line in metrics if "heldout/loss" in line}
    assert list(heldout) == [0, 3]
    assert heldout[3] < heldout[0]


@pytest.mark.slow
def test_reward_reports_accuracy_with_its_interval(train: Callable[..., list[dict[str, Any]]]) -> None:
    last = train("reward/hh_smollm2", **{"run.steps": 2})[-1]
    assert last["heldout/accuracy_low"] <= last["heldout/accuracy"] <= last["heldout/accuracy_high"]


@pytest.mark.slow
def test_ppo_on_sentiment_is_evaluated_on_other_openings(
    train: Callable[..., list[dict[str, Any]]], start: Callable[..., tuple[int, str]], model: Path, reviews: Path
) -> None:
    tmp_path = reviews.parent
    # A token is a byte here, so an opening needs more than 16 of them.
    wide = {"BatchConfig.length": 512, "BatchConfig.batch_size": 8}
    metrics = train("ppo/sentiment_smollm2", **wide, **{"run.steps": 2})
    assert [line["step"] for line in metrics] == [1, 2]
    for line in metrics:
        assert line["score"] == pytest.approx(line["monitor/sentiment"], rel=1e-5)
        assert line["identity/identity_gap"] < 1e-4 and line["value"] == pytest.approx(0, abs=0.1)
    ppo = tmp_path / "ppo-sentiment_smollm2"
    inputs = json.loads((ppo / "provenance.json").read_text())["inputs"]
    assert [Path(entry["path"]).name for entry in inputs] == ["model", "rt-polarity.pos", "rt-polarity.neg"]
    places = {"MODEL": model, "DATA": reviews, "PPO": ppo, "RUN_DIR": tmp_path / "evaluation"}
    code, printed = start("ppo/sentiment_evaluate", **wide, **places, **{"sentiment_prompts.limit": 8})
    assert code == 0, printed
    evaluation = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert [policy["name"] for policy in evaluation["policies"]] == ["before", "ppo"]
    assert {"sentiment", "second_opinion", "words", "distinct"} <= evaluation["differences"][0]["paired"].keys()
    trained = {prompt.prompt[0].content for prompt in opening_prompts(SentimentCorpus(str(reviews)))}
    assert not trained & {sample["prompt"] for sample in evaluation["samples"]}


def test_grpo_is_paid_by_the_number_of_the_prompts_answer(train: Callable[..., list[dict[str, Any]]]) -> None:
    """The reward reads the column that Fields.extra names; a policy that never answers is warned of, not refused."""
    small = {"BatchConfig.batch_size": 4, "run.samples": 2, "BatchConfig.length": 64, "BatchConfig.microbatches": 1}
    (line,) = train("grpo/gsm8k_smollm2", **small, **{"run.steps": 1, "SamplingConfig.max_new_tokens": 4})
    assert (
        line["score"] == line["monitor/correct"] == line["monitor/answered"] == 0.0
        and line["zero_variance_groups"] == 1.0
    )


def test_sentiment_prompts_are_plain_text_and_name_their_files(reviews: Path) -> None:
    corpus = SentimentCorpus(str(reviews))
    records = sentiment_prompts(corpus, limit=5).read()
    assert records.template == Template(style="raw") and records.heldout == []
    assert records.train == opening_prompts(corpus)[:5]
    assert records.train[0].prompt[0] == Message("user", " ".join(records.train[0].prompt[0].content.split()[:8]))
    assert [Path(source.path).name for source in records.as_inputs()] == ["rt-polarity.pos", "rt-polarity.neg"]
    heldout = sentiment_prompts(corpus, "heldout", "both").read().train
    assert heldout == opening_prompts(corpus, "heldout", "both") and len(heldout) > len(records.train)


def test_sentiment_scores_go_with_the_opinion(reviews: Path) -> None:
    score = sentiment_scores(SentimentCorpus(str(reviews))).make()
    texts = (" it is moving and funny", " it is dull and grim")
    values = score([Response((), text, ended=False) for text in texts])
    assert values["sentiment"][0] > 0 > values["sentiment"][1]
    assert values["second_opinion"][0] > 0 > values["second_opinion"][1]


def test_a_sentiment_reward_no_better_than_chance_is_refused(reviews: Path) -> None:
    draw = random.Random(0)
    for name in ("pos", "neg"):
        lines = [" ".join(draw.choice("abcdefghijklmnop") for _ in range(20)) + "\n" for _ in range(300)]
        (reviews / f"rt-polarity.{name}").write_text("".join(lines))
    with pytest.raises(
        InputError, match=r"reviews: the sentiment reward is right on \d+ of \d+ .* no better than chance"
    ):
        sentiment_scores(SentimentCorpus(str(reviews))).make()
