"""The promises of SECURITY.md, checked on the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for folder in ("rlhf_jax", "experiments", "scripts") for path in (ROOT / folder).rglob("*.py"))
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "np.load", "numpy.load"}
KEYWORDS = {"allow_pickle": True, "trust_remote_code": True, "shell": True}


def dotted(node: ast.expr) -> str:
    """Return 'a.b.c' for a name or attribute, '' for any other expression."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def offences(text: str) -> Iterator[str]:
    """Yield the forbidden imports and calls of a source, as 'line: text'."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{node.lineno}: import {name}" for name in names if name.split(".")[0] in MODULES)
        elif isinstance(node, ast.Call):
            if dotted(node.func) in CALLS:
                yield f"{node.lineno}: {dotted(node.func)}()"
            for keyword in node.keywords:
                if isinstance(keyword.value, ast.Constant) and keyword.value.value is KEYWORDS.get(
                    keyword.arg or "", ...
                ):
                    yield f"{node.lineno}: {keyword.arg}={keyword.value.value}"


def test_the_search_finds_what_it_should() -> None:
    text = "import pickle\nfrom yaml import load\neval('1')\nnp.load('x')\nf(trust_remote_code=True)\nrun('x', shell=True)\n"
    assert [line.split(":")[0] for line in offences(text)] == ["1", "2", "3", "4", "5", "6"]
    assert not list(offences("model.eval()\nre.compile('x')\nf(shell=False, allow_pickle=False)\n"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_runs_data_as_code(path: Path) -> None:
    assert not list(offences(path.read_text()))
