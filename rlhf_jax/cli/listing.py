"""Experiments and configurations with a line about each, read from their files."""

from __future__ import annotations

import ast
import re

from rlhf_jax.storage.shipped import config_path, configs, experiments, script_path


def experiment_rows() -> list[tuple[str, str]]:
    """List (name, first line of the docstring) of every experiment."""
    return [
        (name, _first_line(ast.get_docstring(ast.parse(script_path(name).read_text())) or "")) for name in experiments()
    ]


def config_rows() -> list[tuple[str, str]]:
    """List (name, first comment that is not a command) of every shipped configuration."""
    return [(name, first_comment(config_path(name).read_text())) for name in configs()]


def first_comment(text: str) -> str:
    """Return the first sentence of a gin file's comments, after the command lines; '' without one."""
    sentence, continued = "", False
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        words = line.lstrip("# ").strip()
        command = continued or words.startswith(("python ", "rlhf-jax ", "EXTRAS=", "scripts/", "bash "))
        continued = command and words.endswith("\\")
        if not command:
            sentence = f"{sentence} {words}".strip()
            if match := re.search(r"[.!](?= |$)", sentence):
                return sentence[: match.end()]
    return sentence


def config_experiment(text: str) -> str | None:
    """Return the experiment that the command in a gin file's comments starts: 'train_ppo'; None when there is no command."""
    match = re.search(r"^#.*\bexperiments/(\w+)\.py", text, re.MULTILINE)
    return match[1] if match else None


def _first_line(docstring: str) -> str:
    return docstring.strip().split("\n\n")[0].replace("\n", " ")
