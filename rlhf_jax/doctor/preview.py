"""The first examples of a training configuration as the model sees them, and the number of records that were left out."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from rlhf_jax.algorithms import Algorithm, assemble
from rlhf_jax.algorithms.build import PREVIEW
from rlhf_jax.data import Encoded, EncodedPair
from rlhf_jax.data.record_sets import used_records
from rlhf_jax.messages import behind, printable
from rlhf_jax.parallel import MeshConfig, make_mesh

TARGET = "bold green"


def preview(algorithm: Algorithm[Any], *, mesh: MeshConfig, seed: int, run_dir: str, examples: int) -> None:
    """Print the first examples of the data. Tokens that are trained on are green, or in ⟦ ⟧ where there are no colours.

    Weights are not read. Raises InputError as a run does for data that cannot be used.
    """
    job = assemble(algorithm, mesh=make_mesh(mesh), steps=1, seed=seed, run_dir=run_dir, build=PREVIEW)
    encoded = job.encoded
    tokenizer = next(iter(job.loaded.values())).tokenizer
    console = Console(file=behind(sys.stdout), highlight=False)
    for number, (item, record) in enumerate(
        itertools.islice(zip(encoded.items, encoded.records, strict=True), examples), 1
    ):
        console.rule(Text(f"example {number}: {printable(record.id)}"), align="left")
        for title, tokens, targets in sides(item):
            words = f"{title}{len(tokens)} tokens, {sum(targets)} trained on"
            console.print(Text(words, style="dim"))
            console.print(shown_text(tokenizer, tokens, targets, marks=console.color_system is None))
    console.print(Text(printable(f"records: {used_records(encoded, job.data.records.unusable)}")))


def sides(item: Any) -> Iterator[tuple[str, Sequence[int], Sequence[bool]]]:
    """Yield (title, tokens, whether each is trained on) of a demonstration, both sides of a comparison, or a prompt."""
    if isinstance(item, EncodedPair):
        yield "chosen: ", item.chosen.tokens, item.chosen.loss_mask
        yield "rejected: ", item.rejected.tokens, item.rejected.loss_mask
    elif isinstance(item, Encoded):
        yield "", item.tokens, item.loss_mask
    else:
        tokens = getattr(item, "tokens", item)
        yield "prompt: ", tokens, [False] * len(tokens)


def shown_text(tokenizer: Any, tokens: Sequence[int], targets: Sequence[bool], *, marks: bool) -> Text:
    """Return the decoded tokens with the targets in colour. marks: put them in ⟦ ⟧ too."""
    text = Text()
    for is_target, group in itertools.groupby(zip(tokens, targets, strict=True), key=lambda pair: pair[1]):
        words = printable(tokenizer.decode([token for token, _ in group], skip_special_tokens=False))
        text.append(f"⟦{words}⟧" if is_target and marks else words, style=TARGET if is_target else "")
    return text
