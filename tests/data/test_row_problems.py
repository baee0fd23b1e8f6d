"""Rows that JSON can write and no record can hold: they are named by line and field, or dropped and counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_jax.data import Fields, comparisons, demonstrations, prompts, read_rows
from rlhf_jax.errors import InputError

GOOD = '{"prompt": "Name a bird.", "response": "Crow."}'
DEEP = '{"prompt": "q", "response": "r", "x": ' + "[" * 100_000 + "]" * 100_000 + "}"
TOOLS = '{"prompt": "q", "response": "r", "tools": [{"name": "f", %s}]}'
BAD = {
    "a lone surrogate in the response": ('{"prompt": "q", "response": "Crow \\ud83d"}', "half of a surrogate pair"),
    "a lone surrogate in the prompt": ('{"prompt": "\\udc00 q", "response": "r"}', "field 'prompt' holds half"),
    "a lone surrogate in a message": (
        '{"prompt": [{"role": "user", "content": "a\\ud83d"}], "response": "r"}',
        "field 'prompt' holds half",
    ),
    "a lone surrogate in the id": ('{"id": "\\ud83d", "prompt": "q", "response": "r"}', "field 'id' holds half"),
    "null": ('{"prompt": "q", "response": null}', "field 'response' is null"),
    "a null prompt": ('{"prompt": null, "response": "r"}', "field 'prompt' is null"),
    "null in a message": (
        '{"prompt": [{"role": "user", "content": null}], "response": "r"}',
        "message 1: content is null",
    ),
    "a number": ('{"prompt": "q", "response": 7}', "field 'response' is int, not text"),
    "a truth value": ('{"prompt": "q", "response": true}', "field 'response' is bool, not text"),
    "NaN": ('{"prompt": "q", "response": NaN}', "field 'response' is float, not text"),
    "a NaN id": ('{"id": NaN, "prompt": "q", "response": "r"}', "field 'id' is nan, not a finite number"),
    "an integer of 5000 digits": ('{"id": ' + "9" * 5000 + ', "prompt": "q", "response": "r"}', "field 'id' is inf"),
    "a repeated key": ('{"prompt": "q", "response": "a", "response": "b"}', "occurs twice ('response')"),
    "a repeated key in a message": (
        '{"prompt": [{"role": "user", "content": "a", "content": "b"}], "response": "r"}',
        "occurs twice ('content')",
    ),
    "a role that is a list": (
        '{"prompt": [{"role": ["user"], "content": "q"}], "response": "r"}',
        "role ['user'] is unknown",
    ),
    "a role that is an object": ('{"prompt": [{"role": {}, "content": "q"}], "response": "r"}', "role {} is unknown"),
    "NaN in a message": (
        '{"prompt": [{"role": "user", "content": "q", "x": [NaN]}], "response": "r"}',
        "'prompt' holds nan",
    ),
    "a surrogate in tools": (TOOLS % '"x": "\\ud800"', "field 'tools' holds half of a surrogate pair"),
    "a repeated key in tools": (TOOLS % '"name": "g"', "occurs twice ('name')"),
    "NaN in tools": (TOOLS % '"x": {"y": NaN}', "field 'tools' holds nan, not a finite number"),
    "an integer of 5000 digits in tools": (TOOLS % ('"x": ' + "9" * 5000), "field 'tools' holds inf"),
    "deep nesting": (DEEP, "nested too deeply"),
    "a missing field": ('{"prompt": "q"}', "field 'response' is missing; the row has 'prompt': set Fields.response"),
    "an unknown role": ('{"prompt": [{"role": "bot", "content": "a"}], "response": "r"}', "role 'bot' is unknown"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_or_dropped(name: str, tmp_path: Path) -> None:
    text, message = BAD[name]
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{GOOD}\n{text}\n")
    with pytest.raises(InputError) as caught:
        demonstrations(read_rows(file), source="rows.jsonl")
    assert str(caught.value).startswith("rows.jsonl:2: ") and message in str(caught.value)
    assert "drop such rows with unusable='drop'" in str(caught.value) and "\n" not in str(caught.value)
    records, dropped = demonstrations(read_rows(file), source="rows.jsonl", unusable="drop")
    assert [record.response for record in records] == ["Crow."]
    assert dropped.total() == 1 and dropped.first.startswith("rows.jsonl:2: ")


def test_what_is_not_used_may_be_anything(tmp_path: Path) -> None:
    """Python's own json writes NaN, and 1e999 is infinity: a column that nothing reads does no harm."""
    file = tmp_path / "rows.jsonl"
    unused = [("a", "NaN"), ("b", "1e999"), ("c", "-" + "9" * 5000), ("d", '"\\ud83d"'), ("e", '{"k": 1, "k": 2}')]
    file.write_text("".join(f'{{"prompt": "q", "response": "r", "{name}": {value}}}\n' for name, value in unused))
    assert len(demonstrations(read_rows(file), source="rows.jsonl")[0]) == len(unused)


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", "1e39", "9" * 400, "9" * 5000, "true", '"much"'])
def test_a_margin_that_is_no_finite_number(value: str, tmp_path: Path) -> None:
    """float() of an integer with 400 digits overflows; one with 5000 is more than Python reads."""
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{{"prompt": "q", "chosen": "a", "rejected": "b", "margin": {value}}}\n')
    with pytest.raises(InputError, match=r"^rows.jsonl:1: field 'margin' is"):
        comparisons(read_rows(file), Fields(margin="margin"), source="rows.jsonl")


def test_an_extra_column_that_is_no_number(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "q", "answer": NaN}\n{"prompt": "q", "answer": 4}\n')
    with pytest.raises(InputError, match=r"^rows.jsonl:1: field 'answer' is nan, not a finite number"):
        prompts(read_rows(file), Fields(extra=("answer",)), source="rows.jsonl")
    remaining, dropped = prompts(read_rows(file), Fields(extra=("answer",)), source="rows.jsonl", unusable="drop")
    assert [prompt.extra for prompt in remaining] == [{"answer": 4}] and dropped.total() == 1


def test_the_items_of_a_json_list_are_rows_like_any_other(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text("[" + ", ".join([GOOD, BAD["null"][0], BAD["a repeated key"][0]]) + "]")
    records, dropped = demonstrations(read_rows(file), source="rows.json", unusable="drop")
    assert len(records) == 1 and set(dropped) == {"field 'response' is null", "a key of the row occurs twice"}
    file.write_text("[" + DEEP + "]")
    with pytest.raises(InputError, match="rows.json: the row is nested too deeply to be read; "):
        list(read_rows(file))


def test_truth_values_as_tables_write_them(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("prompt,response,ended\nq,r,True\nq,s,False\n")
    assert [record.ended for record in demonstrations(read_rows(file), source="rows.csv")[0]] == [True, False]


def test_a_conversation_as_the_response_is_explained() -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = json.loads(json.dumps({"prompt": "a", "response": talk}))
    with pytest.raises(InputError, match="set Fields.messages = 'response' for whole conversations"):
        demonstrations([(1, row)], source="f")
    assert demonstrations([(1, row)], Fields(messages="response"), source="f")[0][0].response == "b"
