"""The end tokens of a response: the chat template's end of turn, the tokenizer's EOS, ids of generation_config.json."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_jax.data import Demonstration, Message, Template, encode_demonstration, response_ends, sampler_ends
from rlhf_jax.data.encode import Encoded
from rlhf_jax.errors import InputError
from rlhf_jax.testing import byte_tokenizer

TURN = (
    "{% for m in messages %}<start>{{ m.role }}\n{{ m.content }}END{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)
EOS = 2  # of byte_tokenizer
CHAT = Template()


def tokenizer_of(end: str, specials: tuple[str, ...] = ("<start>", "<end>"), **names: str) -> PreTrainedTokenizerFast:
    """Bytes, special tokens 259 and on, and a chat template that writes ``end`` after a turn."""
    tokenizer = byte_tokenizer(TURN.replace("END", end))
    tokenizer.add_special_tokens({"additional_special_tokens": list(specials)} | names)
    return tokenizer


def learned(tokenizer: PreTrainedTokenizerFast, template: Template = CHAT, **settings: Any) -> str:
    """What a demonstration teaches, as text."""
    record = Demonstration("d", (Message("user", "q"), Message("assistant", "a"), Message("user", "q")), "Oak.")
    item = encode_demonstration(record, tokenizer, template, max_length=256, **settings)
    assert isinstance(item, Encoded)
    return tokenizer.decode([token for token, counts in zip(item.tokens, item.loss_mask, strict=True) if counts])


@pytest.mark.parametrize(
    ("end", "ending"),
    [
        ("<end>\n", "<end>"),  # Gemma, ChatML
        ("<end>", "<end>"),  # Llama 3
        ("\n<end>\n", "\n<end>"),  # a line before the end is learned
        ("<end>\n{% if loop.last and not add_generation_prompt %}<|eos|>{% endif %}", "<end>"),  # Phi-3
        ("<|eos|>", "<|eos|>"),
        ("\n", "\n<|eos|>"),  # nothing special: EOS as for plain text
        ("", "<|eos|>"),
    ],
)
def test_the_chat_templates_end_of_turn_is_learned(end: str, ending: str) -> None:
    tokenizer = tokenizer_of(end)
    assert learned(tokenizer) == f"Oak.{ending}"
    token = tokenizer.convert_tokens_to_ids(ending.strip())
    ends = response_ends(tokenizer, Template())
    assert (ends.stop_id, ends.text, ends.ids) == (token, ending.strip(), tuple(dict.fromkeys((token, EOS))))
    if end in ("<end>\n", "<end>"):  # every turn of the assistant ends so
        assert learned(tokenizer, loss_on="assistant") == f"a{ending}Oak.{ending}"


def test_a_sampler_stops_at_every_end() -> None:
    """Llama 3's generation_config.json lists three ids; a sampler that waits for EOS alone runs to its limit."""
    tokenizer = tokenizer_of("<end>")
    end = tokenizer.convert_tokens_to_ids("<end>")
    for listed, more in (([EOS, 7, end], (7,)), (9, (9,)), (EOS, ()), ([], ()), (None, ())):
        ends = sampler_ends(tokenizer, Template(), (), 300, {"eos_token_id": listed})
        assert ends == {"eos_ids": (end, EOS, *more), "pad_id": tokenizer.pad_token_id, "stop_table": None}
    plain = Template(style="plain")  # the model's ends are ends, however prompts are written
    assert sampler_ends(tokenizer, plain, (), 300, {"eos_token_id": [end]})["eos_ids"] == (EOS, end)
    assert response_ends(tokenizer, plain).ids == (EOS,)
    for wrong in ("2", -1, True, [EOS, None], [2.0]):
        with pytest.raises(InputError, match="eos_token_id = .*must be a token id or a list"):
            response_ends(tokenizer, plain, {"eos_token_id": wrong})


def test_a_stop_token_must_be_what_the_template_writes() -> None:
    tokenizer = tokenizer_of("<end>\n{% if loop.last and not add_generation_prompt %}<|eos|>{% endif %}")
    assert learned(tokenizer, Template(stop_token="<end>")) == "Oak.<end>"
    assert learned(tokenizer, Template(stop_token="<|eos|>")) == "Oak.<end>\n<|eos|>"  # it is written too
    with pytest.raises(InputError, match="stop_token = '<|pad|>': .* with '<end>'; name that, or leave"):
        response_ends(tokenizer, Template(stop_token="<|pad|>"))
    silent = tokenizer_of("\n")
    assert response_ends(silent, Template(stop_token="<|pad|>")).ids == (0, EOS)
    with pytest.raises(InputError, match="'end' is 3 tokens, not one"):
        response_ends(silent, Template(stop_token="end"))
    silent.eos_token = None
    assert response_ends(silent, Template(stop_token="<|pad|>")).ids == (0,)
    with pytest.raises(InputError, match="no end-of-sequence token; set"):
        response_ends(silent, Template())


def test_an_end_that_is_no_special_token_is_refused() -> None:
    """It would stay in every text that is made from tokens. Spaces that are added tokens are no end."""
    tokenizer = tokenizer_of("<fin>\n", ("<start>",))
    tokenizer.add_tokens(["<fin>", "\n\n"])
    with pytest.raises(
        InputError, match="ends a response with '<fin>', which is no special token.*Template.stop_token"
    ):
        response_ends(tokenizer, Template())
    assert response_ends(tokenizer, Template(stop_token="<fin>")).text == "<fin>"
    tokenizer.chat_template = TURN.replace("END", "\n\n")
    assert response_ends(tokenizer, Template()).ids == (EOS,)


def test_a_template_that_refuses_two_turns_asks_for_the_end() -> None:
    tokenizer = tokenizer_of("<end>")
    needs_system = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
    tokenizer.chat_template = needs_system + tokenizer.chat_template
    assert response_ends(tokenizer, Template()).text == "<end>"
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(InputError, match="never.*name what ends a response as Template.stop_token"):
        response_ends(tokenizer, Template())
    assert response_ends(tokenizer, Template(stop_token="<end>")).text == "<end>"
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(InputError, match="leaves out what the assistant says"):
        response_ends(tokenizer, Template())


def test_a_tokenizer_that_changes_is_asked_again() -> None:
    tokenizer = tokenizer_of("<end>")
    assert response_ends(tokenizer, Template()).text == "<end>"
    tokenizer.chat_template = TURN.replace("END", "<start>")
    assert response_ends(tokenizer, Template()).text == "<start>"
    tokenizer.chat_template = None  # style "chat" cannot render then; what it says is the encoder's error
    assert response_ends(tokenizer, Template()).ids == (EOS,)
