"""The training objective and the accuracy of rankings on held-out data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.data import EncodedPair, evaluation_pair_batches
from rlhf_jax.parallel import to_global
from rlhf_jax.statistics.preference import pairwise_accuracy
from rlhf_jax.types import Term

Terms = dict[str, Term]


def heldout_terms(
    evaluate: Callable[..., Terms], params: Any, frozen: Any, batches: Iterable[Any], mesh: Mesh
) -> Terms:
    """Sum the terms of the loss over batches. evaluate: (params, frozen, batch) -> the terms of the loss."""
    return _summed([evaluate(params, frozen, to_global(batch, mesh)) for batch in batches])


def heldout_scores(
    evaluate: Callable[..., Any], params: Any, frozen: Any, pairs: Sequence[EncodedPair], mesh: Mesh, **shape: int
) -> tuple[np.ndarray, Terms]:
    """Score all pairs: (float32 [2, N], chosen and rejected; the terms of the loss, summed). evaluate:
    (params, frozen, pairs) -> (terms, (chosen, rejected)). shape: as `data.evaluation_pair_batches`."""
    parts = [evaluate(params, frozen, to_global(part, mesh)) for part in evaluation_pair_batches(pairs, **shape)]
    scores = [np.stack(jax.device_get(scores)) for _, scores in parts]
    return np.concatenate(scores, axis=1)[:, : len(pairs)], _summed([terms for terms, _ in parts])


def _summed(parts: Sequence[Terms]) -> Terms:
    """Add totals and weights; coefficients are the same in every part."""
    total, *remaining = parts
    for terms in remaining:
        total = {
            name: Term(term.total + terms[name].total, term.weight + terms[name].weight, term.coefficient)
            for name, term in total.items()
        }
    return total


def loss_metrics(terms: Terms) -> dict[str, float | None]:
    """Return the metrics of a loss: ``heldout/loss``, and each term when there are several.

    The loss is the sum of coefficient * total / weight, as of one training step over all of the data; a term is given without its
    coefficient. A term with weight 0 adds 0; the loss is None when every weight is 0.
    """
    numbers = jax.device_get(terms)
    means = {name: float(term.total) / float(term.weight) for name, term in numbers.items() if term.weight}
    loss = sum(float(numbers[name].coefficient) * mean for name, mean in means.items())
    parts = {f"heldout/loss/{name}": means.get(name) for name in numbers} if len(numbers) > 1 else {}
    return {"heldout/loss": loss if means else None, **parts}


def heldout_metrics(scores: np.ndarray, terms: Terms) -> Mapping[str, float | None]:
    """Return accuracy with its interval, and the loss, of comparisons. scores: float32 [2, N], chosen and rejected."""
    accuracy = pairwise_accuracy(*scores)
    return {
        "heldout/accuracy": accuracy.mean,
        "heldout/accuracy_low": accuracy.low,
        "heldout/accuracy_high": accuracy.high,
        **loss_metrics(terms),
    }
