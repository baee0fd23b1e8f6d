"""Records as an experiment uses them: to learn from and to check on, encoded, with nothing left out silently."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_jax import data
from rlhf_jax.data import Prompt, Template
from rlhf_jax.data.records import Unusable
from rlhf_jax.data.turn_tokens import LossOn
from rlhf_jax.errors import InputError
from rlhf_jax.storage.inputs import Input
from rlhf_jax.storage.remote import is_remote

MANY_LEFT_OUT = 0.2
"""Share of a side's rows from which on leaving them out is a warning: what remains is other data than was given."""


@dataclasses.dataclass(frozen=True)
class Records:
    """Records to learn from and prompt-disjoint ones to check on. files: what provenance fingerprints.

    unusable, heldout_unusable: rows of the files that became no record, by reason, of the two sides (of one file that was
    split: all under unusable). on_unusable: what is done with a record that cannot be encoded.
    """

    train: Sequence[Any]
    heldout: Sequence[Any]
    template: Template
    loss_on: LossOn = "response"
    files: tuple[str, ...] = ()
    unusable: Mapping[str, int] = dataclasses.field(default_factory=dict)
    heldout_unusable: Mapping[str, int] = dataclasses.field(default_factory=dict)
    on_unusable: Unusable = "error"

    def of(self, kind: type) -> Records:
        """Itself. Raises InputError when a record is not a ``kind``: a builder of another experiment was bound."""
        for record in (*self.train, *self.heldout):
            if not isinstance(record, kind):
                raise InputError(
                    f"{kind.__name__} records are needed here, got {type(record).__name__}; bind another builder "
                    "(rlhf_jax/config/surface.py lists them)"
                )
        return self

    def as_inputs(self) -> list[Input]:
        """For `open_run`: the files, or the hash of generated records."""
        if self.files:
            content = None if all(is_remote(file) or Path(file).exists() for file in self.files) else self._content()
            return [Input(f"data {index}", file, content) for index, file in enumerate(self.files)]
        return [Input("data", "generated", self._content())]

    def _content(self) -> str:
        """Of the records themselves: what is on a hub has no file to hash."""
        return data.fingerprint([*self.train, *self.heldout])


@dataclasses.dataclass(frozen=True)
class RecordSource:
    """Records that are read when a run is assembled; a plan reads none. template: how they are written. read: gives the records."""

    template: Template
    read: Callable[[], Records]


def open_records(source: RecordSource | Records) -> Records:
    """Return the records of a source; records themselves, which a builder of a user's own may give, as they are."""
    return source.read() if isinstance(source, RecordSource) else source


def encode_records(
    records: Records, kind: type, encode: Callable[[Any], Any]
) -> tuple[data.EncodedSet[Any, Any], data.EncodedSet[Any, Any]]:
    """(train, heldout) encoded; all must be of ``kind``; heldout is empty when there is none."""
    records.of(kind)
    train = data.encode_all(records.train, encode, unusable=records.on_unusable)
    if not records.heldout:
        return train, data.EncodedSet([], [], Counter())
    try:
        return train, data.encode_all(records.heldout, encode, unusable=records.on_unusable)
    except InputError as error:
        raise InputError(f"held-out records: {error}") from None


def encode_prompts(
    prompts: Records, tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[data.EncodedSet[Any, Any], data.EncodedSet[Any, Any]]:
    """`encode_records` of prompts to sample replies to, of at most ``length`` tokens."""

    def encode(record: Any) -> Any:
        return data.encode_prompt(record, tokenizer, prompts.template, max_prompt_length=length)

    return encode_records(prompts, Prompt, encode)


def report_skipped(
    records: Records,
    train: data.EncodedSet[Any, Any],
    heldout: data.EncodedSet[Any, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Nothing is left out silently: a line on stderr for each side of which something is, and one for the keys of messages
    that nothing reads. Call it when the run is open, so that a mistake of the user's stays one line."""
    for side, encoded, unusable in (
        ("training", train, records.unusable),
        ("held-out", heldout, records.heldout_unusable),
    ):
        reasons = Counter(encoded.dropped) + Counter(unusable)
        if reasons:
            told = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
            first = getattr(unusable, "first", "")
            told += f"; the first: {first}" if first else ""
            total = len(encoded.items) + sum(reasons.values())
            warning = "warning: " if sum(reasons.values()) > MANY_LEFT_OUT * total else ""
            print(f"{warning}{side} records: {len(encoded.items)} of {total} used; left out: {told}", file=sys.stderr)
    messages = (message for record in (*records.train, *records.heldout) for message in record.messages)
    if unread := data.unread_keys(messages, tokenizer, records.template):
        told = ", ".join(f"{key!r} ({count})" for key, count in sorted(unread.items()))
        print(f"messages: keys that the template does not read: {told}", file=sys.stderr)
