"""Training and held-out records of an experiment, their encoding, and the report of skipped ones."""

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
"""The share of skipped rows above which the report is a warning."""


@dataclasses.dataclass(frozen=True)
class Records:
    """Training records, and held-out records with other prompts.

    template: how conversations are rendered as text.
    loss_on: targets of the loss.
    files: the files whose hashes the run's provenance records.
    unusable, heldout_unusable: number of rows that gave no record, by reason, for training and held-out records (all in
    unusable when one file was split).
    on_unusable: treatment of a record that cannot be encoded.
    """

    train: Sequence[Any]
    heldout: Sequence[Any]
    template: Template
    loss_on: LossOn = "response"
    files: tuple[str, ...] = ()
    unusable: Mapping[str, int] = dataclasses.field(default_factory=dict)
    heldout_unusable: Mapping[str, int] = dataclasses.field(default_factory=dict)
    on_unusable: Unusable = "error"

    def require_kind(self, kind: type) -> Records:
        """Return the records themselves. Raises InputError when one is not a ``kind`` (the builder of another experiment)."""
        for record in (*self.train, *self.heldout):
            if not isinstance(record, kind):
                raise InputError(
                    f"{kind.__name__} records are needed here, got {type(record).__name__}; bind another builder "
                    "(rlhf_jax/config/surface.py lists them)"
                )
        return self

    def as_inputs(self) -> list[Input]:
        """Return the inputs for `open_run`: the files, or the hash of generated records."""
        if self.files:
            content = None if all(is_remote(file) or Path(file).exists() for file in self.files) else self._content()
            return [Input(f"data {index}", file, content) for index, file in enumerate(self.files)]
        return [Input("data", "generated", self._content())]

    def _content(self) -> str:
        """Return the fingerprint of the records, for data sets on a hub, which have no file to hash."""
        return data.fingerprint([*self.train, *self.heldout])


@dataclasses.dataclass(frozen=True)
class RecordSource:
    """Records that are read when a run is assembled, and not for a plan.

    template: how conversations are rendered as text.
    read: returns the records.
    """

    template: Template
    read: Callable[[], Records]


def open_records(source: RecordSource | Records) -> Records:
    """Return the records of a source; `Records`, which a user's own builder may return, are returned unchanged."""
    return source.read() if isinstance(source, RecordSource) else source


def encode_records(
    records: Records, kind: type, encode: Callable[[Any], Any]
) -> tuple[data.EncodedSet[Any, Any], data.EncodedSet[Any, Any]]:
    """Encode the records, all of ``kind``, and return (train, heldout); heldout is empty when there are none.

    Raises InputError.
    """
    records.require_kind(kind)
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
    """Encode prompts of at most ``length`` tokens, as `encode_records` does."""

    def encode(record: Any) -> Any:
        return data.encode_prompt(record, tokenizer, prompts.template, max_prompt_length=length)

    return encode_records(prompts, Prompt, encode)


def used_records(encoded: data.EncodedSet[Any, Any], unusable: Mapping[str, int]) -> str:
    """Return '740 of 800 used; left out: response too long 60', with the first unusable row where it is known."""
    reasons = Counter(encoded.dropped) + Counter(unusable)
    total = len(encoded.items) + sum(reasons.values())
    listing = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
    first = getattr(unusable, "first", "")
    words = f"; left out: {listing}" if listing else ""
    return f"{len(encoded.items)} of {total} used{words}{f'; the first: {first}' if first else ''}"


def report_skipped(
    records: Records,
    train: data.EncodedSet[Any, Any],
    heldout: data.EncodedSet[Any, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Print a line on stderr about skipped training records, skipped held-out records and message keys that are not read.

    Call it when the run is open, so that an InputError before it is reported alone.
    """
    for side, encoded, unusable in (
        ("training", train, records.unusable),
        ("held-out", heldout, records.heldout_unusable),
    ):
        skipped = sum(encoded.dropped.values()) + sum(unusable.values())
        if skipped:
            many = skipped > MANY_LEFT_OUT * (len(encoded.items) + skipped)
            warning = "warning: " if many else ""
            print(f"{warning}{side} records: {used_records(encoded, unusable)}", file=sys.stderr)
    messages = (message for record in (*records.train, *records.heldout) for message in record.messages)
    if unread := data.unread_keys(messages, tokenizer, records.template):
        listing = ", ".join(f"{key!r} ({count})" for key, count in sorted(unread.items()))
        print(f"messages: keys that the template does not read: {listing}", file=sys.stderr)
