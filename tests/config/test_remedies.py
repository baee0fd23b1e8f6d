"""Settings that error messages name are parameters that can be bound: the texts of the errors are searched for names."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import gin
import pytest

from rlhf_jax.config import surface  # noqa: F401  registers the names
from rlhf_jax.data.record_builders import comparison_file, demonstration_file, prompt_file

ROOT = Path(__file__).resolve().parents[2]
ERRORS = {"InputError", "UnusableRow", "UnusableRecord", "RunStopped"}
FILES = (comparison_file, demonstration_file, prompt_file)
"""The builders behind every message about a row or a file: what such a message names must be a parameter of all of them."""
BARE = re.compile(r"\b(?:set|use|with|unset|leave|drop such (?:rows|records) with) ([a-z_]+)(?: ?= ?| unset\b| \()")
"""A setting without its owner: "set encoding (", "use style='plain'", "leave split unset"."""


def text_of(node: ast.AST) -> str:
    """Return the texts below a node, one a line; an f-string has "{}" for its expressions, whose own texts follow it."""
    if isinstance(node, ast.JoinedStr):
        pieces = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
        inner = [text_of(part) for part in node.values if isinstance(part, ast.FormattedValue)]
        return "\n".join(["".join(map(str, pieces)), *filter(None, inner)])
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    return "\n".join(filter(None, map(text_of, ast.iter_child_nodes(node))))


def messages(*packages: str) -> Iterator[tuple[str, str]]:
    """Yield (place, text) of every error that the packages raise, and of texts that are assigned to a name."""
    for path in (path for package in packages for path in sorted((ROOT / "rlhf_jax" / package).glob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            is_error = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS
            is_assigned = isinstance(node, ast.Assign) and isinstance(
                node.value, ast.Constant | ast.JoinedStr | ast.IfExp
            )
            if is_error or is_assigned:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", text_of(node)


def parameters(name: str) -> set[str]:
    match = gin.config._REGISTRY.get_match(name)
    return set(inspect.signature(match.wrapped).parameters) if match else set()


def run_parameters() -> set[str]:
    names: set[str] = set()
    for path in (ROOT / "experiments").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name == "run":
                names |= {argument.arg for argument in node.args.args}
    return names


def test_named_settings_of_an_object_are_its_parameters() -> None:
    """`Fields.prompt`, `run.lora`, `demonstration_file.heldout`: the object can be bound and has that parameter."""
    runs, wrong, count = run_parameters(), [], 0
    for place, text in messages("data", "io", "config", "rundir", "loop", "algorithms", "launch"):
        for owner, name in re.findall(r"\b([A-Z][a-z]+[A-Za-z]*|run|[a-z]+_file)\.([a-z][a-z_]+)\b(?![.(/])", text):
            valid_names = runs if owner == "run" else parameters(owner)
            count += 1
            if name not in valid_names and name not in ("gin", "json", "safetensors"):
                wrong.append(f"{place}: {owner}.{name}")
    assert wrong == [] and count > 30


def test_bare_settings_are_parameters_of_every_file_builder() -> None:
    """`set encoding` (often latin-1): whichever program reads the file, its builder takes it; or it is the template's."""
    file_settings = set.intersection(*(set(inspect.signature(builder).parameters) for builder in FILES))
    allowed = file_settings | parameters("Template") | {"heldout", "held_out"}
    wrong, names = [], set()
    for place, text in messages("data", "io"):
        for name in BARE.findall(text):
            names.add(name)
            if name not in allowed:
                wrong.append(f"{place}: {name}")
    assert wrong == []
    assert {"format", "encoding", "delimiter", "quotes", "split", "unusable", "style"} <= names


@pytest.mark.parametrize("name", ["heldout", "heldout_path", "heldout_split"])
def test_heldout_settings_are_parameters_of_what_splits(name: str) -> None:
    for builder in FILES[:2]:
        assert name in inspect.signature(builder).parameters
