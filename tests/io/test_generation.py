"""The generation config of a model: read from its source, stored in a run, used by its export and samplers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_jax.algorithms.models import source_generation, write_model_card
from rlhf_jax.data import Template
from rlhf_jax.errors import InputError
from rlhf_jax.io import Location, read_generation
from rlhf_jax.testing import byte_tokenizer, tiny_config, tiny_model


def write(directory: Path, **files: Any) -> Location:
    """Write a Hugging Face directory with these JSON files."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return Location("huggingface", directory)


def test_sources_of_the_generation_config(tmp_path: Path) -> None:
    config = {"eos_token_id": [2, 5], "model_type": "llama"}
    assert read_generation(write(tmp_path / "config", config=config)) == {
        "eos_token_id": [2, 5]
    }  # as transformers does
    own = {"eos_token_id": 7, "top_p": 0.9, "transformers_version": "4.40.0"}
    base = write(tmp_path / "base", config=config, generation_config=own)
    assert read_generation(base) == {"eos_token_id": 7, "top_p": 0.9}
    adapter = write(tmp_path / "adapter", adapter_config={"base_model_name_or_path": str(base.path)})
    assert read_generation(adapter) == {"eos_token_id": 7, "top_p": 0.9}
    assert read_generation(write(tmp_path / "silent", config={"model_type": "llama"})) == {}


def test_damaged_ends_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"generation_config.json: eos_token_id = '2': must be a token id"):
        read_generation(write(tmp_path / "text", config={}, generation_config={"eos_token_id": "2"}))
    with pytest.raises(InputError, match=r"config.json: eos_token_id = \[-1\]"):
        read_generation(write(tmp_path / "negative", config={"eos_token_id": [-1]}))
    outside = write(tmp_path / "outside", config={"eos_token_id": [2, 272]})
    with pytest.raises(InputError, match=r"the/model: eos_token_id .*\[272\] are no ids below vocab_size = 272"):
        source_generation(tiny_config(vocab_size=272), outside, "the/model")


def test_a_run_keeps_its_bases_generation_config_and_all_ends(tmp_path: Path) -> None:
    """The end ids are those of the chat template (0, <|pad|> here), EOS (2) and the base's own."""
    model, _ = tiny_model(vocab_size=272)
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.content }}<|pad|>{% endfor %}")
    base = {"eos_token_id": [5, 2], "temperature": 0.6}
    write_model_card(tmp_path, model, tokenizer, Template(), generation=base)
    run = Location("run", tmp_path)
    assert read_generation(run) == {"eos_token_id": [0, 2, 5], "temperature": 0.6}
    card = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(card | {"generation": [1]}))
    with pytest.raises(InputError, match=r"model.json: generation = \[1\]: must be an object"):
        read_generation(run)
    card.pop("generation")  # a run of an earlier version
    (tmp_path / "model.json").write_text(json.dumps(card))
    assert read_generation(run) == {}
