"""Builders of record sets: from files and hub data sets, and from the simulated support desk."""

from __future__ import annotations

import functools
from typing import Any

from rlhf_jax.data.hh_rlhf import hh_comparisons
from rlhf_jax.data.pairs import comparisons
from rlhf_jax.data.record_files import HeldOut, RecordFile, read_sides
from rlhf_jax.data.record_sets import Records, RecordSource
from rlhf_jax.data.records import Fields, Unusable, demonstrations, prompts
from rlhf_jax.data.support_desk import SPLITS
from rlhf_jax.data.support_desk_responses import DeskConfig, corpus_text, demonstration_records, prompt_records
from rlhf_jax.data.templates import Template
from rlhf_jax.data.turn_tokens import LossOn
from rlhf_jax.errors import InputError, require_one_of, require_whole
from rlhf_jax.records import Demonstration, Message, Prompt

DESK_TEMPLATE = Template(style="plain", prompt_format="{prompt}", response_prefix=" ")


def _user_message(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def _desk_demonstrations(desk: DeskConfig, split: str, start: int, count: int) -> list[Demonstration]:
    rows = demonstration_records(desk, split, start, count)
    return [Demonstration(row["id"], _user_message(row["prompt"]), row["response"]) for row in rows]


def desk_corpus(desk: DeskConfig, count: int, heldout: int = 256) -> RecordSource:
    """Make support-desk documents to pre-train on; every token is a target.

    desk: seed and defect rates of the desk.
    count: number of documents to train on.
    heldout: number of held-out documents, of the validation split.
    """
    require_whole("desk_corpus.count", count, 1)
    require_whole("desk_corpus.heldout", heldout, 0)

    def documents(split: str, count: int) -> list[Demonstration]:
        texts = corpus_text(desk, split, 0, count)
        return [Demonstration(f"{split}-{index}", (), text) for index, text in enumerate(texts)]

    template = Template(style="raw")

    def read() -> Records:
        return Records(documents("train", count), documents("validation", heldout), template, "all")

    return RecordSource(template, read)


def desk_demonstrations(desk: DeskConfig, start: int, count: int, heldout: int = 256) -> RecordSource:
    """Make support-desk demonstrations of mixed quality, of cases start ... start + count - 1 of the train split.

    desk: seed and defect rates of the desk.
    start: index of the first case.
    count: number of demonstrations to train on.
    heldout: number of held-out demonstrations, the first cases of the validation split.
    """
    _check_cases("desk_demonstrations", start, count)
    require_whole("desk_demonstrations.heldout", heldout, 0)

    def read() -> Records:
        train = _desk_demonstrations(desk, "train", start, count)
        return Records(train, _desk_demonstrations(desk, "validation", 0, heldout), DESK_TEMPLATE)

    return RecordSource(DESK_TEMPLATE, read)


def desk_prompts(desk: DeskConfig, split: str, start: int, count: int) -> RecordSource:
    """Make support-desk prompts, of cases start ... start + count - 1; they are ``train`` of the records.

    desk: seed and defect rates of the desk.
    split: "train", "validation" or "heldout".
    start: index of the first case.
    count: number of prompts.
    """
    _check_cases("desk_prompts", start, count)
    require_one_of("desk_prompts.split", split, tuple(SPLITS))

    def read() -> Records:
        rows = prompt_records(desk, split, start, count)
        return Records([Prompt(str(r["id"]), _user_message(str(r["prompt"]))) for r in rows], [], DESK_TEMPLATE)

    return RecordSource(DESK_TEMPLATE, read)


def _check_cases(builder: str, start: int, count: int) -> None:
    require_whole(f"{builder}.start", start, 0)
    require_whole(f"{builder}.count", count, 1)


def demonstration_file(
    path: str,
    template: Template,
    fields: Fields | None = None,
    heldout: float | None = 0.05,
    limit: int | None = None,
    split: str | None = None,
    loss_on: LossOn = "response",
    heldout_path: str | None = None,
    heldout_split: str | None = None,
    unusable: Unusable = "drop",
    format: str | None = None,
    encoding: str = "utf-8",
    delimiter: str | None = None,
    quotes: bool = True,
) -> RecordSource:
    """Read demonstrations from a file, its URL or a Hugging Face data set.

    path: the file, its URL, or the name of a Hugging Face data set ("openai/gsm8k", "openai/gsm8k:main"), which needs split.
    template: how conversations are rendered as text.
    fields: names of the columns; None takes the defaults of `Fields`.
    heldout: fraction of the prompts that is held out for evaluation; None or 0 holds out none.
    limit: at most this many records for training, and as many held-out ones; None for no limit.
    split: split of a Hugging Face data set ("train", "train[:100]"); None for a file.
    loss_on: targets of the loss: "response" is the last response of a conversation, "assistant" every assistant turn,
    "all" every token.
    heldout_path: file of the held-out records, in place of heldout; None for none.
    heldout_split: split of the held-out records, of heldout_path or else of the same data set; None for none.
    unusable: "drop" skips and counts rows that give no record, "error" stops at the first.
    format: "jsonl", "json", "csv", "tsv", "parquet" or "txt"; None infers it from the file's ending, before an optional ".gz".
    encoding: encoding of a text file; a byte order mark at its beginning has precedence.
    delimiter: character between the cells of csv and tsv; None takes a comma, or a tab for tsv.
    quotes: whether cells of csv and tsv may stand in double quotes, with a quote inside them doubled; False reads quotes
    as text.
    """
    heldout_records = HeldOut("demonstration_file", heldout, heldout_path, heldout_split, 0.05)
    make = functools.partial(demonstrations, fields=fields)
    reading = {"format": format, "encoding": encoding, "delimiter": delimiter, "quotes": quotes}
    file = RecordFile(path, make, unusable, split, reading)
    return _file_source(file, heldout_records, limit, template, loss_on=loss_on, on_unusable=unusable)


def comparison_file(
    path: str,
    template: Template,
    fields: Fields | None = None,
    heldout: float | None = 0.1,
    hh_dialogues: bool = False,
    limit: int | None = None,
    split: str | None = None,
    heldout_path: str | None = None,
    heldout_split: str | None = None,
    unusable: Unusable = "drop",
    format: str | None = None,
    encoding: str = "utf-8",
    delimiter: str | None = None,
    quotes: bool = True,
) -> RecordSource:
    """Read comparisons from a file, its URL or a Hugging Face data set.

    path: the file, its URL, or the name of a Hugging Face data set ("openai/gsm8k", "openai/gsm8k:main"), which needs split.
    template: how conversations are rendered as text.
    fields: names of the columns; None takes the defaults of `Fields`.
    heldout: fraction of the prompts that is held out for evaluation; None or 0 holds out none.
    hh_dialogues: whether rows are the dialogues of Anthropic's hh-rlhf (Bai et al. 2022); excludes fields.
    limit: at most this many records for training, and as many held-out ones; None for no limit.
    split: split of a Hugging Face data set ("train", "train[:100]"); None for a file.
    heldout_path: file of the held-out records, in place of heldout; None for none.
    heldout_split: split of the held-out records, of heldout_path or else of the same data set; None for none.
    unusable: "drop" skips and counts rows that give no record, "error" stops at the first.
    format: "jsonl", "json", "csv", "tsv", "parquet" or "txt"; None infers it from the file's ending, before an optional ".gz".
    encoding: encoding of a text file; a byte order mark at its beginning has precedence.
    delimiter: character between the cells of csv and tsv; None takes a comma, or a tab for tsv.
    quotes: whether cells of csv and tsv may stand in double quotes, with a quote inside them doubled; False reads quotes
    as text.
    """
    heldout_records = HeldOut("comparison_file", heldout, heldout_path, heldout_split, 0.1)
    if hh_dialogues and fields is not None:
        raise InputError("comparison_file.fields: has no effect with hh_dialogues; remove one")
    make = hh_comparisons if hh_dialogues else functools.partial(comparisons, fields=fields)
    reading = {"format": format, "encoding": encoding, "delimiter": delimiter, "quotes": quotes}
    file = RecordFile(path, make, unusable, split, reading)
    return _file_source(file, heldout_records, limit, template, on_unusable=unusable)


def prompt_file(
    path: str,
    template: Template,
    fields: Fields | None = None,
    limit: int | None = None,
    split: str | None = None,
    unusable: Unusable = "error",
    format: str | None = None,
    encoding: str = "utf-8",
    delimiter: str | None = None,
    quotes: bool = True,
) -> RecordSource:
    """Read prompts from a file, its URL or a Hugging Face data set; they are ``train`` of the records.

    path: the file, its URL, or the name of a Hugging Face data set ("openai/gsm8k", "openai/gsm8k:main"), which needs split.
    template: how conversations are rendered as text.
    fields: names of the columns; None takes the defaults of `Fields`.
    limit: at most this many prompts; None for no limit.
    split: split of a Hugging Face data set ("train", "train[:100]"); None for a file.
    unusable: "drop" skips and counts rows that give no record, "error" stops at the first.
    format: "jsonl", "json", "csv", "tsv", "parquet" or "txt"; None infers it from the file's ending, before an optional ".gz".
    encoding: encoding of a text file; a byte order mark at its beginning has precedence.
    delimiter: character between the cells of csv and tsv; None takes a comma, or a tab for tsv.
    quotes: whether cells of csv and tsv may stand in double quotes, with a quote inside them doubled; False reads quotes
    as text.
    """
    make = functools.partial(prompts, fields=fields)
    reading = {"format": format, "encoding": encoding, "delimiter": delimiter, "quotes": quotes}
    none = HeldOut("prompt_file", None, None, None, 0.0)
    file = RecordFile(path, make, unusable, split, reading)
    return _file_source(file, none, limit, template, on_unusable=unusable)


def _file_source(
    file: RecordFile, heldout_records: HeldOut, limit: int | None, template: Template, **settings: Any
) -> RecordSource:
    """Return a source that reads the records of a file when they are needed. settings: fields of `Records`."""
    if limit is not None:
        require_whole(f"{heldout_records.builder}.limit", limit, 1)

    def read() -> Records:
        return Records(**vars(read_sides(file, heldout_records, limit)), template=template, **settings)

    return RecordSource(template, read)
