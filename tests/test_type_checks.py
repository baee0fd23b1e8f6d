"""The files that mypy checks when it is called without arguments, as before every change."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_mypy_checks_every_program() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert settings["strict"] and {"rlhf_jax", "experiments", "scripts"} <= set(settings["files"])
    assert not any(override.get("ignore_errors", False) for override in settings["overrides"])
