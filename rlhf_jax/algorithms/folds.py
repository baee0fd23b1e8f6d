"""Rows of different lengths, read two by two (`models.folding`)."""

from __future__ import annotations

import numpy as np
from jax.sharding import Mesh

from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.errors import InputError
from rlhf_jax.models import Fold, Model, fold_of


def check_fold(batch: BatchConfig, mesh: Mesh) -> None:
    """Raises InputError for rows that shall be folded where the mesh splits their columns."""
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
    """Return what `models.fold_of` says for rows with these lengths, int [rows], read in ``splits`` parts on the devices
    of ``model``; None when ``batch`` is not ``folded``. Where columns are split over devices: `check_fold`."""
    rows, left = divmod(len(lengths), splits * model.constrain.parts("act_batch"))
    return fold_of(lengths, rows, columns, targets, target_columns) if batch.folded and not left else None
