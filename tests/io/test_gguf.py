"""GGUF files, written here with the gguf package's own writer."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from gguf_files import FIELDS, NAMES, TEMPLATE, write_gguf
from llama_files import llama_fields, write_checkpoint

from rlhf_jax.errors import InputError
from rlhf_jax.io import load_pretrained
from rlhf_jax.io.gguf_file import open_gguf
from rlhf_jax.io.tokenizers import tokenizer_from_gguf
from rlhf_jax.parallel import MeshConfig, make_mesh
from rlhf_jax.testing import train_bpe_tokenizer


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("fsdp", [None, 4])
def test_a_gguf_file_is_the_checkpoint_it_was_made_from(tied: bool, fsdp: int | None, tmp_path: Path) -> None:
    fields = FIELDS | {"tie_word_embeddings": tied}
    stored_tensors = write_gguf(tmp_path / "model.gguf", fields)
    write_checkpoint(tmp_path / "hf", fields, stored_tensors)
    mesh = None if fsdp is None else make_mesh(MeshConfig(fsdp=fsdp, tensor=2))
    model, params, tokenizer = load_pretrained(tmp_path / "model.gguf", mesh=mesh)
    other, same, _ = load_pretrained(tmp_path / "hf")
    assert model.config == other.config  # norm_epsilon 1e-5 exactly, although the file keeps a float32
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), jax.device_get(same))
    assert tokenizer.chat_template == TEMPLATE and tokenizer.encode("cab") == [3 + ord("c"), 259]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_absent_keys_follow_from_others(tmp_path: Path) -> None:
    """Sizes of the vocabulary and of a head are often left out."""
    stored_tensors = write_gguf(tmp_path / "model.gguf", FIELDS)
    fields, tensors, metadata = open_gguf(tmp_path / "model.gguf")
    assert fields["head_dim"] == 8 and "head_dim" not in metadata
    assert {name: stored.shape for name, stored in tensors.stored.items()} == {
        n: t.shape for n, t in stored_tensors.items()
    }


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"llama.rope.scaling.type": "linear"}, "llama.rope.scaling.type = 'linear'"),
        ({"llama.rope.scaling.factor": 2.0}, "llama.rope.scaling.factor"),
        ({"llama.expert_count": 8}, "llama.expert_count = 8"),
        ({"llama.attention.value_length": 16}, "llama.attention.value_length = 16"),
        ({"llama.logit_scale": 2.0}, "llama.logit_scale = 2.0"),
    ],
)
def test_keys_that_change_the_computation_are_refused(keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", FIELDS, keys=keys)
    with pytest.raises(InputError, match=f"{words}.*not implemented"):
        load_pretrained(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("llama.attention.head_count", 0, "head_count = 0: must be one positive whole number"),
        (
            "llama.attention.head_count",
            [4, 2],
            r"head_count = \[4, 2\]: must be one positive whole number for all layers",
        ),
        ("llama.attention.head_count_kv", [2, 1], r"head_count_kv = \[2, 1\]: must be one"),
        ("llama.feed_forward_length", [64, 32], r"feed_forward_length = \[64, 32\]: must be one"),
        ("llama.embedding_length", "32", "embedding_length = '32': must be one"),
        ("llama.block_count", True, "block_count = True: must be one"),
        ("general.architecture", ["llama"], r"general.architecture = \['llama'\] is not supported"),
        ("llama.rope.scaling.type", ["linear"], "llama.rope.scaling.type"),
    ],
)
def test_invalid_sizes_are_refused(
    key: str, value: Any, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Files whose layers differ in size have a list as the value, which is refused by name."""
    write_gguf(tmp_path / "model.gguf", FIELDS)
    whole = gguf.GGUFReader

    def reader(path: Path) -> SimpleNamespace:
        read = whole(path)
        return SimpleNamespace(
            fields={**read.fields, key: SimpleNamespace(contents=lambda: value)}, tensors=read.tensors
        )

    monkeypatch.setattr(gguf, "GGUFReader", reader)
    with pytest.raises(InputError, match=rf"^[^\n]*model\.gguf: .*{words}"):
        open_gguf(tmp_path / "model.gguf")


def test_invalid_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, FIELDS)
    content = path.read_bytes()
    for damaged in (b"GGUF", b"", b"PK\x03\x04" + content[4:], content[:2000], content[:-64]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="not a whole GGUF file"):
            load_pretrained(path)
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(
        InputError, match="general.architecture = 'mamba' is not supported; supported: llama, qwen2, qwen3, gemma"
    ):
        load_pretrained(tmp_path / "other.gguf")


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    """Llama 3.1 files store their rotary scaling in such a tensor and in no key."""
    fields = llama_fields(intermediate_size=64)
    original = NAMES | {}
    NAMES["model.norm"] = "rope_freqs"
    try:
        write_gguf(tmp_path / "model.gguf", fields)
    finally:
        NAMES.update(original)
    with pytest.raises(InputError, match="missing: model.norm.weight; not of this architecture: rope_freqs.weight"):
        load_pretrained(tmp_path / "model.gguf")


# ---- tokenizers


def metadata(**changes: Any) -> dict[str, Any]:
    """Return the metadata that a converter writes for a byte-pair encoding trained here."""
    trained = train_bpe_tokenizer(["costs 2026 dollars, not 1999"] * 9, 300)
    vocabulary = trained.get_vocab()
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return fields | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}


def test_the_tokenizer_of_the_metadata_is_the_original() -> None:
    trained = train_bpe_tokenizer(["costs 2026 dollars, not 1999"] * 9, 300)
    tokenizer = tokenizer_from_gguf(metadata(), "x.gguf")
    for text in ["", "costs  1999", "not<|eos|> 20 26\n\n dollars", "Grüße 🙂"]:
        assert tokenizer.encode(text) == trained.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode("not<|eos|>"), skip_special_tokens=True) == "not"


def test_pre_tokenizers_differ_where_they_should() -> None:
    def pieces(kind: str, text: str) -> list[str]:
        tokenizer = tokenizer_from_gguf(metadata(pre=kind), "x.gguf")
        return [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    assert pieces("smollm", "x  5 1234") == ["x", "ĠĠ", "5", "Ġ", "1", "2", "3", "4"]
    assert pieces("gpt-2", "x  5 1234") == ["x", "Ġ", "Ġ5", "Ġ1234"]
    assert pieces("llama-bpe", "x  5 1234") == ["x", "Ġ", "Ġ", "5", "Ġ", "123", "4"]
    assert pieces("llama-bpe", "it'S ok\n\n") == ["it", "'S", "Ġok", "ĊĊ"]
    assert pieces("qwen2", "it'S x  5 1234") == ["it", "'S", "Ġx", "Ġ", "Ġ", "5", "Ġ", "1", "2", "3", "4"]
    composed, apart = (tokenizer_from_gguf(metadata(pre="qwen2"), "x.gguf").encode(text) for text in ("é", "e\u0301"))
    assert composed == apart  # NFC
    assert len(tokenizer_from_gguf(metadata(), "x.gguf").encode("e\u0301")) == 3


def test_a_tokenizer_beside_the_file_is_taken(tmp_path: Path) -> None:
    """Some kinds of tokenizer cannot be built from the metadata."""
    write_gguf(tmp_path / "model.gguf", FIELDS)
    trained = train_bpe_tokenizer(["costs 2026 dollars, not 1999"] * 9, 260)
    trained.save_pretrained(tmp_path)
    tokenizer = load_pretrained(tmp_path / "model.gguf").tokenizer
    assert tokenizer.get_vocab() == trained.get_vocab() and tokenizer.chat_template == trained.chat_template


def test_a_file_may_ask_for_a_first_token() -> None:
    plain = tokenizer_from_gguf(metadata(), "x.gguf")
    tokenizer = tokenizer_from_gguf(metadata(add_bos_token=True), "x.gguf")
    assert tokenizer.encode("not") == [1, *plain.encode("not")]
    assert tokenizer.encode("not", add_special_tokens=False) == plain.encode("not")


def test_metadata_without_effect_on_the_tokens() -> None:
    plain = tokenizer_from_gguf(metadata(), "x.gguf")
    changes = {"scores": [0.0], "add_eos_token": True, "add_space_prefix": False, "eot_token_id": 2, "mask_token_id": 2}
    tokenizer = tokenizer_from_gguf(metadata(**changes), "x.gguf")
    assert tokenizer.encode(" not 2026") == plain.encode(" not 2026")


def test_llama_3_begins_with_bos_and_takes_whole_words_first() -> None:
    """llama.cpp: ignore_merges and add_bos of its llama-bpe. 'sd' is a token that no merge makes."""
    tokens = [*metadata()["tokenizer.ggml.tokens"], "sd"]
    kinds = [3] * 3 + [1] * (len(tokens) - 3)
    tokenizer = tokenizer_from_gguf(metadata(pre="llama-bpe", tokens=tokens, token_type=kinds), "x.gguf")
    assert tokenizer.encode("sd") == [1, len(tokens) - 1]
    assert len(tokenizer_from_gguf(metadata(tokens=tokens, token_type=kinds), "x.gguf").encode("sd")) == 2
    without = tokenizer_from_gguf(
        metadata(pre="llama-bpe", tokens=tokens, token_type=kinds, add_bos_token=False), "x.gguf"
    )
    assert without.encode("sd") == [len(tokens) - 1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "llama"}, "only byte-level BPE.*Hugging Face directory"),
        ({"pre": "qwen9"}, "tokenizer.ggml.pre = 'qwen9' is not known"),
        ({"merges": ["zz yy"]}, "tokenizer.ggml.merges"),
        ({"eos_token_id": 4000}, "eos_token is not below the 273 tokens"),
        ({"tokens": ["a", "a", "b"]}, "tokenizer.ggml.tokens: 'a' is there twice"),
        ({"add_bos_token": True, "bos_token_id": None}, "add_bos_token without bos_token_id"),
        (
            {"add_space_prefix": True},
            "tokenizer.ggml.add_space_prefix: not understood; put the checkpoint's tokenizer.json",
        ),
        (
            {"remove_extra_whitespaces": True, "new": 3},
            "tokenizer.ggml.new, tokenizer.ggml.remove_extra_whitespaces: not",
        ),
        ({"token_type": [3, 3, 3]}, "tokenizer.ggml.token_type: 3 of 273 tokens; download the file again"),
    ],
)
def test_invalid_tokenizer_metadata_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=f"^x.gguf: .*{words}"):
        tokenizer_from_gguf(metadata(**changes), "x.gguf")


@pytest.mark.parametrize("key", ["tokens", "merges", "pre", "eos_token_id"])
def test_metadata_that_lack_a_key(key: str) -> None:
    fields = metadata()
    del fields[f"tokenizer.ggml.{key}"]
    with pytest.raises(InputError, match=f"tokenizer.ggml.{key} is missing"):
        tokenizer_from_gguf(fields, "x.gguf")
