"""Tokenizers load exactly as their files describe them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_jax.data.special_tokens import quotes_of
from rlhf_jax.data.token_bytes import response_text
from rlhf_jax.data.tokenise import tokenise
from rlhf_jax.errors import InputError
from rlhf_jax.io import load_tokenizer
from rlhf_jax.io.tokenizers import save_tokenizer
from rlhf_jax.testing import byte_tokenizer, train_bpe_tokenizer

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
    """transformers would follow settings that contradict tokenizer.json and split texts differently."""
    byte_tokenizer().save_pretrained(tmp_path)
    changed = byte_tokenizer()
    changed.backend_tokenizer.normalizer = normalizers.Lowercase()
    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", lambda *_: changed)
    with pytest.raises(InputError, match="transformers loads another normalizer than the file describes"):
        load_tokenizer(tmp_path)


def test_invalid_tokenizer_files_are_refused(tmp_path: Path) -> None:
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


Change = Callable[[dict[str, Any]], Any]


def write_tokenizer(directory: Path, change: Change | None = None, settings: dict[str, Any] | None = None) -> Path:
    """Write the files of the byte tokenizer, with tokenizer.json changed and ``settings`` added to tokenizer_config.json."""
    byte_tokenizer().save_pretrained(directory)
    for name, changed in (
        ("tokenizer.json", change),
        ("tokenizer_config.json", lambda fields: fields.update(settings or {})),
    ):
        fields = json.loads((directory / name).read_text())
        if changed is not None:
            changed(fields)
        (directory / name).write_text(json.dumps(fields))
    return directory


def around(before: str, after: str) -> Change:
    """Return a change to a post-processor that adds tokens before and after a text; "" for none."""
    parts: list[Any] = [{"SpecialToken": {"id": token, "type_id": 0}} for token in (before, after)]
    single = [part for part, token in zip(parts, (before, after), strict=True) if token]
    single.insert(1 if before else 0, {"Sequence": {"id": "A", "type_id": 0}})
    ids = {"<|pad|>": 0, "<|bos|>": 1, "<|eos|>": 2}
    special = {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in (before, after) if token}
    processor = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
    }
    return lambda fields: fields.update(post_processor=processor | {"special_tokens": special})


@pytest.mark.parametrize(
    "block",
    [
        {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}},
        {"padding": {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
         | {"pad_type_id": 0, "pad_token": "<|pad|>"}},
    ],
)  # fmt: skip
def test_no_block_of_the_file_cuts_or_pads_texts(block: dict[str, Any], tmp_path: Path) -> None:
    """This also holds for continuations, which are encoded without the tokens that begin a text."""

    def change(fields: dict[str, Any]) -> None:
        fields.update(block, normalizer={"type": "Prepend", "prepend": " "})

    tokenizer = load_tokenizer(write_tokenizer(tmp_path, change))
    text = "abcdefgh"
    assert len(tokenise(text, tokenizer, quotes_of(tokenizer, "", ""), after=100)) == len(text)
    assert len(tokenizer.backend_tokenizer.encode(text).ids) == 1 + len(text)


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        (lambda fields: fields["model"].update(dropout=0.1), {}, "tokenizer.json: model.dropout = 0.1: splits.*null"),
        (around("<|pad|>", ""), {}, r"tokenizer.json: post_processor makes '<\|pad\|> <text>' of a text.*set post_proc"),
        (around("", "<|bos|>"), {}, r"post_processor makes '<text> <\|bos\|>' of a text"),
        (around("<|bos|>", ""), {"bos_token": None}, r"post_processor makes '<\|bos\|> <text>'.*name them in"),
        (None, {"add_bos_token": True}, "_config.json: add_bos_token = True: the post_processor.*adds none; set it to false"),
        (around("<|bos|>", ""), {"add_bos_token": False}, "add_bos_token = False.*adds one; set it to true and.*Template.bos"),
        (None, {"add_prefix_space": True}, "add_prefix_space = True: by the pipeline of tokenizer.json it is False; set it to"),
        (None, {"split_special_tokens": True}, "split_special_tokens = True: splits.*set it to false"),
        (None, {"do_lower_case": True}, "do_lower_case = True: the normalizer of tokenizer.json does not do it"),
        (None, {"strip_accents": True}, "strip_accents = True: the normalizer"),
    ],
)  # fmt: skip
def test_a_setting_that_asks_for_other_tokens(
    change: Change | None, settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        load_tokenizer(write_tokenizer(tmp_path, change, settings))
    assert "\n" not in str(caught.value)


FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}


@pytest.mark.parametrize("flag", FLAGS)
def test_an_added_token_is_the_same_in_both_files(flag: str, tmp_path: Path) -> None:
    token = {"content": "<|eos|>"} | FLAGS
    assert load_tokenizer(write_tokenizer(tmp_path, None, {"added_tokens_decoder": {"2": token}})).eos_token_id == 2
    changed = token | {flag: not FLAGS[flag]}
    if flag == "special":  # a token with a role is special in any case
        token = {"content": "<|pad|>"} | FLAGS
        changed = token | {"special": False}
    settings = {"added_tokens_decoder": {"0" if flag == "special" else "2": changed}}
    settings |= {"pad_token": None} if flag == "special" else {}
    with pytest.raises(
        InputError, match=f"_config.json: added_tokens_decoder: .* has another {flag} than in tokenizer.json"
    ):
        load_tokenizer(write_tokenizer(tmp_path, None, settings))


def test_an_added_token_has_the_id_that_the_files_say(tmp_path: Path) -> None:
    token = {"content": "<|new|>"} | FLAGS
    assert len(load_tokenizer(write_tokenizer(tmp_path / "a", None, {"added_tokens_decoder": {"259": token}}))) == 260
    with pytest.raises(
        InputError, match=r"_config.json: added token '<\|new\|>' has id 300, but tokenizer.json leads to 259; take"
    ):
        load_tokenizer(write_tokenizer(tmp_path / "b", None, {"added_tokens_decoder": {"300": token}}))
    directory = write_tokenizer(tmp_path / "c")
    (directory / "added_tokens.json").write_text('{"<|eos|>": 2}')
    load_tokenizer(directory)
    (directory / "added_tokens.json").write_text('{"<|im_end|>": 300}')
    with pytest.raises(InputError, match=r"added_tokens.json: added token '<\|im_end\|>' has id 300, but .* to 259"):
        load_tokenizer(directory)


def test_settings_without_effect_on_the_tokens(tmp_path: Path) -> None:
    """Released files have these settings; the end-of-sequence token is added where responses are written."""
    settings = {"model_max_length": 4, "truncation_side": "left", "padding_side": "left", "legacy": False}
    settings |= {"clean_up_tokenization_spaces": True, "add_eos_token": True, "add_bos_token": True, "use_fast": True}
    settings |= {"add_prefix_space": False, "split_special_tokens": False, "do_lower_case": False}
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, around("<|bos|>", "<|eos|>"), settings))
    expected = byte_tokenizer().encode("ab , cd")
    assert tokenizer.encode("ab , cd", add_special_tokens=False) == expected
    assert response_text(expected, tokenizer) == "ab , cd"
