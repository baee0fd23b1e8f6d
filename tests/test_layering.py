"""Allowed imports between packages: the table of docs/design.md, enforced on the source without importing it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rlhf_jax"
BASE = {"records", "batches", "errors", "messages", "processes"}
"""Modules that every package may import; they import no jax."""
ENGINE = {
    "models",
    "parallel",
    "rollout",
    "learn",
    "io",
    "data",
    "rewards",
    "ops",
    "storage",
    "checkpoint_files",
    "statistics",
}
START = {"loop", "rundir", "config", "parallel", "storage", "checkpoint_files"}
MAY: dict[str, set[str]] = {
    "errors": set(),
    "messages": set(),
    "processes": set(),
    "batches": {"errors"},
    "records": {"errors"},
    "types": {"batches", "errors"},
    "storage": BASE,
    "checkpoint_files": BASE | {"storage", "types"},
    "ops": BASE | {"types"},
    "data": BASE | {"storage"},
    "models": BASE | {"types", "ops", "storage"},
    "parallel": BASE | {"types"},
    "rollout": BASE | {"types", "ops", "models"},
    "learn": BASE | {"types", "ops"},
    "io": BASE | {"types", "storage", "checkpoint_files", "models", "parallel", "data"},
    "statistics": BASE | {"storage"},
    "reports": BASE | {"storage", "statistics"},
    "rewards": BASE | {"data", "storage", "statistics"},
    "feedback": BASE | {"rewards", "data", "storage", "statistics", "reports"},
    "evaluate": BASE | {"types", "rewards", "feedback", "data", "ops", "storage", "statistics", "reports"},
    "algorithms": BASE | {"types"} | ENGINE,
    "plan": BASE | {"types", "algorithms", "reports"} | ENGINE,
    "doctor": BASE | {"types", "algorithms", "reports", "rundir", "loop"} | ENGINE,
    "config": BASE | {"types", "storage"},
    "rundir": BASE | {"types", "storage", "checkpoint_files", "config", "parallel"},
    "loop": BASE | {"types", "storage", "checkpoint_files", "rundir", "config", "parallel"},
    "launch": BASE | {"types"} | START,
    "sweep": BASE | {"launch", "rundir", "config", "storage", "statistics", "reports", "checkpoint_files"},
    "cli": BASE
    | {"types", "evaluate", "feedback", "algorithms", "plan", "doctor", "reports", "launch"}
    | ENGINE
    | START,
    "__main__": BASE | {"cli"},
    "testing": BASE | {"types", "evaluate", "feedback", "algorithms", "plan", "doctor"} | ENGINE | START,
}
"""What each package may import of ours, itself apart."""
MAY["config.surface"] = set(MAY) - {"launch"}
INSIDE_FUNCTIONS: dict[str, set[str]] = {"launch": {"config.surface", "plan", "doctor"}}
"""What may be imported inside a function as well."""

MUST_NOT: dict[str, set[str]] = {
    **{
        name: {"jax", "flax", "optax", "orbax"}
        for name in (*BASE, "storage", "data", "rewards", "feedback", "statistics", "reports")
    },
    "types": {"numpy", "transformers", "datasets", "grain", "optax", "orbax"},
    "ops": {"flax", "transformers", "datasets", "grain", "orbax", "safetensors"},
    "models": {"transformers", "datasets", "grain", "optax", "orbax"},
    "parallel": {"flax", "transformers", "datasets", "grain", "optax", "orbax"},
    "rollout": {"transformers", "datasets", "grain", "optax", "orbax"},
    "learn": {"flax", "transformers", "datasets", "grain", "orbax"},
}
"""Libraries that a package must do without (``flax.struct`` is none: it only makes a dataclass a pytree)."""
GIN = "config"
"""The only package that imports gin."""


def imports(text: str, package: str) -> Iterator[tuple[str, bool]]:
    """Yield (dotted name, whether at the top of the module) of every import of a module. package: its package.

    ``from a.b import c`` gives 'a.b.c', since c may be a module.

    """
    tree = ast.parse(text)
    top = {id(node) for statement in tree.body for node in _outside_functions(statement)}
    for node in ast.walk(tree):
        at_top = id(node) in top
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{prefix}.{alias.name}", at_top) for alias in node.names)


def _outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        for child in ast.iter_child_nodes(node):
            yield from _outside_functions(child)


def package_of(path: Path) -> str:
    return ".".join(path.parent.relative_to(ROOT).parts)


def dotted(path: Path) -> str:
    """Return 'ops.kl' for rlhf_jax/ops/kl.py, 'ops' for rlhf_jax/ops/__init__.py."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def owner(name: str) -> str:
    """Return the longest prefix of ``name``, a dotted name below rlhf_jax, that the table has; '' for none."""
    parts = name.split(".")
    prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in MAY), "")


def violations(path: Path, text: str) -> list[str]:
    """List the imports of a source file that the table does not allow."""
    package, place = owner(dotted(path)), path.relative_to(ROOT).as_posix()
    if not package:
        return []
    problems = []
    for name, at_top in imports(text, package_of(path)):
        top, *parts = name.split(".")
        allowed = MAY[package] | {package} | (set() if at_top else INSIDE_FUNCTIONS.get(package, set()))
        if top == "rlhf_jax" and parts and owner(".".join(parts)) not in allowed:
            problems.append(f"{place}: {package} may not import {name}")
        if top in MUST_NOT.get(package, set()) and not name.startswith("flax.struct"):
            problems.append(f"{place}: {package} must do without {top}")
        if top == "experiments":
            problems.append(f"{place}: experiments are not imported by anybody")
        if top == "gin" and package.split(".")[0] != GIN:
            problems.append(f"{place}: gin belongs to config and experiments")
    return problems


def test_every_package_is_in_the_table() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and list(path.glob("*.py"))}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert folders | modules == {name for name in MAY if "." not in name}


def test_packages_import_what_they_may() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 10
    assert [problem for path in files for problem in violations(path, path.read_text())] == []


def test_imports_of_packages_have_no_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        package = owner(dotted(path))
        names = (name for name, at_top in imports(path.read_text(), package_of(path)) if at_top)
        uses = {owner(name.removeprefix("rlhf_jax.")) for name in names if name.startswith("rlhf_jax.")}
        graph.setdefault(package, set()).update(uses - {package, ""})
    assert _cycle(graph) is None
    assert _cycle({"a": {"b"}, "b": {"a"}}) is not None


def _cycle(graph: Mapping[str, set[str]]) -> list[str] | None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return None


@pytest.mark.parametrize("package", ["data", "rewards", "feedback"])
def test_workers_start_without_jax(package: str) -> None:
    """Worker processes import these packages, and start in a fraction of the time and memory without jax."""
    code = f"import sys, rlhf_jax.{package}; print(*(name for name in ('jax', 'flax', 'optax') if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == ""


def test_experiments_are_not_imported() -> None:
    files = [path for folder in ("experiments", "tests", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]
    importers = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name, _ in imports(path.read_text(), package_of(path))
        if name.split(".")[0] == "experiments"
    ]
    assert importers == []


def test_tests_import_neither_tests_nor_private_jax() -> None:
    """What several test modules need is a helper module beside them."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    names = [path.stem for path in files if path.stem.startswith("test_")]
    modules = set(names)
    assert len(names) == len(modules) > 100  # pytest knows a module by its name alone
    importers = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name, _ in imports(path.read_text(), package_of(path))
        if modules & set(name.split(".")) or ("._" in name and name.startswith("jax"))
    ]
    assert importers == []


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("learn/sft.py", "from rlhf_jax.models import Model", "learn may not import rlhf_jax.models.Model"),
        ("learn/sft.py", "def f():\n    import rlhf_jax.models as m", "learn may not import rlhf_jax.models"),
        ("learn/sft.py", "from ..data import encode", "learn may not import rlhf_jax.data.encode"),
        ("learn/sft.py", "from .. import data", "learn may not import rlhf_jax.data"),
        ("learn/sft.py", "from rlhf_jax import rollout", "learn may not import rlhf_jax.rollout"),
        ("data/encode.py", "import jax.numpy as jnp", "data must do without jax"),
        ("data/encode.py", "from rlhf_jax.types import Params", "data may not import rlhf_jax.types.Params"),
        ("io/load.py", "from gin import config", "gin belongs to"),
        ("loop/run.py", "from rlhf_jax.learn import optim", "loop may not import rlhf_jax.learn.optim"),
        ("launch/main.py", "from rlhf_jax.config import surface", "launch may not import rlhf_jax.config.surface"),
        ("plan/fits.py", "import experiments.train_ppo", "experiments are not imported by anybody"),
    ],
)
def test_the_check_can_fail(file: str, text: str, problem: str) -> None:
    problems = violations(PACKAGE / file, text)
    assert len(problems) == 1 and problem in problems[0]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("learn/sft.py", "from flax import struct\nfrom rlhf_jax.ops import kl\nfrom . import optim\nimport optax"),
        ("config/surface.py", "import gin\nfrom rlhf_jax import learn\nfrom rlhf_jax.models import Model"),
        ("launch/main.py", "def f():\n    from rlhf_jax.config import surface"),
        ("config/parsing.py", "import gin"),
        ("io/load.py", "from rlhf_jax.data import Tokenizer\nimport jax\nimport transformers"),
    ],
)
def test_the_check_lets_the_table_through(file: str, text: str) -> None:
    assert violations(PACKAGE / file, text) == []
