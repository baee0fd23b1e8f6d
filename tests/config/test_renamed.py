"""Whoever uses an old name of a gin key or a metric is told the new one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlhf_jax.config.gin_errors import explain_parse
from rlhf_jax.config.renamed import GIN_KEYS, METRICS, renamed_key, renamed_metric

ROOT = Path(__file__).resolve().parents[2]


def test_a_key_under_its_old_name_says_the_new_one() -> None:
    text = "Configurable 'rlhf_jax.GRPOConfig' doesn't have a parameter named 'drop_even_groups'."
    message = explain_parse(text, (), (), lambda name: ("drop_zero_variance_groups",))
    assert message.endswith(
        "'drop_even_groups' of rlhf_jax.GRPOConfig; renamed to GRPOConfig.drop_zero_variance_groups"
    )


def test_names_that_were_not_renamed_say_nothing() -> None:
    assert renamed_key("PPOConfig", "kl_coefficient") == renamed_metric("score") == ""


def test_a_metric_under_its_old_name_says_the_new_one() -> None:
    assert renamed_metric("even_groups") == "; renamed to zero_variance_groups"


@pytest.mark.parametrize("table", [GIN_KEYS, METRICS])
def test_the_page_lists_every_name(table: dict[str, str]) -> None:
    page = (ROOT / "docs" / "renamed.md").read_text()
    for old, new in table.items():
        assert re.search(rf"\| `{re.escape(old)}`.* \| .*`{re.escape(new)}`", page)
