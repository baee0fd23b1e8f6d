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
from rlhf_jax.data.support_desk_replies import DeskConfig, corpus_text, demonstration_records, prompt_records
from rlhf_jax.data.templates import Template
from rlhf_jax.data.turn_tokens import LossOn
from rlhf_jax.errors import InputError, require_one_of, require_whole
from rlhf_jax.records import Demonstration, Message, Prompt

DESK_TEMPLATE = Template(style="plain", prompt_format="{prompt}", response_prefix=" ")


def _one_message(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def _desk_demonstrations(desk: DeskConfig, split: str, start: int, count: int) -> list[Demonstration]:
    rows = demonstration_records(desk, split, start, count)
    return [Demonstration(row["id"], _one_message(row["prompt"]), row["response"]) for row in rows]


def desk_corpus(desk: DeskConfig, count: int, heldout: int = 256) -> RecordSource:
    """Documents to pre-train on; every token is a target."""

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
    """Demonstrations of mixed quality, cases start ... start + count - 1 of the train split."""
    _require_cases("desk_demonstrations", start, count)
    require_whole("desk_demonstrations.heldout", heldout, 0)

    def read() -> Records:
        train = _desk_demonstrations(desk, "train", start, count)
        return Records(train, _desk_demonstrations(desk, "validation", 0, heldout), DESK_TEMPLATE)

    return RecordSource(DESK_TEMPLATE, read)


def desk_prompts(desk: DeskConfig, split: str, start: int, count: int) -> RecordSource:
    """Prompts of the support desk (as ``train``)."""
    _require_cases("desk_prompts", start, count)
    require_one_of("desk_prompts.split", split, tuple(SPLITS))

    def read() -> Records:
        rows = prompt_records(desk, split, start, count)
        return Records([Prompt(str(r["id"]), _one_message(str(r["prompt"]))) for r in rows], [], DESK_TEMPLATE)

    return RecordSource(DESK_TEMPLATE, read)


def _require_cases(builder: str, start: int, count: int) -> None:
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
    """Demonstrations from a file, its URL or a hub data set, then with its ``split``.

    ``heldout`` of the prompts are kept for checking (0: none), or those of ``heldout_path`` or ``heldout_split`` are; at
    most ``limit`` records a side. loss_on: "response" learns the last response of a conversation, "assistant" every
    assistant turn, "all" everything. unusable: "drop" leaves out and counts rows that give no example, "error" stops at
    the first. format, encoding, delimiter, quotes: as in `data.sources.TextFormat`.
    """
    held = HeldOut("demonstration_file", heldout, heldout_path, heldout_split, 0.05)
    make = functools.partial(demonstrations, fields=fields)
    reading = {"format": format, "encoding": encoding, "delimiter": delimiter, "quotes": quotes}
    file = RecordFile(path, make, unusable, split, reading)
    return _file_source(file, held, limit, template, loss_on=loss_on, on_unusable=unusable)


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
    """Comparisons, as `demonstration_file`; hh_dialogues: rows are Anthropic's hh-rlhf."""
    held = HeldOut("comparison_file", heldout, heldout_path, heldout_split, 0.1)
    if hh_dialogues and fields is not None:
        raise InputError("comparison_file.fields: has no effect with hh_dialogues; remove one")
    make = hh_comparisons if hh_dialogues else functools.partial(comparisons, fields=fields)
    reading = {"format": format, "encoding": encoding, "delimiter": delimiter, "quotes": quotes}
    file = RecordFile(path, make, unusable, split, reading)
    return _file_source(file, held, limit, template, on_unusable=unusable)


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
    """Prompts (as ``train``) from a file, its URL or a hub data set, then with its ``split``; as `demonstration_file`."""
    make = functools.partial(prompts, fields=fields)
    reading = {"format": format, "encoding": encoding, "delimiter": delimiter, "quotes": quotes}
    none = HeldOut("prompt_file", None, None, None, 0.0)
    file = RecordFile(path, make, unusable, split, reading)
    return _file_source(file, none, limit, template, on_unusable=unusable)


def _file_source(
    file: RecordFile, held: HeldOut, limit: int | None, template: Template, **settings: Any
) -> RecordSource:
    """Return the records of a file, read when they are needed. settings: fields of `Records`."""
    if limit is not None:
        require_whole(f"{held.builder}.limit", limit, 1)

    def read() -> Records:
        return Records(**vars(read_sides(file, held, limit)), template=template, **settings)

    return RecordSource(template, read)
