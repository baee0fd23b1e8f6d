"""Records of files and Hugging Face data sets, split into training and held-out records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_jax import data
from rlhf_jax.data import Dropped
from rlhf_jax.data.records import Unusable
from rlhf_jax.data.split import EmptySide, split_key
from rlhf_jax.errors import InputError, require_whole


@dataclass(frozen=True)
class RecordFile:
    """A source of records: the path or URL of a file, or the name of a Hugging Face data set.

    make: called as make(rows, source=, unusable=), returns (records, number of dropped rows by reason). unusable: "error" or
    "drop", the treatment of a row that gives no record. split: the split of the data set; None for a file. reading: arguments of
    `data.read_rows` (format, encoding, delimiter, quotes).
    """

    path: str
    make: Callable[..., tuple[list[Any], Dropped]]
    unusable: Unusable
    split: str | None = None
    reading: Mapping[str, Any] = field(default_factory=dict)

    def read(self) -> tuple[list[Any], Dropped]:
        """Read the file and return (records, dropped rows by reason).

        Raises InputError when no row gives a record, with the problem of the first row.
        """
        rows = data.read_rows(self.path, split=self.split, **self.reading)
        records, dropped = self.make(rows, source=self.path, unusable=self.unusable)
        if not records and dropped:
            raise InputError(f"{dropped.first} (none of the {dropped.total()} rows can be used)")
        if not records:
            raise InputError(f"{self.path}: is empty; give a file with rows")
        return records, dropped


@dataclass(frozen=True)
class HeldOut:
    """The choice of held-out records.

    builder: name of the builder, for messages.
    fraction: fraction of the prompts of the same file; None or 0 for none.
    path, split: file and split of the held-out records in place of a fraction; split alone is another split of the same
    data set.
    default: the default of ``fraction``.
    """

    builder: str
    fraction: float | None
    path: str | None
    split: str | None
    default: float

    def __post_init__(self) -> None:
        if self.fraction is not None and not 0.0 <= self.fraction < 1.0:
            raise InputError(f"{self.builder}.heldout = {self.fraction!r}: give a fraction from 0 (none) to below 1")
        if self.is_separate and self.fraction not in (None, 0, self.default):
            raise InputError(
                f"{self.builder}.heldout = {self.fraction!r}: has no effect beside heldout_path or heldout_split; remove it"
            )

    @property
    def is_separate(self) -> bool:
        """Whether the held-out records are in a file or split of their own."""
        return self.path is not None or self.split is not None


@dataclass(frozen=True)
class Sides:
    """Training and held-out records of a file, with the number of unusable rows by reason: fields of `Records`."""

    train: list[Any]
    heldout: list[Any]
    files: tuple[str, ...]
    unusable: Mapping[str, int]
    heldout_unusable: Mapping[str, int]


def read_sides(file: RecordFile, heldout: HeldOut, limit: int | None) -> Sides:
    """Read training and held-out records, at most ``limit`` of each.

    When the held-out records have a file or split of their own, training records with the same prompt are dropped and
    counted. Raises InputError when one of the two is empty.
    """
    if limit is not None:
        require_whole(f"{heldout.builder}.limit", limit, 1)
    records, dropped = file.read()
    if heldout.is_separate:
        return _read_separate(file, heldout, records, dropped, limit)
    if not heldout.fraction:
        return Sides(records[:limit], [], (file.path,), dropped, {})
    try:
        train, heldout_records = data.split_by_prompt(records, held_out=heldout.fraction)
    except EmptySide as error:
        raise InputError(
            f"{heldout.builder}.heldout = {heldout.fraction}: the {error.side} side is empty ({len(records)} records); set "
            "heldout = 0 to train on all of them, another fraction, or heldout_path"
        ) from None
    return Sides(train[:limit], heldout_records[:limit], (file.path,), dropped, {})


def _read_separate(
    file: RecordFile, heldout: HeldOut, records: list[Any], dropped: Dropped, limit: int | None
) -> Sides:
    other = RecordFile(heldout.path or file.path, file.make, file.unusable, heldout.split, file.reading)
    heldout_records, heldout_dropped = other.read()
    keys = {data.prompt_key(split_key(record)) for record in heldout_records}
    train = [record for record in records if data.prompt_key(split_key(record)) not in keys]
    if not train:
        raise InputError(
            f"{heldout.builder}: every prompt of {file.path} is also in the held-out data; give other held-out data"
        )
    if len(train) < len(records):
        dropped["prompt is in the held-out data"] = len(records) - len(train)
    files = (file.path,) if other.path == file.path else (file.path, other.path)
    return Sides(train[:limit], heldout_records[:limit], files, dropped, heldout_dropped)
