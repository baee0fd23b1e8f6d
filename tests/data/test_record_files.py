"""Builders of records: held-out records, skipped rows, and settings named in messages."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from rlhf_jax.data import (
    Demonstration,
    EncodedSet,
    Fields,
    Message,
    Template,
    encode_demonstration,
    encode_prompt,
    record_builders,
)
from rlhf_jax.data.record_sets import Records, encode_records, report_skipped
from rlhf_jax.errors import InputError
from rlhf_jax.testing import byte_tokenizer


def comparison_file(*arguments: Any, **settings: Any) -> Records:
    return record_builders.comparison_file(*arguments, **settings).read()


def demonstration_file(*arguments: Any, **settings: Any) -> Records:
    return record_builders.demonstration_file(*arguments, **settings).read()


def prompt_file(*arguments: Any, **settings: Any) -> Records:
    return record_builders.prompt_file(*arguments, **settings).read()


RAW = Template(style="raw")
Rows = list[dict[str, Any]]
ROWS: Rows = [{"prompt": f"Name number {n}.", "response": f"It is {n}."} for n in range(8)]
STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ m.content }}<|eos|>{% endfor %}"
)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write_rows(rows: Rows, name: str = "data.jsonl") -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write_rows


@pytest.mark.parametrize("heldout", [0, 0.0, None])
def test_training_on_all_rows(heldout: float | None, write: Callable[..., str]) -> None:
    records = demonstration_file(write(ROWS), RAW, heldout=heldout)
    assert len(records.train) == 8 and not records.heldout
    pairs = [row | {"chosen": "a", "rejected": "b"} for row in ROWS]
    assert len(comparison_file(write(pairs), RAW, heldout=heldout).train) == 8


def test_an_empty_heldout_side_is_named(write: Callable[..., str]) -> None:
    with pytest.raises(InputError) as caught:
        demonstration_file(write(ROWS), RAW, heldout=0.001)
    assert "demonstration_file.heldout = 0.001: the held-out side is empty (8 records); set heldout = 0" in str(
        caught.value
    )
    with pytest.raises(InputError, match="the training side is empty"):
        demonstration_file(write(ROWS[:1]), RAW, heldout=0.999)
    for wrong in (1.0, -0.1, 3):
        with pytest.raises(InputError, match="demonstration_file.heldout = .*: give a fraction from 0"):
            demonstration_file(write(ROWS), RAW, heldout=wrong)


def test_heldout_records_of_their_own_file(write: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    """Two of the eight training prompts are held out too (in other case): six stay."""
    heldout_rows = [
        ROWS[0] | {"prompt": "NAME number 0."},
        ROWS[3],
        {"prompt": "New", "response": None},
        {"prompt": "n", "response": "x"},
    ]
    train, heldout = write(ROWS), write(heldout_rows, "held.jsonl")
    records = demonstration_file(train, RAW, heldout_path=heldout)
    assert [record.response for record in records.train] == [f"It is {n}." for n in (1, 2, 4, 5, 6, 7)]
    assert [record.response for record in records.heldout] == ["It is 0.", "It is 3.", "x"]
    assert records.files == (train, heldout)
    sides = encode_records(
        records, Demonstration, lambda r: encode_demonstration(r, byte_tokenizer(), RAW, max_length=64)
    )
    report_skipped(records, *sides, byte_tokenizer())
    message = capsys.readouterr().err
    assert "training records: 6 of 8 used; left out: prompt is in the held-out data 2" in message
    assert (
        f"held-out records: 3 of 4 used; left out: field 'response' is null 1; the first: {heldout}:3: field" in message
    )
    with pytest.raises(InputError, match="heldout = 0.3: has no effect beside heldout_path"):
        demonstration_file(train, RAW, heldout=0.3, heldout_path=heldout)
    with pytest.raises(InputError, match="every prompt of .* is also in the held-out data"):
        demonstration_file(train, RAW, heldout_path=train)


def test_heldout_split_of_a_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"train": ROWS[:5], "test": ROWS[5:]}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, configuration, split: splits[split])
    records = demonstration_file("some/set", RAW, split="train", heldout_split="test")
    assert (len(records.train), len(records.heldout), records.files) == (5, 3, ("some/set",))


@pytest.mark.parametrize("value", [None, True, 7, 1.5, "", []])
def test_responses_that_are_no_text_are_dropped(value: Any, write: Callable[..., str]) -> None:
    path = write([*ROWS, {"prompt": "q", "response": value}])
    records = demonstration_file(path, RAW, heldout=0)
    assert len(records.train) == 8 and sum(records.unusable.values()) == 1
    with pytest.raises(InputError, match=r"data.jsonl:9: field 'response' is .*drop such rows with unusable='drop'"):
        demonstration_file(path, RAW, heldout=0, unusable="error")
    prompts = write([*ROWS, {"prompt": None}])
    assert len(prompt_file(prompts, RAW, unusable="drop").train) == 8


def test_a_wrong_column_names_the_first_row(write: Callable[..., str]) -> None:
    """Every row is unusable: that is a setting, not data to drop."""
    path = write([{"q": "a", "a": "b"}] * 3)
    with pytest.raises(InputError) as caught:
        demonstration_file(path, RAW, heldout=0)
    assert "data.jsonl:1: field 'prompt' is missing; the row has 'q', 'a': set Fields.prompt" in str(caught.value)
    assert "none of the 3 rows can be used" in str(caught.value)
    assert len(demonstration_file(path, RAW, Fields(prompt="q", response="a"), heldout=0).train) == 3
    with pytest.raises(InputError, match="is empty; give a file"):
        demonstration_file(write([]), RAW, heldout=0)


def test_how_a_file_is_read_can_be_told(tmp_path: Path) -> None:
    for builder in (demonstration_file, prompt_file):
        lines = "".join(
            json.dumps(row, ensure_ascii=False) + "\n" for row in [*ROWS, {"prompt": "Où ?", "response": "Là."}]
        )
        (tmp_path / "latin.json").write_bytes(lines.encode("latin-1"))
        settings: dict[str, Any] = {} if builder is prompt_file else {"heldout": 0}
        records = builder(str(tmp_path / "latin.json"), RAW, format="jsonl", encoding="latin-1", **settings)
        assert records.train[-1].prompt[0].content == "Où ?"
    (tmp_path / "a.csv").write_text('prompt;response\n"a";b"\n')
    (record,) = demonstration_file(str(tmp_path / "a.csv"), RAW, heldout=0, delimiter=";", quotes=False).train
    assert (record.prompt[0].content, record.response) == ('"a"', 'b"')


def refused(unusable: str, write: Callable[..., str]) -> Records:
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    rows = [*ROWS, {"id": "r9", "prompt": system, "response": "x"}]
    return prompt_file(write(rows), Template(style="chat"), unusable=unusable)  # type: ignore[arg-type]


def test_a_template_that_refuses_a_row_says_which(write: Callable[..., str]) -> None:
    tokenizer = byte_tokenizer(STRICT)

    def encoded(records: Records) -> Any:
        def encode(record: Any) -> Any:
            return encode_prompt(record, tokenizer, records.template, max_prompt_length=64)

        return encode_records(records, object, encode)[0]

    with pytest.raises(InputError) as caught:
        encoded(refused("error", write))
    assert str(caught.value).startswith("record r9: ") and "no system" in str(caught.value)
    assert "drop such records with unusable='drop'" in str(caught.value) and "\n" not in str(caught.value)
    result = encoded(refused("drop", write))
    assert len(result.items) == 8 and sum(result.dropped.values()) == 1


def test_a_template_that_refuses_every_row_names_the_first(write: Callable[..., str]) -> None:
    refusal = "{% if 'number' in messages[0].content %}{{ raise_exception('never') }}{% endif %}"
    tokenizer = byte_tokenizer(refusal + "{{ messages[-1].content }}<|eos|>")
    records = demonstration_file(write(ROWS), Template(style="chat"), heldout=0)

    def encode(record: Any) -> Any:
        return encode_demonstration(record, tokenizer, records.template, max_length=64)

    with pytest.raises(InputError, match=r"the first: record data.jsonl:1: .*chat template refuses .*never"):
        encode_records(records, Demonstration, encode)


def test_keys_that_nothing_reads_are_listed_once(capsys: pytest.CaptureFixture[str]) -> None:
    talk = (Message("user", "q", {"mood": "good", "name": "Ann"}),)
    records = Records([Demonstration(str(n), talk, "r", keys={"mood": "bad"}) for n in range(3)], [], Template())
    empty = EncodedSet([], [], Counter())
    report_skipped(records, empty, empty, byte_tokenizer("{{ messages[0].name }}"))
    assert capsys.readouterr().err == "messages: keys that the template does not read: 'mood' (6)\n"
