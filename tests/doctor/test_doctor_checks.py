"""The checks by themselves: what they find wrong, and what they let through."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax import doctor, learn
from rlhf_jax.algorithms import SFT
from rlhf_jax.data import Encoded, Template
from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.learn import PPOConfig
from rlhf_jax.models import Model
from rlhf_jax.testing import (
    IN_MEMORY,
    byte_tokenizer,
    loaded_model,
    mesh_of,
    random_params,
    setting_of,
    tiny_config,
    token_batch,
)
from rlhf_jax.types import Mean, Term

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id


def document(tokens: list[int], targets: int) -> Encoded:
    mask = [index >= len(tokens) - targets for index in range(len(tokens))]
    return Encoded(id="0", tokens=tokens, loss_mask=mask, prompt_length=len(tokens) - targets)


def wrong(findings) -> dict[str, str]:
    return {actual.check: actual.words for actual in findings if actual.verdict == "WRONG"}


def text(documents, left_out=0):
    return wrong(doctor.text_checks(documents, left_out, TOKENIZER, Template(style="raw"), 8, False))


def test_label_masks_ends_and_lengths() -> None:
    good = document([5, 6, 7, END], 2)
    assert text([good, good]) == {}
    assert set(text([good, document([5, 6, 7, END], 0)])) == {"label masks"}
    assert set(text([document([5, 6, 7], 2)])) == {"end of response"}
    assert "3 of 5 left out" in text([good, good], left_out=3)["lengths"]
    assert text([good, good], left_out=2) == {}


def test_a_beginning_written_twice() -> None:
    bos = TOKENIZER.bos_token_id
    assert bos is not None and bos != END
    assert wrong(doctor.token_checks([[bos, 5, END]], TOKENIZER)) == {}
    assert "Template.bos = 'never'" in wrong(doctor.token_checks([[bos, bos, 5, END]], TOKENIZER))["BOS"]


def test_a_beginning_that_opens_every_turn_is_right() -> None:
    """SmolLM2's BOS is <|im_start|>, which its chat template writes before each message."""
    bos = TOKENIZER.bos_token_id
    assert wrong(doctor.token_checks([[bos, 5, END, bos, 6, END, bos, 7]], TOKENIZER)) == {}
    assert "1 of 2" in wrong(doctor.token_checks([[bos, 5, END], [bos, 5, bos, bos, 6]], TOKENIZER))["BOS"]


def test_a_tokenizer_without_a_padding_token() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    assert wrong(doctor.token_checks([[5, END]], tokenizer)) == {}


def test_the_template_of_the_policy() -> None:
    assert doctor.template_check("policy", True, None).verdict == "ok"
    assert doctor.template_check("policy", False, None).verdict == "note"
    finding = doctor.template_check("reward model", True, "Template.style was 'plain', is 'chat'")
    assert finding.verdict == "WRONG" and finding.check == "template of the reward model"
    assert finding.words.startswith("Template.style was 'plain', is 'chat': ")


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


def test_the_loss_of_routers_depends_on_the_cut() -> None:
    """Loads are balanced within each microbatch: its square of a sum, as above, is no fault; the rest is compared."""

    def routed(params, frozen, batch, rng):
        rows = jnp.asarray(float(batch["x"].shape[0]))
        nll, router = (params["w"] * batch["x"]).sum(), (params["w"] * batch["x"]).sum() ** 2
        return {"l": Term(nll, rows), "router": Term(router, rows)}, {}

    finding = gradient(routed)
    assert finding.verdict == "ok" and "without the routers' loss" in finding.words


def test_the_loss_that_is_checked_is_the_one_that_trains() -> None:
    """With experts it has a term of their routers, which a loss of log-probabilities alone lacks."""
    experts = {"num_experts": 4, "experts_per_token": 2, "expert_ffn_size": 16, "router_coefficient": 0.5}
    model, batch = Model(tiny_config(**experts)), token_batch([[3, 4, 5, 2]])
    algorithm = SFT(model=IN_MEMORY, batch=BatchConfig(1, 4), optimizer=learn.OptimizerConfig())
    job = algorithm.wire(setting_of(mesh_of()), loaded_model(model, random_params(model, 0)), None)
    terms = jax.eval_shape(job.loss, model.abstract(), {}, batch, jax.random.key(0))[0]
    assert set(terms) == {"nll", "router"}


@pytest.mark.parametrize(
    ("name", "value", "check"),
    [
        ("sampler_gap", 2e-3, "sampler and scorer"),
        ("kl", 0.02, "reference"),
        ("score_std", 0.0, "reward spread"),
        ("ended", 0.0, "responses"),
    ],
)
def test_one_number_of_a_rollout_is_wrong(name: str, value: float, check: str) -> None:
    good = {"sampler_gap": 1e-7, "kl": 0.0, "score_std": 0.5, "ended": 0.9, "response_length": 7.0}

    def findings(numbers):
        metrics = {key: Mean(jnp.asarray(number), jnp.ones(())) for key, number in numbers.items()}
        return wrong(doctor.rollout_checks(metrics, PPOConfig(), 16))

    assert findings(good) == {} and set(findings(good | {name: value})) == {check}
