"""A chat template that writes the date writes one date for a whole run: its first start's, or its model's."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_jax.algorithms import template_date
from rlhf_jax.algorithms.models import Loaded
from rlhf_jax.algorithms.template_date import keep_date, with_date
from rlhf_jax.data import Prompt, Template
from rlhf_jax.data.record_sets import Records
from rlhf_jax.io import read_template
from rlhf_jax.testing import byte_tokenizer

DATED = "{{ strftime_now('%d %b %Y') }}{{ messages }}"
PROMPTS = Records([Prompt("p", ())], [], Template())


def loaded(path: Path | None = None, chat_template: str = DATED) -> Loaded:
    model: Any = None
    return Loaded(model, {}, byte_tokenizer(chat_template), None if path is None else str(path))


def write_card(directory: Path, template: dict[str, Any]) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "model.json").write_text(json.dumps({"config": {}, "subtree": "params", "template": template}))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is 30 November 2026."""

    class Date(datetime.date):
        @classmethod
        def today(cls) -> Date:
            return cls(2026, 11, 30)

    monkeypatch.setattr(template_date.datetime, "date", Date)


@pytest.mark.usefixtures("clock")
def test_the_first_start_fixes_the_date(tmp_path: Path) -> None:
    assert with_date(PROMPTS, loaded(), tmp_path / "run").template.date == "2026-11-30"
    write_card(tmp_path / "model", {"date": "2025-02-03"})
    assert with_date(PROMPTS, loaded(tmp_path / "model"), tmp_path / "run").template.date == "2025-02-03"
    write_card(tmp_path / "run", {"date": "2025-01-01"})
    assert with_date(PROMPTS, loaded(tmp_path / "model"), tmp_path / "run").template.date == "2025-01-01"
    chosen = Records(PROMPTS.train, [], Template(date="2024-07-26"))
    assert with_date(chosen, loaded(tmp_path / "model"), tmp_path / "run") is chosen


@pytest.mark.usefixtures("clock")
def test_templates_without_a_date_have_none(tmp_path: Path) -> None:
    """Two models that were trained on different days have the same template."""
    assert with_date(PROMPTS, loaded(chat_template="{{ messages }}"), tmp_path) is PROMPTS
    plain = Records(PROMPTS.train, [], Template(style="plain"))
    assert with_date(plain, loaded(), tmp_path) is plain


@pytest.mark.usefixtures("clock")
def test_a_run_that_makes_no_model_keeps_the_date(tmp_path: Path) -> None:
    keep_date(tmp_path, Template())
    assert not list(tmp_path.iterdir())
    keep_date(tmp_path, Template(date="2025-01-01"))
    keep_date(tmp_path, Template(date="2025-01-02"))
    assert read_template(tmp_path) == Template(date="2025-01-01")
    assert with_date(PROMPTS, loaded(), tmp_path).template.date == "2025-01-01"


@pytest.mark.usefixtures("clock")
def test_a_run_that_moved_takes_the_date_of_its_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_card(tmp_path / "copy", {"date": "2025-01-01"})
    monkeypatch.setattr(template_date, "sync_url", lambda: f"file://{tmp_path}/copy")
    assert with_date(PROMPTS, loaded(), tmp_path / "run").template.date == "2025-01-01"
    monkeypatch.setattr(template_date, "sync_url", lambda: f"file://{tmp_path}/nothing")
    assert with_date(PROMPTS, loaded(), tmp_path / "run").template.date == "2026-11-30"
