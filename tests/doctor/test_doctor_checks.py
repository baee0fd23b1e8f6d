"""The checks by themselves: what they find wrong, and what they let through."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax import doctor
from rlhf_jax.data import Encoded, Template
from rlhf_jax.learn import PPOConfig
from rlhf_jax.testing import byte_tokenizer
from rlhf_jax.types import Mean, Term

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id


def document(tokens: list[int], targets: int) -> Encoded:
    mask = [index >= len(tokens) - targets for index in range(len(tokens))]
    return Encoded(id="0", tokens=tokens, loss_mask=mask, prompt_length=len(tokens) - targets)


def wrong(findings) -> dict[str, str]:
    return {found.check: found.words for found in findings if found.verdict == "WRONG"}


def text(documents, left_out=0):
    return wrong(doctor.text_checks(documents, left_out, TOKENIZER, Template(style="raw"), 8, False))


def test_label_masks_ends_and_lengths() -> None:
    good = document([5, 6, 7, END], 2)
    assert text([good, good]) == {}
    assert set(text([good, document([5, 6, 7, END], 0)])) == {"label masks"}
    assert set(text([document([5, 6, 7], 2)])) == {"end of reply"}
    assert "3 of 5 left out" in text([good, good], left_out=3)["lengths"]
    assert text([good, good], left_out=2) == {}


def test_a_beginning_written_twice() -> None:
    bos = TOKENIZER.bos_token_id
    assert bos is not None and bos != END
    assert wrong(doctor.token_checks([[bos, 5, END]], TOKENIZER)) == {}
    assert "Template.bos = 'never'" in wrong(doctor.token_checks([[bos, bos, 5, END]], TOKENIZER))["BOS"]


def test_the_template_of_the_policy() -> None:
    plain = Template(style="plain")
    assert doctor.template_check(plain, Template(style="plain")).verdict == "ok"
    assert doctor.template_check(None, plain).verdict == "note"
    found = doctor.template_check(plain, Template(style="plain", response_prefix=""))
    assert found.verdict == "WRONG" and found.words.startswith("response_prefix was ' ', is '': ")


def test_vocabulary_and_batches() -> None:
    assert doctor.vocabulary_check(10, 10).verdict == "ok" and doctor.vocabulary_check(11, 10).verdict == "WRONG"
    assert doctor.arithmetic_check(10, 10, 3).words.endswith("3.00 epochs")
    assert doctor.arithmetic_check(9, 10, 3).verdict == "WRONG"


def gradient(loss) -> doctor.Finding:
    return doctor.gradient_check(loss, {"w": jnp.ones(())}, {"x": jnp.arange(1.0, 5.0)}, 2, jax.random.key(0))


def test_a_loss_that_is_no_sum_over_rows_is_found() -> None:
    """sum(w x) / rows is; the square of a microbatch's sum is not: 2 * 100 / 4 whole, 2 * (16 + 36) / 4 in two."""

    def sound(params, frozen, batch, rng):
        return {"l": Term((params["w"] * batch["x"]).sum(), jnp.asarray(float(batch["x"].shape[0])))}, {}

    def unsound(params, frozen, batch, rng):
        return {"l": Term((params["w"] * batch["x"]).sum() ** 2, jnp.asarray(float(batch["x"].shape[0])))}, {}

    assert gradient(sound).verdict == "ok"
    assert gradient(unsound).verdict == "WRONG" and "4.8e-01" in gradient(unsound).words


@pytest.mark.parametrize(
    ("name", "value", "check"),
    [
        ("sampler_gap", 2e-3, "sampler and scorer"),
        ("kl", 0.02, "reference"),
        ("score_std", 0.0, "reward spread"),
        ("ended", 0.0, "replies"),
    ],
)
def test_one_number_of_a_rollout_is_wrong(name: str, value: float, check: str) -> None:
    good = {"sampler_gap": 1e-7, "kl": 0.0, "score_std": 0.5, "ended": 0.9, "response_length": 7.0}

    def findings(numbers):
        metrics = {key: Mean(jnp.asarray(number), jnp.ones(())) for key, number in numbers.items()}
        return wrong(doctor.rollout_checks(metrics, PPOConfig(), 16))

    assert findings(good) == {} and set(findings(good | {name: value})) == {check}
