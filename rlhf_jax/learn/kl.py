"""The estimators of the KL divergence, and the places where their gradients are right."""

from __future__ import annotations

from typing import Literal

from rlhf_jax.errors import InputError, require_one_of

Place = Literal["reward", "loss"]
_RIGHT = {"reward": ("k1",), "loss": ("weighted_k3", "k3", "k2")}
_BIASED = {"reward": ("k2", "k3"), "loss": ("k1",)}
_WHY = {
    "reward": "in a reward its expected gradient is not that of the KL, it pushes the policy away from the reference",
    "loss": "in a loss its expected gradient is 0, it holds the policy nowhere",
}


def require_kl_kind(name: str, kind: object, place: Place, biased: object) -> None:
    """Check that the expected gradient of an estimator is right at ``place``. Raises InputError unless ``biased`` permits it.

    name: of the configuration. biased: its field ``biased_kl``, for the replication of runs that were made so.
    """
    require_one_of(f"{name}.biased_kl", biased, (True, False))
    require_one_of(f"{name}.kl_kind", kind, _RIGHT[place] + _BIASED[place])
    if kind in _BIASED[place] and not biased:
        right = " or ".join(map(repr, _RIGHT[place]))
        raise InputError(
            f"{name}.kl_kind = {kind!r}: {_WHY[place]}; use {right}, or set {name}.biased_kl = True to replicate such a run"
        )
