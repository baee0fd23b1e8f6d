"""Adapters against the PEFT library: both compute the same from exported and from saved adapters."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from family_files import CASES, draw_tensors, stored_shapes
from llama_files import write_checkpoint

from rlhf_jax.io import export_adapter, load_pretrained
from rlhf_jax.models import LoraConfig, Model, lora
from rlhf_jax.testing import byte_tokenizer, random_params

pytestmark = pytest.mark.parity
TOKENS = np.random.default_rng(0).integers(3, 250, (2, 12)).astype(np.int32)
TARGETS = {"llama": "attention/.*|mlp/.*", "gemma2": "attention/(query|value)|mlp/down", "gpt_neox": "mlp/.*"}


def base(case: str, directory: Path) -> Path:
    return write_checkpoint(directory / case, CASES[case], draw_tensors(stored_shapes(case)))


def load_transformers(model):
    import torch

    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS.astype(np.int64)))


@pytest.mark.parametrize("case", TARGETS)
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_computes_what_we_export(case: str, rslora: bool, tmp_path: Path, record_property) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    import transformers

    directory = base(case, tmp_path)
    model, params, _ = load_pretrained(directory)
    settings = LoraConfig(rank=4, alpha=6.0, rslora=rslora, targets=TARGETS[case])
    adapted = Model(model.config, lora=settings)
    _, trained = lora.split(random_params(adapted, 5))
    export_adapter(tmp_path / "adapter", adapted, trained, byte_tokenizer(), str(directory))
    actual = jax.jit(adapted.apply)(lora.combine(params, trained), TOKENS)

    plain = transformers.AutoModelForCausalLM.from_pretrained(directory)
    alone = load_transformers(plain).logits.numpy()
    logits = load_transformers(peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")).logits.numpy()
    assert np.abs(logits - alone).max() > 0.1  # the adapter is there
    difference = np.abs(np.asarray(actual) - logits).max()
    print(f"{case} rslora={rslora}: largest logit difference {difference:.1e}")
    assert difference < 1e-4


@pytest.mark.parametrize("case", TARGETS)
def test_we_compute_what_peft_saves(case: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    import torch
    import transformers

    directory = base(case, tmp_path)
    modules = {
        "llama": ["q_proj", "o_proj", "up_proj"],
        "gemma2": ["k_proj", "down_proj"],
        "gpt_neox": ["dense_h_to_4h"],
    }
    config = peft.LoraConfig(
        r=3, lora_alpha=7, lora_dropout=0.1, use_rslora=True, target_modules=modules[case], task_type="CAUSAL_LM",
        init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(0)
    tuned = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(directory), config)
    logits = load_transformers(tuned).logits.numpy()
    tuned.save_pretrained(tmp_path / "adapter")
    model, params, _ = load_pretrained(tmp_path / "adapter")
    difference = np.abs(np.asarray(jax.jit(model.apply)(params, TOKENS)) - logits).max()
    print(f"{case}: largest logit difference {difference:.1e}")
    assert difference < 1e-4


def test_a_reward_adapter_both_ways(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    import transformers

    directory = base("llama_linear", tmp_path)
    model, params, _ = load_pretrained(directory, head="scalar", rng=jax.random.key(0))
    adapted = Model(model.config, lora=LoraConfig(rank=2, targets="attention/value"))
    frozen, trained = lora.split(random_params(adapted, 3))
    trained["scalar_head"]["bias"] = np.zeros_like(trained["scalar_head"]["bias"])  # PEFT's score has none
    frozen = lora.split(params)[0]
    export_adapter(tmp_path / "adapter", adapted, trained, byte_tokenizer(), str(directory))
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1)
    scored = load_transformers(peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")).logits.numpy()[:, 0]
    whole = lora.combine(frozen, trained)
    actual = jax.jit(lambda p: adapted.scalars(p, adapted.hidden(p, TOKENS)))(whole)[:, -1]
    np.testing.assert_allclose(actual, scored, atol=1e-4)
