"""The rlhf-jax command: what it starts, and what it prints."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from rlhf_jax.cli import main as program
from rlhf_jax.cli.listing import config_experiment, config_rows, experiment_rows, first_comment
from rlhf_jax.cli.main import binding, main, script_arguments
from rlhf_jax.cli.new_config import write_config
from rlhf_jax.config.parsing import scan
from rlhf_jax.errors import InputError
from rlhf_jax.launch.describe import experiment_keys, field_meanings
from rlhf_jax.storage.shipped import ROOT, config_path, script_path

assert program is main


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd):
    """Run a command line; return (exit code, arguments of the script that it started, stdout, stderr)."""

    def call(*words: str):
        started: list[list[str]] = []
        monkeypatch.setattr(sys, "argv", ["rlhf-jax", *words])
        monkeypatch.setattr(os, "execv", lambda path, arguments: started.append(arguments))
        code = 0
        try:
            main()
        except SystemExit as error:
            code = int(error.code or 0)
        out, err = capfd.readouterr()
        return code, started[0] if started else None, out, err

    return call


def test_a_verb_starts_the_script_with_its_flags(command) -> None:
    code, arguments, _, _ = command(
        "train-ppo", "--config", "support_desk/ppo", "--set", "PPOConfig.kl_coefficient=0.05", "--debug"
    )
    assert code == 0 and arguments[1:] == [
        "-P",
        str(ROOT / "experiments" / "train_ppo.py"),
        f"--gin_file={ROOT / 'configs' / 'support_desk' / 'ppo.gin'}",
        "--gin_bindings=PPOConfig.kl_coefficient = 0.05",
        "--debug",
    ]


@pytest.mark.parametrize(
    ("words", "last"),
    [
        (("doctor", "train-sft", "--config=smoke/sft"), ["--doctor", f"--gin_file={ROOT}/configs/smoke/sft.gin"]),
        (("preview", "train-sft", "--preview=9"), ["--preview=3", "--preview=9"]),
        (("plan", "train_ppo", "--slice=v5p:2x2x4"), ["--plan=v5p:2x2x4"]),
        (("train-sft", "--help"), ["--help"]),
        (("sweep", "--experiment=train_ppo"), ["--experiment=train_ppo"]),
    ],
)
def test_modes_and_flags_are_passed_on(command, words, last) -> None:
    assert command(*words)[1][3:] == last


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("frobnicate",), "No such command 'frobnicate'"),
        (("train-ppo", "--config", "nowhere/x"), "nowhere/x: neither a gin file nor a shipped configuration"),
        (("train-ppo", "--set", "PPOConfig.kl_coefficient"), "give KEY=VALUE"),
        (("train-ppo", "--config"), "--config: give it a value"),
        (("train-ppo", "--set", "=3"), "give KEY=VALUE"),
        (("doctor", "evaluate"), "name a training experiment: train_dpo"),
        (("plan", "train-ppo"), "give --slice"),
        (("describe", "train-ppo", "frobnicate"), "no key contains 'frobnicate'"),
        (("describe", "sweep"), "has no keys of gin"),
        (("describe", "nothing"), "no such experiment"),
        (("new", "x"), "Missing option '--from'"),
    ],
)
def test_what_cannot_be_used_is_one_line(command, words, message) -> None:
    code, arguments, out, err = command(*words)
    assert (code, arguments, out) == (2, None, "")
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        ("run.seed=3", "run.seed = 3"),
        ("run.run_dir=runs/x", "run.run_dir = 'runs/x'"),
        ("run.run_dir='runs/x'", "run.run_dir = 'runs/x'"),
        ("run.loop=@LoopConfig()", "run.loop = @LoopConfig()"),
        ("run.seed=%SEED", "run.seed = %SEED"),
        ("x.names=('a', 'b')", "x.names = ('a', 'b')"),
        ("Fields.prompt=a=b", "Fields.prompt = 'a=b'"),
        ("Fields.prompt=", "Fields.prompt = ''"),
        ("run.stages=(@a/Stage(), @b/Stage())", "run.stages = (@a/Stage(), @b/Stage())"),
        ("run.x=it's", 'run.x = "it\'s"'),
    ],
)
def test_set_takes_literals_references_and_texts(text: str, bound: str) -> None:
    assert binding(text) == bound


def test_words_that_are_not_ours_stay_in_order() -> None:
    assert script_arguments(["--debug", "--set=run.seed=1", "x"]) == ["--debug", "--gin_bindings=run.seed = 1", "x"]


def test_list_has_every_experiment_and_configuration(command) -> None:
    _, _, out, _ = command("list")
    assert all(name in out for name, _ in (*experiment_rows(), *config_rows()))
    assert all(words for _, words in experiment_rows())


def test_the_first_comment_is_not_a_command() -> None:
    text = "# python experiments/train_ppo.py --gin_file=x.gin \\\n#     --gin_bindings=y\n# PPO against gold.\nrun.x = 1\n"
    assert first_comment(text) == "PPO against gold." and config_experiment(text) == "train_ppo"
    assert first_comment("# A sentence over\n# two lines. Another.\n") == "A sentence over two lines."
    assert first_comment("run.x = 1\n# later\n") == "" and config_experiment("run.x = 1") is None


def test_describe_gives_type_default_meaning_and_place(command) -> None:
    _, _, out, _ = command("describe", "train-ppo", "kl_coefficient")
    assert "PPOConfig.kl_coefficient: float = 0.05" in out and "rlhf_jax/learn/ppo.py:" in out and "run" not in out


def test_keys_follow_the_types_that_run_takes() -> None:
    names = {key.name for key in experiment_keys("train_sft")}
    assert {"run.model", "OptimizerConfig.learning_rate", "demonstration_file.path", "Template.style"} <= names
    assert not any(name.startswith(("PPOConfig.", "SamplingConfig.")) for name in names)


def test_meanings_are_read_from_docstrings() -> None:
    text = "Settings.\n\n    rate: of the optimizer. low, high: bounds,\n    both included.\n\n    Another paragraph."
    meanings = field_meanings(text, ["rate", "low", "high", "other"])
    assert meanings == {
        "rate": "of the optimizer.",
        "low": "bounds, both included.",
        "high": "bounds, both included.",
    }


def test_new_writes_a_file_that_gin_reads(tmp_path: Path) -> None:
    line = write_config(str(tmp_path / "mine"), "support_desk/ppo")
    path = tmp_path / "mine.gin"
    assert line == f"rlhf-jax train-ppo --config {path}"
    text = path.read_text()
    assert "include 'configs/support_desk/ppo.gin'" in text and "#PPOConfig.kl_coefficient = 0.1\n" in text
    changed = text.replace("#PPOConfig.kl_coefficient = 0.1", "PPOConfig.kl_coefficient = 0.2")
    path.write_text(changed)
    values = {f"{b.selector}.{b.argument}": b.value for b in scan([str(path)], [])}
    assert values["PPOConfig.kl_coefficient"] == 0.2 and values["run.steps"] == 30
    with pytest.raises(InputError, match=r"mine\.gin: exists already"):
        write_config(str(tmp_path / "mine"), "support_desk/ppo")


def test_every_shipped_configuration_names_its_experiment() -> None:
    included = {"plan/llama3_8b", "smoke/desk", "support_desk/desk", "ppo/sentiment_corpus", "smoke/plan"}
    unnamed = [name for name, _ in config_rows() if config_experiment(config_path(name).read_text()) is None]
    assert set(unnamed) <= included


def test_names_of_scripts_take_dashes() -> None:
    assert script_path("train-ppo") == script_path("train_ppo") == ROOT / "experiments" / "train_ppo.py"
