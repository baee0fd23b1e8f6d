"""Losses of preference pairs against hand-worked numbers and scipy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from rlhf_jax.ops import preference_loss

MARGIN = (-10.0 + 11.0) - (-12.0 + 11.5)  # 1.5, chosen -10 against -11, rejected -12 against -11.5


@pytest.mark.parametrize(
    ("kind", "smoothing", "expected"),
    [
        ("sigmoid", 0.0, 0.620957),  # log(1 + e^-.15)
        ("sigmoid", 0.1, 0.635957),  # .9 x .620957 + .1 x .770957
        ("robust", 0.1, 0.602207),  # (.9 x .620957 - .1 x .770957) / .8
        ("hinge", 0.0, 0.85),  # 1 - .15
        ("ipo", 0.0, 12.25),  # (1.5 - 5)^2
    ],
)
def test_by_hand(kind, smoothing, expected):
    actual = preference_loss(jnp.asarray([MARGIN]), beta=0.1, kind=kind, label_smoothing=smoothing)
    assert actual.dtype == jnp.float32
    assert actual.tolist() == pytest.approx([expected], abs=1e-6)


def test_a_policy_that_is_its_reference_loses_log_two():
    for kind in ("sigmoid", "robust"):
        assert float(preference_loss(jnp.zeros(()), beta=0.3, kind=kind, label_smoothing=0.2)) == pytest.approx(
            0.693147, abs=1e-6
        )


def test_against_scipy_and_finite_at_any_margin():
    margins = np.array([-3e4, -7.0, -0.2, 0.0, 1.3, 3e4])
    expected = -0.8 * scipy.special.log_expit(0.5 * margins) - 0.2 * scipy.special.log_expit(-0.5 * margins)
    np.testing.assert_allclose(
        preference_loss(jnp.asarray(margins), beta=0.5, label_smoothing=0.2), expected, rtol=1e-6
    )
    slopes = jax.vmap(jax.grad(lambda m: preference_loss(m, beta=0.5)))(jnp.asarray(margins, jnp.float32))
    np.testing.assert_allclose(slopes, -0.5 * scipy.special.expit(-0.5 * margins), rtol=1e-5, atol=1e-12)


def test_robust_is_unbiased_under_flipped_labels():
    """E over flips with probability s of the robust loss = the loss of the true labels (Chowdhury et al. 2024)."""
    remaining, flipped = (
        preference_loss(jnp.float32(m), beta=0.1, kind="robust", label_smoothing=0.3) for m in (2.0, -2.0)
    )
    true = preference_loss(jnp.float32(2.0), beta=0.1)
    assert float(0.7 * remaining + 0.3 * flipped) == pytest.approx(float(true), abs=1e-6)
