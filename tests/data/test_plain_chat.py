"""A plain format as a chat template: a served model formats conversations as it was trained."""

from __future__ import annotations

import itertools

import pytest
from tokenizers import processors

from rlhf_jax.data import Message, Prompt, Template, chat_template_of, encode_prompt, response_ends
from rlhf_jax.data.rendering import render_prompt, render_response
from rlhf_jax.errors import InputError
from rlhf_jax.testing import byte_tokenizer

FORMATS = [
    Template(style="plain"),
    Template(style="plain", prompt_format="{prompt}"),
    Template(style="plain", prompt_format="\n\nHuman: {prompt}\n\nAssistant:", turn_end=""),
    Template(
        style="plain",
        prompt_format='"\\{{ x }}{%é%} {prompt} \U0001f600\n\n',
        system_format="<<{system}>>\r\n",
        response_prefix='\t"',
        turn_end="{#\n",
    ),
]
SYSTEM, USER, ASSISTANT = (Message(role, f'{role} "é"\\n {{{{ 1 }}}}') for role in ("system", "user", "assistant"))
CONVERSATIONS = [[USER], [SYSTEM, USER], [USER, ASSISTANT, USER], [SYSTEM, USER, ASSISTANT, USER]]


@pytest.mark.parametrize("template", FORMATS)
def test_it_renders_what_the_plain_format_renders(template: Template) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chat_template_of(template, tokenizer)
    chat = Template()
    for messages in CONVERSATIONS:
        assert render_prompt(messages, tokenizer, chat) == render_prompt(messages, tokenizer, template)
        for response in ("Oak.", template.response_prefix + "Oak."):
            text = render_response(messages, response, tokenizer, template)
            assert render_response(messages, response, tokenizer, chat) == text
    assert response_ends(tokenizer, chat) == response_ends(tokenizer, template)


def test_it_refuses_what_the_plain_format_refuses() -> None:
    template, tokenizer = FORMATS[0], byte_tokenizer()
    tokenizer.chat_template = chat_template_of(template, tokenizer)
    for messages in ([USER, USER], [ASSISTANT, USER], [USER, SYSTEM, USER]):
        for style in (template, Template()):
            with pytest.raises(InputError, match="alternate"):
                render_prompt(messages, tokenizer, style)


def test_it_begins_with_the_token_that_the_encoder_writes_first() -> None:
    record = Prompt("p", (USER,))
    for adds, bos in itertools.product((False, True), ("auto", "always", "never")):
        tokenizer = byte_tokenizer()
        if adds:
            first = processors.TemplateProcessing("<|bos|> $A", special_tokens=[("<|bos|>", 1)])
            tokenizer.backend_tokenizer.post_processor = first
        template = Template(style="plain", bos=bos)  # type: ignore[arg-type]
        encoded = encode_prompt(record, tokenizer, template, max_prompt_length=99)
        tokenizer.chat_template = chat_template_of(template, tokenizer)
        messages = [{"role": "user", "content": USER.content}]
        served = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert served == encoded


def test_arguments_become_defaults() -> None:
    own = "{% for m in messages %}{{ m.content }}{% endfor %}|{{ think }}|{{ names[0] }}|{{ table['a'] is none }}|{{ rate }}"
    arguments = {"think": False, "names": ['x"\\'], "table": {"a": None}, "rate": 0.5}
    tokenizer, template = byte_tokenizer(own), Template(arguments=arguments)
    trained = render_prompt([USER], tokenizer, template)
    tokenizer.chat_template = chat_template_of(template, tokenizer)
    assert render_prompt([USER], tokenizer, Template()) == trained
    assert trained.endswith('|False|x"\\|True|0.5')
    other = render_prompt([USER], tokenizer, Template(arguments={"think": True}))  # who asks otherwise gets it
    assert "|True|x" in other


def test_other_styles_have_or_need_no_chat_template() -> None:
    assert chat_template_of(Template(), byte_tokenizer()) is None
    assert chat_template_of(Template(style="raw"), byte_tokenizer()) is None
