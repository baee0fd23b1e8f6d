"""Host batches: what joins comparisons to groups."""

from __future__ import annotations

import numpy as np

from rlhf_jax.batches import RankedBatch
from rlhf_jax.testing import token_batch


def test_pairs_have_the_group_first() -> None:
    """Two pairs, one without its rejected row, and a filler: only the first pair counts."""
    chosen, rejected = token_batch([[5, 6], [7], []], length=3), token_batch([[8], [], []], length=3)
    batch = RankedBatch.of_pairs(chosen, rejected, [0.5, 1.5, 0.0])
    assert batch.rows.tokens.tolist() == [[[5, 6, 0], [8, 0, 0]], [[7, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]]
    assert batch.rows.loss_mask.shape == batch.rows.positions.shape == batch.rows.segment_ids.shape == (3, 2, 3)
    assert batch.mask.tolist() == [[True, True], [True, False], [False, False]]
    assert batch.label.tolist() == [[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]
    assert batch.margin.tolist() == [0.5, 1.5, 0.0] and batch.weight.tolist() == [1.0, 0.0, 0.0]
    assert batch.label.dtype == batch.margin.dtype == batch.weight.dtype == np.float32 and batch.mask.dtype == bool
    assert RankedBatch.of_pairs(chosen, rejected).margin.tolist() == [0.0, 0.0, 0.0]
