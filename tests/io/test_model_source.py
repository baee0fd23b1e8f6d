"""`ModelSource` and `load_model`: the model section of a gin file, and its record in provenance."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import FIELDS, write_gguf
from llama_files import llama_fields, llama_tensors, write_checkpoint
from run_directories import make_run

from rlhf_jax.algorithms.models import Loaded, check_tokenizer, load_model, plan_model
from rlhf_jax.data import padding_id
from rlhf_jax.errors import InputError
from rlhf_jax.io import describe_pretrained, load_pretrained, locate
from rlhf_jax.io.location import _download
from rlhf_jax.io.source import ModelSource
from rlhf_jax.parallel import MeshConfig, make_mesh
from rlhf_jax.rundir import fingerprint_path
from rlhf_jax.rundir.provenance import describe, write_provenance
from rlhf_jax.testing import byte_tokenizer, tiny_config


def load(path: Path | str, head: Any = "lm", **fields: Any) -> Loaded:
    source = ModelSource(path=str(path), **fields)
    return load_model(source, head, make_mesh(MeshConfig(fsdp=4, tensor=2)), jax.random.key(0))


def plan(path: Path) -> Loaded:
    return plan_model(ModelSource(path=str(path)), "lm", make_mesh(MeshConfig(fsdp=4, tensor=2)))


def recorded(loaded: Loaded) -> str:
    (model_input,) = loaded.as_inputs("model")
    return str(describe(model_input)["fingerprint"])


def test_each_kind_of_path_loads_and_is_fingerprinted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run by its newest step, a directory by its files, a GGUF file by its bytes, a hub id by its commit."""
    make_run(tmp_path / "run", steps=(1, 2))
    write_provenance(tmp_path / "run", stage="sft", seed=0, inputs=[], resumed_step=0)
    assert recorded(load(tmp_path / "run")) == fingerprint_path(tmp_path / "run" / "checkpoints" / "2")
    hf = write_checkpoint(tmp_path / "a1b2", llama_fields(), llama_tensors(llama_fields()))
    assert recorded(load(hf)) == fingerprint_path(hf)
    write_gguf(tmp_path / "model.gguf", FIELDS)
    assert recorded(load(tmp_path / "model.gguf")) == fingerprint_path(tmp_path / "model.gguf")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(hf))
    _download.cache_clear()
    assert recorded(load("some/model")) == "a1b2" == locate("some/model").revision
    _download.cache_clear()


def test_dtypes_and_remat_go_with_the_path(tmp_path: Path) -> None:
    hf = write_checkpoint(tmp_path / "hf", llama_fields(), llama_tensors(llama_fields()))
    loaded = load(hf, param_dtype="bfloat16", compute_dtype="bfloat16", remat=True)
    config = loaded.model.config
    assert (config.param_dtype, config.compute_dtype, config.remat) == ("bfloat16", "bfloat16", True)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype("bfloat16")}
    tokens = jnp.ones((8, 4), jnp.int32)
    assert loaded.model.hidden(loaded.params, tokens).dtype == jnp.bfloat16
    plain = load(hf).model.config
    assert (plain.param_dtype, plain.compute_dtype, plain.remat) == ("float32", "float32", False)
    with pytest.raises(InputError, match="param_dtype = 'int8'"):
        load(hf, param_dtype="int8")


def test_a_run_started_from_a_checkpoint_is_loaded_as_a_run(tmp_path: Path) -> None:
    """A new scalar head depends only on the key, not on the source of the weights."""
    make_run(tmp_path / "run")
    one, two = load(tmp_path / "run", "scalar"), load(tmp_path / "run", "scalar")
    np.testing.assert_array_equal(one.params["scalar_head"]["kernel"], two.params["scalar_head"]["kernel"])
    with pytest.raises(InputError, match="has no language-model head"):
        make_run(tmp_path / "scorer", "scalar")
        load(tmp_path / "scorer", "lm")


def test_a_tokenizer_needs_no_padding_token(tmp_path: Path) -> None:
    hf = write_checkpoint(tmp_path / "hf", llama_fields(), llama_tensors(llama_fields()))
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(hf)
    assert padding_id(load(hf).tokenizer) == tokenizer.eos_token_id
    plan = functools.partial(plan_model, head="lm", mesh=make_mesh(MeshConfig(), jax.devices()[:1]), rng=None)
    assert load(hf, pad_token="<|bos|>").tokenizer.pad_token_id == 1
    assert plan(ModelSource(path=str(hf), pad_token="<|bos|>")).tokenizer.pad_token_id == 1
    for load_with_pad in (
        lambda: load(hf, pad_token="<pad>"),
        lambda: plan(ModelSource(path=str(hf), pad_token="<pad>")),
    ):
        with pytest.raises(InputError, match="ModelSource.pad_token = '<pad>': not in the vocabulary"):
            load_with_pad()


def save_with_gap(tokenizer: Any, directory: Path, index: int) -> None:
    """Save the tokenizer with the id ``index`` for its token "z": 259 tokens with a gap between the ids."""
    tokenizer.save_pretrained(directory)
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["z"] = index
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("index", [400, 272])
def test_a_token_id_beyond_the_embedding_is_refused(index: int, tmp_path: Path) -> None:
    """The number of tokens, 259, is below the 272 rows; an index beyond them would be NaN or another token's row."""
    fields = llama_fields(vocab_size=272)
    hf = write_checkpoint(tmp_path / "hf", fields, llama_tensors(fields))
    save_with_gap(byte_tokenizer(), hf, index)
    message = rf"259 tokens with ids up to {index} \('z'\), .*vocab_size = 272; use the"
    for read in (load_pretrained, describe_pretrained):
        with pytest.warns(UserWarning, match=message):
            read(hf)
    for refuse in (load, plan):
        with pytest.warns(UserWarning, match=message), pytest.raises(InputError, match=message):
            refuse(hf)
    save_with_gap(byte_tokenizer(), hf, 271)
    assert load(hf).tokenizer("z")["input_ids"] == [271]


def test_added_tokens_count_among_the_ids_of_a_new_model() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<more>"])
    with pytest.raises(
        InputError, match=r"vocab_size = 259: the tokenizer has token id 259 \('<more>'\); set at least 260"
    ):
        check_tokenizer(tiny_config(vocab_size=259), tokenizer)
    check_tokenizer(tiny_config(vocab_size=260), tokenizer)


def test_contradictory_sources_are_refused() -> None:
    config = tiny_config(vocab_size=272)
    with pytest.raises(InputError, match="either path .* or config"):
        ModelSource()
    with pytest.raises(InputError, match="either path .* or config"):
        ModelSource(path="x", config=config, tokenizer=byte_tokenizer())
    with pytest.raises(InputError, match="ModelSource.tokenizer: a new model needs one"):
        ModelSource(config=config)
    with pytest.raises(InputError, match="ModelSource.compute_dtype: goes with path"):
        ModelSource(config=config, tokenizer=byte_tokenizer(), compute_dtype="bfloat16")
