"""Exports of `export_pretrained`: bit-identical weights, readable by this package and by transformers."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llama_files import CASES, golden_tokens, llama_fields, llama_tensors, write_checkpoint
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from rlhf_jax.data import Template
from rlhf_jax.errors import InputError
from rlhf_jax.io import Location, export_pretrained, load_pretrained, read_generation, read_template
from rlhf_jax.models import LoraConfig, Model
from rlhf_jax.parallel import MeshConfig, make_mesh
from rlhf_jax.testing import byte_tokenizer, random_params, tiny_config, train_bpe_tokenizer
from rlhf_jax.types import Params

TEMPLATE = "{% for m in messages %}<|bos|>{{ m['content'] }}<|eos|>{% endfor %}"


def a_model(**changes: Any) -> tuple[Model, Params]:
    model = Model(tiny_config(vocab_size=272, num_heads=4, head_dim=8, **changes))
    return model, jax.tree.map(jnp.asarray, random_params(model, 3))


def assert_same(one: Params, other: Params) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for actual, expected in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert actual.dtype == expected.dtype
        assert np.asarray(actual).tobytes() == np.asarray(expected).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "rope_theta": 5e5}, {"head": "scalar"}])
def test_a_round_trip_is_exact(dtype: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model, params = a_model(param_dtype=dtype, **changes)
    export_pretrained(tmp_path / "out", model, params, byte_tokenizer(TEMPLATE))
    again, loaded, tokenizer = load_pretrained(tmp_path / "out", param_dtype=dtype)
    assert again.config == model.config
    assert_same(loaded, params)
    assert tokenizer.encode("hé 12") == byte_tokenizer().encode("hé 12") and tokenizer.chat_template == TEMPLATE


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_comes_back_tensor_by_tensor(case: str, tmp_path: Path) -> None:
    """Loading a Hugging Face checkpoint and exporting it gives the same tensors."""
    tensors = llama_tensors(CASES[case])
    model, params, tokenizer = load_pretrained(write_checkpoint(tmp_path / "in", CASES[case], tensors))
    export_pretrained(tmp_path / "out", model, params, tokenizer)
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(exported[name], tensor)
        assert exported[name].dtype == tensor.dtype


def test_large_weights_are_split_over_files(tmp_path: Path) -> None:
    model, params = a_model(tie_embeddings=False)
    export_pretrained(tmp_path / "one", model, params, byte_tokenizer())
    export_pretrained(tmp_path / "many", model, params, byte_tokenizer(), max_file_bytes=6000)
    files = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = {name: sum(t.nbytes for t in load_file(tmp_path / "many" / name).values()) for name in files}
    embeddings = 272 * 16 * 4  # larger than the limit: alone in its file
    assert all(size <= 6000 or size == embeddings for size in sizes.values())
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes.values()) == sum(x.nbytes for x in jax.tree.leaves(params))
    assert_same(load_pretrained(tmp_path / "many").params, load_pretrained(tmp_path / "one").params)
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()


def test_a_sharded_model_exports_as_a_whole_one(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "in", llama_fields(), llama_tensors(llama_fields()))
    model, params, tokenizer = load_pretrained(path, mesh=make_mesh(MeshConfig(fsdp=4, tensor=2)))
    export_pretrained(tmp_path / "out", model, params, tokenizer)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == _exported_alone(path, tmp_path / "alone")


def _exported_alone(path: Path, out: Path) -> bytes:
    model, params, tokenizer = load_pretrained(path)
    export_pretrained(out, model, params, tokenizer)
    return (out / "model.safetensors").read_bytes()


def test_transformers_reads_configuration_and_tokenizer(tmp_path: Path) -> None:
    model, params = a_model(rope_theta=5e5, norm_epsilon=1e-6, tie_embeddings=False)
    tokenizer = train_bpe_tokenizer(["order 66 of 2026"] * 9, 268, chat_template=TEMPLATE)
    export_pretrained(tmp_path / "out", model, params, tokenizer)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.model_type == "llama" and config.architectures == ["LlamaForCausalLM"]
    assert config.rope_parameters["rope_theta"] == 5e5 and config.rope_parameters["rope_type"] == "default"
    assert (config.hidden_size, config.head_dim, config.num_key_value_heads, config.rms_norm_eps) == (16, 8, 2, 1e-6)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    auto = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ["order 66  2026", "a  5", "<|eos|> é"]:
        assert auto.encode(text) == tokenizer.encode(text)
    chat = [{"role": "user", "content": "hi"}]
    assert auto.apply_chat_template(chat, tokenize=False) == "<|bos|>hi<|eos|>"
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and settings["chat_template"] == TEMPLATE
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.mark.parametrize("changes", [{"lora": LoraConfig(rank=2)}, {"int8": True}])
def test_adapters_and_int8_matrices_are_not_left_out_silently(changes: dict[str, Any], tmp_path: Path) -> None:
    model = Model(tiny_config(vocab_size=272, num_heads=4, head_dim=8), **changes)
    with pytest.raises(InputError, match="has adapters or int8 matrices"):
        export_pretrained(tmp_path / "out", model, random_params(model, 0), byte_tokenizer())


def test_sampling_defaults_and_stop_ids_of_the_source_stay(tmp_path: Path) -> None:
    model, params = a_model()
    source = {"eos_token_id": [5, 2], "temperature": 0.6, "top_p": 0.9, "do_sample": True, "pad_token_id": 7}
    (tmp_path / "generation_config.json").write_text(json.dumps(source | {"transformers_version": "4.40.0"}))
    source_config = read_generation(Location("huggingface", tmp_path))
    export_pretrained(tmp_path / "out", model, params, byte_tokenizer(), generation=source_config)
    exported = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert exported == {  # the tokenizer's own ids win
        "bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 0, "temperature": 0.6, "top_p": 0.9, "do_sample": True,
    }  # fmt: skip
    config = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (config.eos_token_id, config.temperature, config.top_p) == ([2, 5], 0.6, 0.9)
    with pytest.raises(InputError, match=r"eos_token_id: \[272\] are no ids below vocab_size = 272"):
        export_pretrained(tmp_path / "bad", model, params, byte_tokenizer(), generation={"eos_token_id": [272]})
    assert not (tmp_path / "bad").exists()


def test_a_scorers_bias_is_exported_as_a_tensor_of_its_own(tmp_path: Path) -> None:
    model, params = a_model(head="scalar")
    export_pretrained(tmp_path / "biased", model, params, byte_tokenizer())
    exported = load_file(tmp_path / "biased" / "model.safetensors")
    np.testing.assert_array_equal(exported["score.bias"], params["scalar_head"]["bias"])
    params["scalar_head"]["bias"] = jnp.zeros((1,))
    export_pretrained(tmp_path / "plain", model, params, byte_tokenizer())
    assert "score.bias" not in load_file(tmp_path / "plain" / "model.safetensors")
    assert load_pretrained(tmp_path / "plain").params["scalar_head"]["bias"].tolist() == [0.0]
    assert not (tmp_path / "plain" / "generation_config.json").exists()


def test_an_export_is_complete_and_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure half-way leaves no files; the exported files have ordinary permissions."""
    model, params = a_model()
    tokenizer = byte_tokenizer()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "save_pretrained", full)
        with pytest.raises(OSError, match="No space"):
            export_pretrained(tmp_path / "out", model, params, tokenizer)
    assert list(tmp_path.iterdir()) == []
    export_pretrained(tmp_path / "deep" / "out", model, params, tokenizer)
    (tmp_path / "ordinary").write_text("")
    ordinary = stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "deep" / "out").iterdir()} == {ordinary}
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["out"]


def test_invalid_exports_are_refused(tmp_path: Path) -> None:
    model, params = a_model()
    tokenizer = byte_tokenizer()
    (tmp_path / "there").mkdir()

    def refuse(words: str, model: Model, params: Params, tokenizer: Any, out: str = "out") -> None:
        with pytest.raises(InputError, match=words):
            export_pretrained(tmp_path / out, model, params, tokenizer)
        assert not (tmp_path / "out").exists()

    refuse("already exists", model, params, tokenizer, "there")
    two_heads, more = a_model(head="lm+scalar")
    refuse("head='lm' or head='scalar'", two_heads, more, tokenizer)
    refuse("scalar_head/bias is float32.1., the model has no such parameter", model, more, tokenizer)
    refuse("final_norm/scale is missing", model, {k: v for k, v in params.items() if k != "final_norm"}, tokenizer)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    refuse("embed/embedding is bfloat16.272, 16., the model has float32", model, narrow, tokenizer)
    small = Model(tiny_config(vocab_size=256))
    refuse("259 tokens do not fit vocab_size = 256", small, random_params(small, 0), tokenizer)
    endless = byte_tokenizer()
    endless.eos_token = None
    refuse("no end-of-sequence token", model, params, endless)


def test_a_scorers_padding_must_not_be_its_end(tmp_path: Path) -> None:
    """transformers scores the last token that is not padding: with pad = eos that would be the token before the end."""
    model, params = a_model(head="scalar")
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(InputError, match="pad_token is eos_token.*set tokenizer.pad_token"):
        export_pretrained(tmp_path / "out", model, params, tokenizer)
    tokenizer.pad_token = None
    with pytest.raises(InputError, match="pad_token is absent"):
        export_pretrained(tmp_path / "out", model, params, tokenizer)
    language_model, its_params = a_model()
    export_pretrained(tmp_path / "lm", language_model, its_params, tokenizer)
    assert "pad_token_id" not in json.loads((tmp_path / "lm" / "generation_config.json").read_text())


@pytest.mark.parity
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "param_dtype": "bfloat16"}, {"head": "scalar"}])
def test_transformers_computes_the_same_from_an_export(changes: dict[str, Any], tmp_path: Path) -> None:
    """The model has hidden_size 32 and 4 heads of 8; warnings of transformers in loading are ignored."""
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    import transformers

    model, params = a_model(**changes)
    export_pretrained(tmp_path / "out", model, params, byte_tokenizer(), max_file_bytes=6000)
    tokens = golden_tokens()
    hidden = model.hidden(params, jnp.asarray(tokens))
    ids = torch.from_numpy(tokens.astype(np.int64))
    if model.config.has_lm:
        network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        actual, transformers_outputs = model.logits(params, hidden), network(ids).logits
    else:
        network = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float32)
        actual = model.scalars(params, hidden)[:, -1:] - params["scalar_head"]["bias"]  # which transformers leaves out
        transformers_outputs = network(ids).logits
    assert np.abs(np.asarray(actual) - transformers_outputs.detach().numpy()).max() < 1e-4


def test_the_plain_format_and_the_provenance_are_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are written before the directory is renamed: an existing directory is complete."""
    model, params = a_model()
    tokenizer = byte_tokenizer(TEMPLATE)
    plain = Template(style="plain", stop_token="<|pad|>")
    settings: Any = {"template": plain, "generation": {"eos_token_id": 5, "top_p": 0.9}, "provenance": b"{}"}
    export_pretrained(tmp_path / "out", model, params, tokenizer, **settings)
    auto = AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": "hi"}]
    assert auto.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == "Question: hi\nAnswer:"
    assert tokenizer.chat_template == TEMPLATE  # the caller's own stays
    assert read_template(tmp_path / "out") == plain
    assert (tmp_path / "out" / "provenance.json").read_bytes() == b"{}"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 0, 5] and generation["top_p"] == 0.9  # EOS, the format's end, the base's
    export_pretrained(tmp_path / "chat", model, params, tokenizer, template=Template())
    assert load_pretrained(tmp_path / "chat").tokenizer.chat_template == TEMPLATE

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)  # the last file to be written
    with pytest.raises(OSError, match="No space"):
        export_pretrained(tmp_path / "cut", model, params, tokenizer, **settings)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["chat", "out"]


def test_an_end_of_turn_other_than_eos_is_exported(tmp_path: Path) -> None:
    model, params = a_model()
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.content }}<|pad|>{% endfor %}")
    export_pretrained(tmp_path / "out", model, params, tokenizer, template=Template())
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, 0]
