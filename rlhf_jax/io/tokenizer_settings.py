"""Settings in tokenizer files that change the tokens of a text: checked against the pipeline, ignored, or refused by name.

Ignored: ``truncation`` and ``padding`` blocks, ``model_max_length`` and the sides of both (the lengths are those of the run's
configuration), ``clean_up_tokenization_spaces`` (a response has exactly the characters of its tokens), an end-of-sequence token
after every text and ``add_eos_token`` (the end of a response is added once, by `data.response_ends`).

"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_jax.data import has_prefix
from rlhf_jax.errors import InputError
from rlhf_jax.io.json_files import read_json

FILE, SETTINGS, ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
_MATCHING = ("lstrip", "rstrip", "normalized", "single_word")
_NORMALISED = {"do_lower_case": ("A", "a"), "strip_accents": ("\u00e9", "e")}
"""Settings of some classes -> (text, the text after normalisation)."""


def read_settings(directory: Path) -> dict[str, Any]:
    """Read tokenizer_config.json; {} when there is none. Raises InputError for a damaged file, or one that brings its own code."""
    file = directory / SETTINGS
    settings = read_json(file) if os.path.lexists(file) else {}
    if settings.get("auto_map"):
        raise InputError(f"{file}: auto_map: the tokenizer brings its own code, which is never run")
    return settings


def check_loaded(directory: Path, described: Mapping[str, Any], loaded: Mapping[str, Any]) -> None:
    """Check that transformers loaded the pipeline that tokenizer.json describes. Raises InputError.

    described, loaded: output of the pipelines' ``to_str``.

    """
    file = directory / FILE
    for part in ("normalizer", "pre_tokenizer", "model", "decoder"):
        if loaded[part] != described[part]:
            raise InputError(
                f"{file}: transformers loads another {part} than the file describes; the texts would differ"
            )
    if dropout := described["model"].get("dropout"):
        raise InputError(f"{file}: model.dropout = {dropout!r}: splits every text at random; set it to null")
    tokens = {token["content"]: token for token in loaded["added_tokens"]}
    for token in described["added_tokens"]:
        other = tokens.get(token["content"], {})
        differing = [name for name in _MATCHING if other.get(name) != token[name]]
        if token["special"] and not other.get("special"):
            differing.append("special")
        if differing:
            raise InputError(
                f"{directory / SETTINGS}: added_tokens_decoder: {token['content']!r} has another {', '.join(differing)} than "
                f"in {FILE}, so that texts would be split otherwise; make both files say the same"
            )


def check_settings(directory: Path, settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the settings agree with the pipeline of tokenizer.json. Raises InputError naming one that changes the tokens."""
    file = directory / SETTINGS
    _check_ids(directory, settings, tokenizer)
    if settings.get("split_special_tokens"):
        raise InputError(
            f"{file}: split_special_tokens = {settings['split_special_tokens']!r}: splits the special tokens of the chat "
            "template into characters; set it to false"
        )
    backend: Any = tokenizer.backend_tokenizer
    for name, (text, changed) in _NORMALISED.items():
        normalised = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
        if settings.get(name) is True and normalised != changed:
            raise InputError(
                f"{file}: {name} = True: the normalizer of {FILE} does not do it; set it to false, or save the tokenizer again"
            )
    prefixed, setting = has_prefix(json.loads(backend.to_str())), settings.get("add_prefix_space")
    if isinstance(setting, bool) and setting != prefixed:
        raise InputError(
            f"{file}: add_prefix_space = {setting}: by the pipeline of {FILE} it is {prefixed}; set it to "
            f"{str(prefixed).lower()}, or save the tokenizer again"
        )
    adds_bos = _adds_bos(directory, tokenizer)
    setting = settings.get("add_bos_token")
    if isinstance(setting, bool) and setting != adds_bos and tokenizer.bos_token_id is not None:
        raise InputError(
            f"{file}: add_bos_token = {setting}: the post_processor of {FILE} {'adds one' if adds_bos else 'adds none'}; set it to "
            f"{str(adds_bos).lower()} and say what the model was trained with as Template.bos"
        )


def _check_ids(directory: Path, settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Check the ids of added tokens. Raises InputError for one that the settings give another id than it has."""
    ids = tokenizer.get_vocab()
    decoder = settings.get("added_tokens_decoder")
    entries: list[tuple[str, Any, Any]] = []
    if isinstance(decoder, Mapping):
        for index, token in decoder.items():
            content = token.get("content") if isinstance(token, Mapping) else token
            entries.append((SETTINGS, content, int(index) if str(index).isdecimal() else index))
    if (directory / ADDED).is_file():
        entries += [(ADDED, content, index) for content, index in read_json(directory / ADDED).items()]
    for name, content, index in entries:
        if ids.get(content) != index:
            raise InputError(
                f"{directory / name}: added token {content!r} has id {index!r}, but {FILE} leads to {ids.get(content, 'none')}; "
                "take both files from the same checkpoint"
            )


def _adds_bos(directory: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the pipeline begins texts with the beginning-of-sequence token.

    Raises InputError for any other token that it adds.

    """
    backend: Any = tokenizer.backend_tokenizer
    try:
        encoding = backend.encode("a")
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise InputError(f"{directory / FILE}: not a tokenizer ({' '.join(str(error).split())})") from error
    if all(encoding.special_tokens_mask):
        return False
    first = encoding.special_tokens_mask.index(0)
    end = len(encoding.ids) - encoding.special_tokens_mask[::-1].index(0)
    before, after = encoding.ids[:first], encoding.ids[end:]
    if before not in ([], [tokenizer.bos_token_id]) or after not in ([], [tokenizer.eos_token_id]):
        around = " ".join([*encoding.tokens[:first], "<text>", *encoding.tokens[end:]])
        raise InputError(
            f"{directory / FILE}: post_processor makes {around!r} of a text; only bos_token before and eos_token after it are "
            f"known: name them in {SETTINGS}, or set post_processor to null for a model that was trained without"
        )
    return bool(before)
