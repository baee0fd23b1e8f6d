"""Every family against transformers: logits, greedy continuations, gradients, files.

The default tests compare with stored outputs (make_family_golden.py); `pytest -m parity` computes them again, with every
field of every configuration changed, and prints the largest difference of each family.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from family_files import (
    BEYOND_ORIGINAL,
    CASES,
    DOCUMENT,
    FAR,
    GOLDEN,
    OTHER,
    draw_tensors,
    other_tokens,
    stored_shapes,
    tokens,
)
from llama_files import write_checkpoint
from make_family_golden import subsample
from safetensors.numpy import load_file

from rlhf_jax import ops, rollout
from rlhf_jax.batches import PromptBatch
from rlhf_jax.errors import InputError
from rlhf_jax.io import export_pretrained, load_pretrained
from rlhf_jax.io.load import Pretrained
from rlhf_jax.models.families import ARCHITECTURES, FAMILIES, config_from_hf, config_to_hf
from rlhf_jax.models.families.convert import _COMMON_FIXED, _NO_EFFECT
from rlhf_jax.testing import byte_tokenizer

TOLERANCE = 1e-4
CACHED = ("gemma3", "gpt2")
"""Cases whose greedy continuation is checked by default (windows, layers of several kinds; learned positions)."""


def checkpoint(case: str, directory: Path) -> Path:
    return write_checkpoint(directory / case, CASES[case], draw_tensors(stored_shapes(case)))


def batch(case: str) -> dict[str, np.ndarray]:
    """Build two rows of 30 columns: both documents packed, then padding; padding, the first document at FAR, padding."""
    start, columns = (FAR if case in BEYOND_ORIGINAL else 0), 30
    rows = {name: np.zeros((2, columns), np.int32) for name in ("tokens", "positions", "segment_ids")}
    placements = [(0, 0, tokens(), start, 1), (0, DOCUMENT, other_tokens(), start, 2), (1, 5, tokens(), FAR, 1)]
    for row, column, ids, first, segment in placements:
        at = slice(column, column + len(ids))
        rows["tokens"][row, at] = ids
        rows["positions"][row, at] = np.arange(first, first + len(ids))
        rows["segment_ids"][row, at] = segment
    return rows


def model_logits(loaded: Pretrained, case: str) -> dict[str, np.ndarray]:
    """Compute the logits of the documents of `batch` by name, [S, V] each."""
    inputs = batch(case)
    logits = np.asarray(
        jax.jit(loaded.model.apply)(
            loaded.params, inputs["tokens"], positions=inputs["positions"], segment_ids=inputs["segment_ids"]
        )
    )
    other = logits[0, DOCUMENT : DOCUMENT + OTHER]
    return {"document": logits[0, :DOCUMENT], "other": other, "far": logits[1, 5 : 5 + DOCUMENT]}


def model_continuation(loaded: Pretrained) -> np.ndarray:
    """Generate greedily with the cache, the shorter prompt left-padded: [2, 32]."""
    model, params, _ = loaded
    ids = np.zeros((2, DOCUMENT), np.int32)
    ids[0], ids[1, -OTHER:] = tokens(), other_tokens()
    mask = np.ones((2, DOCUMENT), bool)
    mask[1, :-OTHER] = False
    prompts = PromptBatch(
        tokens=jnp.asarray(ids), mask=jnp.asarray(mask), prompt_id=jnp.arange(2), sample_id=jnp.zeros(2, jnp.int32)
    )
    sampling = rollout.SamplingConfig(temperature=0, max_new_tokens=32)

    @jax.jit
    def generate(params: Any, prompts: PromptBatch) -> Any:
        return rollout.generate(model, params, prompts, jax.random.key(0), sampling=sampling, eos_ids=(), pad_id=0)

    return np.asarray(generate(params, prompts).tokens)


@pytest.fixture(scope="module")
def golden() -> Any:
    return np.load(GOLDEN / "families.npz")


def test_every_family_has_a_case() -> None:
    assert {ARCHITECTURES[fields["architectures"][0]][0] for fields in CASES.values()} == set(FAMILIES)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case: str, golden: Any, tmp_path: Path) -> None:
    """One batch has packed documents, padding on both sides, and a document from position 5000 on."""
    for name, actual in model_logits(load_pretrained(checkpoint(case, tmp_path)), case).items():
        expected = golden[f"{case}/{name}"]
        assert expected.std() > 1  # the numbers compared are not all near zero
        assert np.abs(subsample(name, actual) - expected).max() <= TOLERANCE, name


@pytest.mark.parametrize(
    "case", [*CACHED, *(pytest.param(c, marks=pytest.mark.slow) for c in CASES if c not in CACHED)]
)
def test_greedy_continuations_equal_those_of_transformers(case: str, golden: Any, tmp_path: Path) -> None:
    if case in BEYOND_ORIGINAL:
        pytest.skip("transformers takes the short factors for short prompts")
    expected = golden[f"{case}/greedy"]
    assert len(np.unique(expected)) > 4  # not one token over and over
    np.testing.assert_array_equal(model_continuation(load_pretrained(checkpoint(case, tmp_path))), expected)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_comes_back_tensor_by_tensor(case: str, dtype: str, tmp_path: Path) -> None:
    """Loading files of transformers and exporting them gives the same tensors bit for bit, and the same configuration."""
    tensors = draw_tensors(stored_shapes(case))
    path = write_checkpoint(tmp_path / "in", CASES[case], tensors, dtype=dtype)
    model, params, tokenizer = load_pretrained(path, param_dtype=dtype)
    export_pretrained(tmp_path / "out", model, params, tokenizer)
    before, after = (load_file(tmp_path / place / "model.safetensors") for place in ("in", "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and after[name].tobytes() == tensor.tobytes(), name
    again = config_from_hf(json.loads((tmp_path / "out" / "config.json").read_text()), "config.json")
    assert again.replace(param_dtype=dtype) == model.config


@pytest.mark.parametrize("case", CASES)
def test_configurations_as_transformers_5_writes_them(case: str, tmp_path: Path) -> None:
    """rope_parameters instead of rope_theta and rope_scaling, layer_types, defaults left out: the same model."""
    fields = CASES[case]
    own = copy.deepcopy(fields)  # transformers writes into rope_scaling
    transformers.AutoConfig.for_model(**own).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "rope_scaling" not in saved and "rope_theta" not in saved
    assert config_from_hf(saved | {"architectures": fields["architectures"]}, "config.json") == config_from_hf(
        fields, "config.json"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scorer_of_the_family_goes_both_ways(family: str, tmp_path: Path) -> None:
    case = next(case for case, fields in CASES.items() if ARCHITECTURES[fields["architectures"][0]][0] == family)
    base = load_pretrained(checkpoint(case, tmp_path), head="scalar", rng=jax.random.key(0))
    tokenizer = byte_tokenizer()
    export_pretrained(tmp_path / "out", base.model, base.params, tokenizer)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [FAMILIES[family].scorer]
    again = load_pretrained(tmp_path / "out")
    assert again.model.config == base.model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, base.params)


def test_tensors_of_a_trunk_without_prefix_are_loaded(tmp_path: Path) -> None:
    """GPT-2's own files: without "transformer.", with the causal masks of each layer."""
    shapes = stored_shapes("gpt2")
    tensors = draw_tensors(shapes)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare |= {f"h.{layer}.attn.bias": np.ones((1, 1, 4, 4), np.float32) for layer in range(3)}
    loaded = load_pretrained(write_checkpoint(tmp_path / "bare", CASES["gpt2"], bare))
    usual = load_pretrained(write_checkpoint(tmp_path / "usual", CASES["gpt2"], tensors))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, usual.params)


def test_a_shorter_model_takes_the_short_factors(tmp_path: Path) -> None:
    """Short "longrope" texts, within the original context, give the logits of transformers, which uses the short factors there."""
    path = checkpoint("phi3_long", tmp_path)
    chosen = [load_pretrained(path, max_length=length).model.config.layer(0).rope.long for length in (4096, 4097)]
    assert chosen == [False, True]
    with pytest.raises(InputError, match="max_length = 8193: the model was made for 8192 tokens"):
        load_pretrained(path, max_length=8193)
    with pytest.raises(InputError, match="max_length = 64: its table of positions has 8192 rows"):
        load_pretrained(checkpoint("gpt2", tmp_path), max_length=64)


# ---- every field of every configuration: (case, field) -> what else changes with it

_ROPE = {"rope_type": "linear", "factor": 2.0}
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "rms_norm_eps": {"rms_norm_eps": 0.1},
        "rope_theta": {"rope_theta": 500.0},
        "rope_scaling": {"rope_scaling": None},
        "rope_parameters": {"rope_scaling": None, "rope_theta": None, "rope_parameters": {"rope_theta": 500.0} | _ROPE},
        "tie_word_embeddings": {"tie_word_embeddings": True},
        "attention_bias": {"attention_bias": False},
        "mlp_bias": {"mlp_bias": False},
        "hidden_act": {"hidden_act": "gelu"},
        "vocab_size": {"vocab_size": 272},
        "hidden_size": {"hidden_size": 40},
        "intermediate_size": {"intermediate_size": 56},
        "num_hidden_layers": {"num_hidden_layers": 2},
        "num_attention_heads": {"num_attention_heads": 8},
        "num_key_value_heads": {"num_key_value_heads": 4},
        "head_dim": {"head_dim": 16},
    },
    "mistral": {"sliding_window": {"sliding_window": 3}, "hidden_act": {"hidden_act": "gelu_new"}},
    "qwen2": {
        "use_sliding_window": {"use_sliding_window": False},
        "sliding_window": {"sliding_window": 3},
        "max_window_layers": {"max_window_layers": 0},
        "layer_types": {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
        "rope_scaling": {"rope_scaling": _ROPE},
    },
    "qwen3": {
        "attention_bias": {"attention_bias": False},
        "use_sliding_window": {"use_sliding_window": False, "layer_types": None},
        "sliding_window": {"sliding_window": 2},
        "max_window_layers": {"max_window_layers": 1, "layer_types": None},
        "layer_types": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "rms_norm_eps": {"rms_norm_eps": 0.1},
    },
    "gemma": {
        "head_dim": {"head_dim": 8},
        "attention_bias": {"attention_bias": True},
        "hidden_act": {"hidden_act": "silu"},
        "rms_norm_eps": {"rms_norm_eps": 0.1},
        "tie_word_embeddings": {"tie_word_embeddings": False},
    },
    "gemma2": {
        "query_pre_attn_scalar": {"query_pre_attn_scalar": 5},
        "final_logit_softcapping": {"final_logit_softcapping": 3.0},
        "attn_logit_softcapping": {"attn_logit_softcapping": None},
        "hidden_activation": {"hidden_activation": "silu"},
        "sliding_window": {"sliding_window": 3},
        "layer_types": {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
        "attention_bias": {"attention_bias": True},
    },
    "gemma3": {
        "query_pre_attn_scalar": {"query_pre_attn_scalar": 5},
        "hidden_activation": {"hidden_activation": "gelu"},
        "final_logit_softcapping": {"final_logit_softcapping": None},
        "rope_local_base_freq": {"rope_local_base_freq": 300.0},
        "rope_theta": {"rope_theta": 500.0},
        "rope_scaling": {"rope_scaling": None},
        "rope_parameters": {
            "rope_scaling": None, "rope_theta": None, "rope_local_base_freq": None,
            "rope_parameters": {
                "full_attention": {"rope_theta": 700.0} | _ROPE,
                "sliding_attention": {"rope_theta": 300.0, "rope_type": "default"},
            },
        },
        "sliding_window": {"sliding_window": 3},
        "sliding_window_pattern": {"sliding_window_pattern": 2},
        "layer_types": {"layer_types": ["full_attention"] * 3 + ["sliding_attention"] * 2},
    },
    "smollm3": {
        "no_rope_layers": {"no_rope_layers": [0, 1, 1]},
        "no_rope_layer_interval": {"no_rope_layers": None, "no_rope_layer_interval": 3},
        "use_sliding_window": {"use_sliding_window": False},
        "sliding_window": {"sliding_window": 2},
        "layer_types": {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
        "attention_bias": {"attention_bias": False},
        "mlp_bias": {"mlp_bias": False},
        "tie_word_embeddings": {"tie_word_embeddings": False},
    },
    "phi3": {
        "rope_scaling": {"rope_scaling": None},
        "partial_rotary_factor": {"partial_rotary_factor": 0.5, "rope_scaling": None},
        "sliding_window": {"sliding_window": None},
        "original_max_position_embeddings": {
            "original_max_position_embeddings": 4096,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4},
        },
    },
    "olmo2": {"attention_bias": {"attention_bias": False}, "rms_norm_eps": {"rms_norm_eps": 0.1}},
    "gpt_neox": {
        "use_parallel_residual": {"use_parallel_residual": False},
        "attention_bias": {"attention_bias": False},
        "rotary_pct": {"rotary_pct": 1.0},
        "rotary_emb_base": {"rotary_emb_base": 300.0},
        "rope_parameters": {
            "rotary_pct": None, "rotary_emb_base": None,
            "rope_parameters": {"rope_theta": 300.0, "rope_type": "default", "partial_rotary_factor": 0.75},
        },
        "rope_scaling": {"rope_scaling": _ROPE},
        "hidden_act": {"hidden_act": "gelu_new"},
        "layer_norm_eps": {"layer_norm_eps": 0.1},
        "tie_word_embeddings": {"tie_word_embeddings": True},
        "intermediate_size": {"intermediate_size": 40},
        "num_attention_heads": {"num_attention_heads": 2},
        "num_hidden_layers": {"num_hidden_layers": 2},
        "hidden_size": {"hidden_size": 64},
        "vocab_size": {"vocab_size": 272},
    },
    "gpt2": {
        "n_embd": {"n_embd": 40},
        "n_head": {"n_head": 2},
        "n_inner": {"n_inner": None},
        "n_layer": {"n_layer": 2},
        "n_positions": {"n_positions": 6000},
        "activation_function": {"activation_function": "silu"},
        "layer_norm_epsilon": {"layer_norm_epsilon": 0.1},
        "scale_attn_weights": {"scale_attn_weights": False},
        "tie_word_embeddings": {"tie_word_embeddings": False},
        "vocab_size": {"vocab_size": 272},
    },
    "mixtral": {
        "num_local_experts": {"num_local_experts": 4},
        "num_experts_per_tok": {"num_experts_per_tok": 3},
        "intermediate_size": {"intermediate_size": 40},
        "sliding_window": {"sliding_window": None},
    },
    "qwen3_moe": {
        "num_experts": {"num_experts": 5},
        "num_local_experts": {"num_experts": None, "num_local_experts": 5},
        "num_experts_per_tok": {"num_experts_per_tok": 2},
        "moe_intermediate_size": {"moe_intermediate_size": 24},
        "intermediate_size": {"intermediate_size": 40},
        "norm_topk_prob": {"norm_topk_prob": False},
        "mlp_only_layers": {"mlp_only_layers": [0, 2]},
        "decoder_sparse_step": {"mlp_only_layers": [], "decoder_sparse_step": 2},
        "use_sliding_window": {"use_sliding_window": False},
        "sliding_window": {"sliding_window": 3},
        "attention_bias": {"attention_bias": False},
    },
}  # fmt: skip
SILENT = {"max_position_embeddings", "router_aux_loss_coef"}
"""Fields that do not move the logits: a bound on inputs (but for learned positions), a part of the loss."""


def changed_fields(case: str, field: str) -> dict[str, Any]:
    """Return the configuration with one field changed; a value None removes the field."""
    fields = CASES[case] | CHANGES[case][field]
    taken_out = [name for name, value in CHANGES[case][field].items() if value is None and name in _ABSENT_WHEN_NONE]
    return {name: value for name, value in fields.items() if name not in taken_out}


_ABSENT_WHEN_NONE = {
    "rope_theta", "rope_scaling", "rope_local_base_freq", "layer_types", "no_rope_layers", "rotary_pct", "rotary_emb_base",
    "num_experts",
}  # fmt: skip


SECOND_NAMES = {
    "gemma": {"hidden_activation"},
    "gemma2": {"sliding_window_size"},
    "gemma3": {"_sliding_window_pattern"},
}
"""Second names of a field: a value that contradicts the first name is refused (tests/models/test_families.py)."""


def test_every_field_of_every_family_is_changed_somewhere() -> None:
    """A field that several families share and read with the same rule may be changed in any of them."""
    for case, changes in CHANGES.items():
        family = FAMILIES[ARCHITECTURES[CASES[case]["architectures"][0]][0]]
        own = set(family.fields) | {name for rule in family.rules for name in rule.names}
        llama = FAMILIES["llama"]
        shared = {name for name, field in family.fields.items() if llama.fields.get(name) == field}
        shared |= {name for name in ("hidden_act", "rope_theta", "rope_scaling", "rope_parameters") if name in own}
        shared |= SECOND_NAMES.get(case, set())
        assert own - SILENT - (shared if case != "llama" else set()) <= set(changes), case
        assert set(changes) <= own


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_of_transformers_are_read_or_without_effect(family: str) -> None:
    """Every field that a configuration class of transformers has or writes is either read or declared without effect."""
    record = FAMILIES[family]
    transformers_config = transformers.AutoConfig.for_model(record.model_type)
    names = {field.name for field in dataclasses.fields(transformers_config)} | set(transformers_config.to_dict())
    read = set(record.fields) | set(record.fixed) | {name for rule in record.rules for name in rule.names}
    assert {"vocab_size", "transformers_version"} < names
    assert names - read - record.ignored - _NO_EFFECT - set(_COMMON_FIXED) == set()
    assert not read & _NO_EFFECT and not read & record.ignored


@pytest.mark.parametrize(("case", "field"), [(case, field) for case, fields in CHANGES.items() for field in fields])
def test_a_changed_field_changes_the_configuration(case: str, field: str) -> None:
    """`pytest -m parity` compares the changed logits with transformers."""
    before, after = (config_from_hf(fields, "config.json") for fields in (CASES[case], changed_fields(case, field)))
    assert before != after
    assert config_from_hf(config_to_hf(after), "config.json") == after


# ---- live


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_live_outputs(case: str, golden: Any, tmp_path: Path) -> None:
    """Compares the stored outputs, all logits, and greedy continuations of both prompts."""
    pytest.importorskip("torch", reason="needs the [parity] extra")
    from make_family_golden import load_reference, logits, reference_outputs, saved_shapes

    assert saved_shapes(CASES[case]) == stored_shapes(case)
    expected = reference_outputs(case, load_reference(CASES[case], draw_tensors(stored_shapes(case))))
    loaded = load_pretrained(checkpoint(case, tmp_path))
    differences = {name: np.abs(actual - expected[name]).max() for name, actual in model_logits(loaded, case).items()}
    if case in BEYOND_ORIGINAL:  # a short text: the short factors in both
        short = load_pretrained(tmp_path / case, max_length=4096)
        near = np.asarray(jax.jit(short.model.apply)(short.params, tokens()[None].astype(np.int32)))[0]
        expected_near = logits(load_reference(CASES[case], draw_tensors(stored_shapes(case))), tokens())
        differences["near"] = np.abs(near - expected_near).max()
    print(f"\nPARITY {case}: " + ", ".join(f"{name} {value:.1e}" for name, value in differences.items()))
    assert max(differences.values()) <= TOLERANCE
    for name, array in expected.items():
        np.testing.assert_allclose(subsample(name, array), golden[f"{case}/{name}"], rtol=0, atol=2e-5)
    if "greedy" in expected:
        np.testing.assert_array_equal(model_continuation(loaded), expected["greedy"])


@pytest.mark.parity
@pytest.mark.parametrize(("case", "field"), [(case, field) for case, fields in CHANGES.items() for field in fields])
def test_live_changed_fields_give_the_logits_of_transformers(case: str, field: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs the [parity] extra")
    from make_family_golden import load_reference, logits, saved_shapes

    fields = changed_fields(case, field)
    tensors = draw_tensors(saved_shapes(fields))
    start = FAR if field == "original_max_position_embeddings" else 0
    expected = logits(load_reference(fields, tensors), tokens(), start)
    base = logits(load_reference(CASES[case], draw_tensors(stored_shapes(case))), tokens(), start)
    model, params, _ = load_pretrained(write_checkpoint(tmp_path, fields, tensors))
    positions = np.arange(start, start + DOCUMENT, dtype=np.int32)[None]
    actual = np.asarray(jax.jit(model.apply)(params, tokens()[None].astype(np.int32), positions=positions))[0]
    assert np.abs(actual - expected).max() <= TOLERANCE
    assert actual.shape != base.shape or min(np.abs(actual - base).max(), np.abs(expected - base).max()) > 1e-3


@pytest.mark.parity
@pytest.mark.parametrize("case", ["mistral", "gemma3", "qwen2"])
def test_live_a_long_sequence(case: str, tmp_path: Path) -> None:
    """Compares the last 64 of 4200 tokens."""
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    from make_family_golden import load_reference

    ids = np.random.default_rng(1).integers(3, 259, (1, 4200))
    with torch.no_grad():
        network = load_reference(CASES[case], draw_tensors(stored_shapes(case)))
        expected = network(torch.from_numpy(ids), use_cache=False, logits_to_keep=64).logits[0].numpy()
    model, params, _ = load_pretrained(checkpoint(case, tmp_path))

    @jax.jit
    def last(params: Any, ids: Any) -> Any:
        return model.logits(params, model.hidden(params, ids)[:, -64:])[0]

    difference = np.abs(np.asarray(last(params, ids.astype(np.int32))) - expected).max()
    print(f"\nPARITY {case}, 4200 tokens: {difference:.1e}")
    assert difference <= TOLERANCE


@pytest.mark.parity
@pytest.mark.parametrize("case", ["qwen3", "gemma2", "gpt_neox", "mixtral"])
def test_live_gradients(case: str, tmp_path: Path) -> None:
    """Gradients of the mean cross-entropy (and the router loss of experts) differ by at most 1e-4 of each tensor's norm."""
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    from make_family_golden import load_reference

    network = load_reference(CASES[case], draw_tensors(stored_shapes(case)))
    ids = torch.from_numpy(tokens())[None]
    extra = {"output_router_logits": True} if case == "mixtral" else {}
    transformers_output = network(ids, labels=ids, use_cache=False, **extra)
    transformers_output.loss.backward()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter.grad)
    network.save_pretrained(tmp_path / "gradients")
    write_checkpoint(tmp_path / "weights", CASES[case], draw_tensors(stored_shapes(case)))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "gradients" / name).write_bytes((tmp_path / "weights" / name).read_bytes())
    transformers_gradients = load_pretrained(tmp_path / "gradients").params
    model, params, _ = load_pretrained(tmp_path / "weights")
    inputs = jnp.asarray(tokens()[None], jnp.int32)

    def loss(params: Any) -> Any:
        hidden, router = model.hidden_and_router_loss(params, inputs)
        return -ops.token_logprobs(model.logits(params, hidden)[:, :-1], inputs[:, 1:]).mean() + router

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    assert abs(float(value) - float(transformers_output.loss)) <= 1e-5 * float(transformers_output.loss)
    worst = 0.0
    for (path, actual), expected in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(transformers_gradients), strict=True
    ):
        assert np.linalg.norm(expected) > 1e-6, path
        worst = max(worst, float(np.linalg.norm(actual - expected) / np.linalg.norm(expected)))
    print(f"\nPARITY {case}, gradients: relative {worst:.1e}")
    assert worst <= 1e-4


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_live_bfloat16(case: str, tmp_path: Path) -> None:
    """The mean error of bfloat16 against float32 over 16 tokens, relative to the standard deviation of the logits, is at most
    1.5 times that of transformers (docs/models.md has the table)."""
    pytest.importorskip("torch", reason="needs the [parity] extra")
    from make_family_golden import load_reference, logits

    start = FAR if case in BEYOND_ORIGINAL else 0
    tensors = draw_tensors(stored_shapes(case))
    exact, transformers_logits = (
        logits(load_reference(CASES[case], tensors, dtype), tokens(), start) for dtype in ("float32", "bfloat16")
    )
    loaded = load_pretrained(checkpoint(case, tmp_path), param_dtype="bfloat16")
    model = dataclasses.replace(loaded.model, config=loaded.model.config.replace(compute_dtype="bfloat16"))
    actual = model_logits(loaded._replace(model=model), case)["document"]
    errors = [
        np.abs(logits_bf16.astype(np.float64) - exact) / exact.std() for logits_bf16 in (actual, transformers_logits)
    ]
    line = " ".join(f"{error.mean():.4f} {error.max():.3f}" for error in errors)
    print(f"\nPRECISION {case}: {line}")
    assert 1e-4 < errors[0].mean() <= 1.5 * errors[1].mean()


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_live_transformers_computes_the_same_from_an_export(case: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    from make_family_golden import load_reference, logits

    loaded = load_pretrained(checkpoint(case, tmp_path))
    export_pretrained(tmp_path / "out", *loaded)
    network, loading_info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading_info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading_info
    start = FAR if case in BEYOND_ORIGINAL else 0
    original = load_reference(CASES[case], draw_tensors(stored_shapes(case)))
    np.testing.assert_allclose(
        logits(network.eval(), tokens(), start), logits(original, tokens(), start), rtol=0, atol=1e-5
    )
