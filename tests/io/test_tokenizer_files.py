"""Tokenizers as their files describe them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_jax.io import load_tokenizer
from rlhf_jax.io.tokenizers import save_tokenizer
from rlhf_jax.testing import byte_tokenizer, train_bpe_tokenizer
from rlhf_jax.types import InputError

TEXTS = ["x  5", "12 34", " a\n\n", "Grüße 🙂"]


def test_the_class_in_the_settings_does_not_rebuild_the_pipeline(tmp_path: Path) -> None:
    """AutoTokenizer builds a GPT2Tokenizer, whose pre-tokenizer keeps runs of digits together."""
    tokenizer = train_bpe_tokenizer(["12 12 34  x  5 1234"] * 9, 290)
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "GPT2Tokenizer"}))
    loaded = load_tokenizer(tmp_path)
    assert [loaded.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    split = loaded.backend_tokenizer.pre_tokenizer.pre_tokenize_str("1234")
    assert [piece for piece, _ in split] == ["1", "2", "3", "4"]
    rebuilt = AutoTokenizer.from_pretrained(tmp_path)  # the reason for load_tokenizer; when this fails, it may go
    assert len(rebuilt.backend_tokenizer.pre_tokenizer.pre_tokenize_str("1234")) == 1


def test_special_tokens_and_template_survive(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer("{{ messages[0]['content'] }}é")
    save_tokenizer(tokenizer, tmp_path / "a")
    loaded = load_tokenizer(tmp_path / "a")
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    save_tokenizer(loaded, tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_files_of_older_libraries_leave_fields_out(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "tokenizer.json").read_text())
    del described["model"]["ignore_merges"], described["pre_tokenizer"]["pretokenizers"][1]["use_regex"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    assert [load_tokenizer(tmp_path).encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_a_pipeline_that_transformers_changes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that contradict tokenizer.json: transformers would obey them and split texts in another way."""
    byte_tokenizer().save_pretrained(tmp_path)
    changed = byte_tokenizer()
    changed.backend_tokenizer.normalizer = normalizers.Lowercase()
    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", lambda *_: changed)
    with pytest.raises(InputError, match="transformers loads another normalizer than the file describes"):
        load_tokenizer(tmp_path)


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tokenizer.json: no such file; write one with transformers"):
        load_tokenizer(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["a.B", None]}}))
    with pytest.raises(InputError, match="auto_map.*never run"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(InputError, match="tokenizer.json: not a tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(InputError, match="tokenizer.json:1: not JSON"):
        load_tokenizer(tmp_path)
