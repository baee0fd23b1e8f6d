"""The date that a chat template writes: one for a whole run, stored with its model.

A template that writes "Today Date: 30 Nov 2026" renders other texts every day, so that no run could be resumed after midnight.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path

from rlhf_jax.algorithms.models import Loaded
from rlhf_jax.data import Template, writes_date
from rlhf_jax.data.record_sets import Records
from rlhf_jax.io import locate, parse_template, read_template
from rlhf_jax.parallel.distributed import broadcast_from_first
from rlhf_jax.storage.files import write_atomically
from rlhf_jax.storage.names import CARD, TEMPLATE
from rlhf_jax.storage.remote import is_remote, open_store, sync_url, wrap_errors


def with_date(records: Records, loaded: Loaded, run_dir: str | Path) -> Records:
    """Return ``records`` with a date in their template, where the chat template of ``loaded`` writes one.

    The date is ``Template.date``; else that of the run directory, from its first start; else that of the model's training;
    else today's.
    """
    template = records.template
    if template.date is not None or not writes_date(loaded.tokenizer, template):
        return records
    model = None if loaded.input is None else read_template(locate(loaded.input).path)
    dates = (source.date for source in (_run_template(Path(run_dir).expanduser()), model) if source is not None)
    date = next((date for date in dates if date is not None), None) or _today()
    return dataclasses.replace(records, template=dataclasses.replace(template, date=date))


def keep_date(directory: Path, template: Template) -> None:
    """Write the date to template.json, for a program that makes no model that would store it."""
    if template.date is not None and not (directory / TEMPLATE).is_file():
        write_atomically(directory / TEMPLATE, json.dumps(dataclasses.asdict(template), indent=2) + "\n")


def _run_template(run_dir: Path) -> Template | None:
    """Return the template of a run that is resumed, also of one that only --sync has so far; None for a new run."""
    template, url = read_template(run_dir), sync_url()
    if template is not None or url is None or not is_remote(url):
        return template
    with wrap_errors(url, "read the run's template"):
        store, root = open_store(url)
        place = f"{root}/{CARD}"
        return parse_template(store.cat_file(place).decode(), f"{url}/{CARD}") if store.isfile(place) else None


def _today() -> str:
    """Return the date on the clock of the first process."""
    return datetime.date.fromordinal(broadcast_from_first(datetime.date.today().toordinal())).isoformat()
