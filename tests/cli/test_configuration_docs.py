"""docs/configuration.md says what the code says, and every key has a meaning."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from rlhf_jax.launch.describe import configurable_keys

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_what_the_code_says() -> None:
    spec = importlib.util.spec_from_file_location("configuration_docs", ROOT / "scripts" / "configuration_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "run scripts/configuration_docs.py"


def test_every_key_has_a_type_and_most_a_meaning() -> None:
    keys = [key for keys in configurable_keys().values() for key in keys]
    without = [key.name for key in keys if not key.meaning]
    assert all(key.type for key in keys)
    assert without == []
