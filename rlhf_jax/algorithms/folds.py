"""Rows of different lengths, read two by two (`models.folding`)."""

from __future__ import annotations

import numpy as np
from jax.sharding import Mesh

from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.errors import InputError
from rlhf_jax.models import Fold, Model, fold_of


def check_fold(batch: BatchConfig, mesh: Mesh) -> None:
    """Check that rows are not folded over a mesh that splits their columns. Raises InputError otherwise."""
    if batch.folded and mesh.shape["sequence"] > 1:
        raise InputError("BatchConfig.folded: rows are not folded where MeshConfig.sequence splits them; remove one")


def row_fold(
    batch: BatchConfig,
    model: Model,
    splits: int,
    lengths: np.ndarray,
    columns: int,
    targets: np.ndarray | None = None,
    target_columns: int = 0,
) -> Fold | None:
    """Return how `models.fold_of` pairs rows; None when ``batch`` is not ``folded``.

    lengths: int [rows], read in ``splits`` parts on the devices of ``model``. A mesh that splits columns: see `check_fold`.
    """
    rows, remainder = divmod(len(lengths), splits * model.constrain.parts("act_batch"))
    return fold_of(lengths, rows, columns, targets, target_columns) if batch.folded and not remainder else None
