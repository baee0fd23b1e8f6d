"""Messages to text: worked renderings, and templates that cannot be used."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_jax.data import Message, Template, render_prompt, render_response
from rlhf_jax.data.rendering import turns_of
from rlhf_jax.errors import InputError
from rlhf_jax.testing import byte_tokenizer

CHATML = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content | trim }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Forgets every reply but the last, as templates of reasoning models do with thoughts.
FORGETFUL = (
    "{% for message in messages %}{% if message.role == 'user' or loop.last %}<{{ message.role }}>{{ message.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
HH = Template(style="plain", prompt_format="\n\nHuman: {prompt}\n\nAssistant:", turn_end="")
TALK = [Message("system", "s"), Message("user", "a"), Message("assistant", "b"), Message("user", "c")]


def test_chat_response_is_what_the_template_appends() -> None:
    tokenizer = byte_tokenizer(CHATML)
    assert render_prompt(TALK[:2], tokenizer, Template()) == "<system>s<|eos|>\n<user>a<|eos|>\n<assistant>"
    assert render_response(TALK[:2], " b ", tokenizer, Template()) == "b<|eos|>\n"


def spans(messages: list[Message], tokenizer: PreTrainedTokenizerFast, template: Template) -> list[str]:
    text = render_prompt(messages, tokenizer, template)
    return [text[turn.begin : turn.end] for turn in turns_of(messages, tokenizer, template)]


def test_chat_turns() -> None:
    tokenizer = byte_tokenizer(CHATML)
    assert spans(TALK, tokenizer, Template()) == ["b<|eos|>\n"]
    expected = "<system>s<|eos|>\n<user>a<|eos|>\n<assistant>b<|eos|>\n<user>c<|eos|>\n<assistant>"
    assert render_prompt(TALK, tokenizer, Template()) == expected


def test_a_template_that_rewrites_turns_is_refused() -> None:
    tokenizer = byte_tokenizer(FORGETFUL)
    # The last response alone is fine: the prompt's text does not change when it is added.
    assert render_response(TALK[1:], "d", tokenizer, Template()) == "d"
    with pytest.raises(InputError, match="not prefix-stable"):
        turns_of(TALK[1:], tokenizer, Template())
    with pytest.raises(InputError, match="not prefix-stable"):
        render_response(TALK[1:2], "x", byte_tokenizer("{{ messages | length }}"), Template())


def test_chat_errors() -> None:
    with pytest.raises(InputError, match="has no chat template"):
        render_prompt(TALK, byte_tokenizer(), Template())
    strict = byte_tokenizer("{{ raise_exception('no system\nallowed') }}")
    with pytest.raises(InputError) as caught:
        render_prompt(TALK, strict, Template())
    assert "refuses [system, user, assistant, user] (no system allowed)" in str(caught.value)


def test_plain() -> None:
    tokenizer = byte_tokenizer()
    template = Template(style="plain")
    assert render_prompt(TALK[1:2], tokenizer, template) == "Question: a\nAnswer:"
    assert render_response(TALK[1:2], "b", tokenizer, template) == " b"
    assert render_response(TALK[1:2], " b", tokenizer, template) == " b"
    expected = "s\n\nQuestion: a\nAnswer: b\n\nQuestion: c\nAnswer:"
    assert render_prompt(TALK, tokenizer, template) == expected
    assert spans(TALK, tokenizer, template) == [" b"]


def test_plain_can_write_hh_dialogues_and_leaves_braces_alone() -> None:
    tokenizer = byte_tokenizer()
    talk = [Message("user", "a {prompt} {0}"), *TALK[2:]]
    expected = "\n\nHuman: a {prompt} {0}\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert render_prompt(talk, tokenizer, HH) == expected


@pytest.mark.parametrize("roles", ["assistant", "user user", "user assistant", "user system user", "system"])
def test_plain_refuses_turns_out_of_order(roles: str) -> None:
    with pytest.raises(InputError, match="must alternate"):
        render_prompt([Message(role, "x") for role in roles.split()], byte_tokenizer(), HH)


def test_raw() -> None:
    template = Template(style="raw")
    assert render_prompt([Message("user", "Once ")], byte_tokenizer(), template) == "Once "
    assert render_response([Message("user", "Once ")], "upon", byte_tokenizer(), template) == "upon"
    assert render_prompt([], byte_tokenizer(), template) == ""
    with pytest.raises(InputError, match="takes one message, not 4"):
        render_prompt(TALK, byte_tokenizer(), template)


@pytest.mark.parametrize(
    "fields",
    [
        {"style": "fancy"},
        {"bos": True},
        {"style": "plain", "prompt_format": "no place"},
        {"style": "plain", "prompt_format": "{prompt}{prompt}"},
        {"style": "plain", "system_format": 3},
        {"style": "plain", "turn_end": None},
        {"style": "chat", "turn_end": ""},
        {"style": "raw", "response_prefix": ""},
    ],
)
def test_template_fields_are_checked(fields: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"Template\."):
        Template(**fields)  # type: ignore[arg-type]
