"""Which room may import which: the table of docs/design.md, enforced on the source without importing it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rlhf_jax"
ALL = {
    "records",
    "types",
    "saved",
    "reading",
    "remote",
    "ops",
    "data",
    "models",
    "parallel",
    "rollout",
    "learn",
    "rewards",
    "feedback",
    "evaluate",
    "programs",
    "plan",
    "io",
}

ROOMS: dict[str, set[str]] = {
    "records": {"data"},
    "types": set(),
    "files": {"types"},
    "messages": set(),
    "metric_files": {"types", "files"},
    "saved": {"types", "files"},
    "reading": {"types", "saved"},
    "command": {"types", "messages"},
    "parent_death": set(),
    "remote": {"types", "files", "saved"},
    "ops": {"types"},
    "data": {"records", "types", "remote"},
    "models": {"types", "files", "ops"},
    "parallel": {"types"},
    "rollout": {"types", "ops", "models"},
    "learn": {"types", "ops"},
    "rewards": {"records", "types", "ops", "data", "parent_death"},
    "feedback": {"types", "ops", "data"},
    "evaluate": {"records", "types", "files", "metric_files", "ops", "data", "rewards"},
    "programs": {"types", "models", "learn", "rollout", "parallel"},
    "plan": {"types", "files", "models", "learn", "rollout", "parallel", "io", "programs"},
    "io": {"types", "files", "saved", "reading", "remote", "models", "parallel", "data"},
    "run": {"types", "files", "metric_files", "messages", "saved", "reading", "command", "remote", "parent_death"},
    "doctor": {"types", "files", "saved", "data", "models", "learn", "rollout", "run"},
    "testing": ALL,  # shipped for the tests of users; nothing of ours may lean on it
}
"""What each room may import of ours, itself apart."""

FORBIDDEN: dict[str, set[str]] = {
    "records": {"jax", "flax", "optax", "orbax", "transformers", "datasets"},
    "types": {"numpy", "transformers", "datasets", "grain", "optax", "orbax"},
    "ops": {"flax", "transformers", "datasets", "grain", "orbax", "safetensors"},
    "data": {"jax", "flax", "optax", "orbax"},
    "remote": {"jax", "flax", "optax", "orbax"},
    "models": {"transformers", "datasets", "grain", "optax", "orbax"},
    "parallel": {"flax", "transformers", "datasets", "grain", "optax", "orbax"},
    "rollout": {"transformers", "datasets", "grain", "optax", "orbax"},
    "learn": {"flax", "transformers", "datasets", "grain", "orbax"},
}
"""Libraries a room must do without (``flax.struct`` is none: it only makes a dataclass a pytree).

``data`` prepares numpy arrays: no jax, so no jit; nor does ``remote``, which it reads through.
"""

EXCEPTIONS = {
    "run/configurables.py": ALL | {"run", "testing"},
    "run/heldout.py": {"types", "data", "evaluate", "parallel"},
    "run/record_files.py": {"types", "data"},
    "run/records.py": {"types", "remote", "data"},
    "run/rewards.py": {"records", "types", "data", "rewards"},
    "run/template_date.py": {"data", "io", "remote"},
    "run/rollouts.py": {"types", "data", "parallel"},
    "run/models.py": {"files", "types", "data", "io", "models", "parallel"},
    "run/cast.py": {"types", "data", "io", "learn", "models", "parallel", "programs", "rollout"},
}
GIN = {"rlhf_jax/run/config.py", "rlhf_jax/run/configurables.py"}


def imports(text: str, package: str) -> Iterator[str]:
    """Dotted names of everything a module imports, at its top or inside a function. package: the one it lies in.

    ``from a.b import c`` gives 'a.b.c': c may be a module.
    """
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def package_of(path: Path) -> str:
    return ".".join(path.parent.relative_to(ROOT).parts)


def room_of(path: Path) -> str:
    """'ops' for rlhf_jax/ops/kl.py, 'types' for rlhf_jax/types.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def violations(path: Path, text: str) -> list[str]:
    """What a source file imports against the table."""
    room, place = room_of(path), path.relative_to(ROOT).as_posix()
    if room == "__init__":
        return []
    allowed = EXCEPTIONS.get(path.relative_to(PACKAGE).as_posix(), ROOMS[room]) | {room}
    found = []
    for name in imports(text, package_of(path)):
        top, *rest = name.split(".")
        if top == "rlhf_jax" and rest and rest[0] not in allowed:
            found.append(f"{place}: room {room} may not import {name}")
        if top in FORBIDDEN.get(room, set()) and not name.startswith("flax.struct"):
            found.append(f"{place}: room {room} must do without {top}")
        if top == "experiments":
            found.append(f"{place}: experiments are not imported by anybody")
        if top == "gin" and place not in GIN:
            found.append(f"{place}: gin belongs to run/config.py, run/configurables.py and experiments")
    return found


def test_every_room_is_in_the_table() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and list(path.glob("*.py"))}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert folders | modules <= ROOMS.keys()


def test_rooms_import_what_they_may() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 10
    assert [problem for path in files for problem in violations(path, path.read_text())] == []


def test_experiments_are_not_imported() -> None:
    files = [path for folder in ("experiments", "tests", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]
    importers = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name in imports(path.read_text(), package_of(path))
        if name.split(".")[0] == "experiments"
    ]
    assert importers == []


def test_tests_lean_neither_on_each_other_nor_on_private_jax() -> None:
    """What several test modules need is a helper module beside them."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    names = [path.stem for path in files if path.stem.startswith("test_")]
    modules = set(names)
    assert len(names) == len(modules) > 100  # pytest knows a module by its name alone
    importers = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name in imports(path.read_text(), package_of(path))
        if modules & set(name.split(".")) or ("._" in name and name.startswith("jax"))
    ]
    assert importers == []


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("learn/sft.py", "from rlhf_jax.models import Model", "room learn may not import rlhf_jax.models.Model"),
        ("learn/sft.py", "def f():\n    import rlhf_jax.models as m", "room learn may not import rlhf_jax.models"),
        ("learn/sft.py", "from ..data import encode", "room learn may not import rlhf_jax.data.encode"),
        ("learn/sft.py", "from .. import data", "room learn may not import rlhf_jax.data"),
        ("learn/sft.py", "from rlhf_jax import rollout", "room learn may not import rlhf_jax.rollout"),
        ("data/encode.py", "import jax.numpy as jnp", "room data must do without jax"),
        ("io/load.py", "from gin import config", "gin belongs to"),
        ("run/loop.py", "from rlhf_jax.learn import optim", "room run may not import rlhf_jax.learn.optim"),
        ("plan/fits.py", "import experiments.train_ppo", "experiments are not imported by anybody"),
    ],
)
def test_the_check_can_fail(file: str, text: str, problem: str) -> None:
    found = violations(PACKAGE / file, text)
    assert len(found) == 1 and problem in found[0]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (
            "learn/sft.py",
            "from flax import struct\nfrom rlhf_jax.ops import kl\nfrom . import optim\nimport optax",
        ),
        ("run/configurables.py", "import gin\nfrom rlhf_jax import learn\nfrom rlhf_jax.models import Model"),
        ("run/config.py", "import gin"),
        ("io/load.py", "from rlhf_jax.data import Tokenizer\nimport jax\nimport transformers"),
    ],
)
def test_the_check_lets_the_table_through(file: str, text: str) -> None:
    assert violations(PACKAGE / file, text) == []
