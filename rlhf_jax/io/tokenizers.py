"""Tokenizers: loading exactly as stored, saving for transformers 4 and 5 alike, and construction from GGUF metadata."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_jax.errors import InputError
from rlhf_jax.io.json_files import read_json, write_json
from rlhf_jax.io.tokenizer_settings import FILE, SETTINGS, check_loaded, check_settings, read_settings


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a directory, exactly as its tokenizer.json describes it.

    AutoTokenizer is not used: transformers 5 rebuilds the pipeline from the class that tokenizer_config.json names (a
    GPT2Tokenizer loses the digit splitting of SmolLM2 that way). Truncation and padding are switched off, since lengths are
    those of the run. Raises InputError when there is no tokenizer.json, when the loaded pipeline differs from it, or for a
    setting that would change the tokens.

    """
    directory = Path(directory)
    file = directory / FILE
    if not file.is_file():
        raise InputError(
            f"{file}: no such file; write one with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    read_json(file)  # for the line number of a syntax error
    settings = read_settings(directory)
    try:
        described = json.loads(Tokenizer.from_file(str(file)).to_str())
        tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(str(directory))
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise InputError(f"{file}: not a tokenizer ({' '.join(str(error).split())})") from error
    backend: Any = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    check_loaded(directory, described, json.loads(backend.to_str()))
    check_settings(directory, settings, tokenizer)
    return tokenizer


def largest_token(tokenizer: PreTrainedTokenizerBase) -> tuple[int, str]:
    """Return (largest token id that the tokenizer can produce, added tokens included, its token).

    Ids may have gaps, so the number of tokens does not determine the largest id.

    """
    token, index = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    return int(index), str(token)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, where: str, *, every_id: bool = True) -> None:
    """Check that the tokenizer's ids are below ``rows``, the rows of the embedding. Raises InputError.

    where: the model's path.
    every_id: False = only warn when there are enough rows for the number of tokens and some ids are larger: texts
    without those tokens can be read.

    """
    index, token = largest_token(tokenizer)
    if index < rows:
        return
    message = (
        f"{where}: the tokenizer has {len(tokenizer)} tokens with ids up to {index} ({token!r}), the model only "
        f"vocab_size = {rows}; use the tokenizer that the model was trained with"
    )
    if every_id or len(tokenizer) > rows:
        raise InputError(message)
    warnings.warn(message, stacklevel=3)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and, when there is one, chat_template.jinja.

    tokenizer_config.json names PreTrainedTokenizerFast (transformers 4 does not know the class that transformers 5 writes,
    and any other class may rebuild the pipeline) and contains the chat template, where older readers look for it.

    """
    tokenizer.save_pretrained(str(directory))
    settings = read_json(directory / SETTINGS)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in ("backend", "is_local", "local_files_only"):  # of the loading process
        settings.pop(name, None)
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    write_json(directory / SETTINGS, settings)
    specials = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    write_json(directory / "special_tokens_map.json", specials)


# ---- GGUF

_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")


_GGUF_PREFIX = "tokenizer.ggml."
_GGUF_KEYS = {"model", "pre", "tokens", "token_type", "merges", "add_bos_token"}
_GGUF_KEYS |= {"scores", "token_type_count"}  # of other kinds of tokenizer
_GGUF_KEYS |= {"add_eos_token"}  # the end of a response is written once


def _check_keys(fields: Mapping[str, Any], where: str) -> None:
    """Check the tokenizer keys of a GGUF file. Raises InputError naming keys that are not supported.

    Ids of further special tokens are allowed: they change no text.

    """
    active = [key for key, value in fields.items() if value is not None and value is not False]
    names = {key.removeprefix(_GGUF_PREFIX) for key in active if key.startswith(_GGUF_PREFIX)}
    if wrong := sorted(name for name in names - _GGUF_KEYS if not name.endswith(("_token_id", "_token_ids"))):
        raise InputError(
            f"{where}: {', '.join(_GGUF_PREFIX + name for name in wrong)}: not understood; put the checkpoint's tokenizer.json "
            "beside the file, or use its Hugging Face directory"
        )


def _pre_tokenizer(kind: str, where: str) -> pre_tokenizers.PreTokenizer:
    """Return the pre-tokenizer of ``tokenizer.ggml.pre`` (llama.cpp, src/llama-vocab.cpp: llm_tokenizer_bpe). Raises InputError."""
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "gpt-2":
        return bytes_of_words
    if kind == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_of_words])
    if kind in (*_LLAMA3_NAMES, "qwen2"):
        split = pre_tokenizers.Split(Regex(_QWEN2 if kind == "qwen2" else _LLAMA3), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raise InputError(
        f"{where}: tokenizer.ggml.pre = {kind!r} is not known (gpt-2, smollm, llama-bpe, qwen2 are); "
        "put the checkpoint's tokenizer.json beside the file, or use its Hugging Face directory"
    )


def tokenizer_from_gguf(fields: Mapping[str, Any], where: str) -> PreTrainedTokenizerBase:
    """Build the byte-level BPE tokenizer of a GGUF file. fields: its metadata.

    Raises InputError for other kinds of tokenizer and for missing keys.

    """
    kind = fields.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise InputError(
            f"{where}: tokenizer.ggml.model = {kind!r}: only byte-level BPE ('gpt2') is read; "
            "put the checkpoint's tokenizer.json beside the file, or use its Hugging Face directory"
        )
    for key in ("tokens", "merges", "pre", "eos_token_id"):
        if f"tokenizer.ggml.{key}" not in fields:
            raise InputError(f"{where}: tokenizer.ggml.{key} is missing; use the checkpoint's Hugging Face directory")
    _check_keys(fields, where)
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    is_llama3 = fields["tokenizer.ggml.pre"] in _LLAMA3_NAMES  # these also take whole words first and begin with bos
    if len(set(tokens)) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if token in tokens[:i])
        raise InputError(f"{where}: tokenizer.ggml.tokens: {twice!r} is there twice; download the file again")
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    try:
        model = models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=is_llama3)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise InputError(f"{where}: tokenizer.ggml.merges: {' '.join(str(error).split())}") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = _pre_tokenizer(fields["tokenizer.ggml.pre"], where)
    if fields["tokenizer.ggml.pre"] == "qwen2":
        tokenizer.normalizer = normalizers.NFC()  # as in Qwen2's tokenizer.json; no GGUF key states it
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields.get("tokenizer.ggml.token_type", [])
    if kinds and len(kinds) != len(tokens):
        raise InputError(
            f"{where}: tokenizer.ggml.token_type: {len(kinds)} of {len(tokens)} tokens; download the file again"
        )
    _add_special_tokens(tokenizer, tokens, kinds)
    special_names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: fields.get(f"tokenizer.ggml.{gguf_name}_token_id") for name, gguf_name in special_names.items()}
    if outside := [name for name, i in ids.items() if i is not None and not 0 <= i < len(tokens)]:
        raise InputError(f"{where}: the id of {', '.join(outside)} is not below the {len(tokens)} tokens")
    if fields.get("tokenizer.ggml.add_bos_token", is_llama3):
        _add_bos(tokenizer, tokens, ids["bos_token"], where)
    longest = fields.get(f"{fields.get('general.architecture')}.context_length")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **({} if longest is None else {"model_max_length": longest}),
        clean_up_tokenization_spaces=False,
        chat_template=fields.get("tokenizer.chat_template"),
        **{name: tokens[i] for name, i in ids.items() if i is not None},
    )


def _add_special_tokens(tokenizer: Tokenizer, tokens: list[str], kinds: list[int]) -> None:
    """Add tokens by their GGUF type: 3 = control (special), 4 = user defined (matched before splitting, but ordinary text)."""
    for token, kind in zip(tokens, kinds, strict=False):
        if kind == 3:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == 4:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])


def _add_bos(tokenizer: Tokenizer, tokens: list[str], bos: int | None, where: str) -> None:
    """Begin every text with the beginning-of-sequence token."""
    if bos is None:
        raise InputError(f"{where}: tokenizer.ggml.add_bos_token without bos_token_id; use the Hugging Face directory")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
    )
