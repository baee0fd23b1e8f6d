"""Two forms of conversations agree when they write the same text, whatever they are called."""

from __future__ import annotations

import pytest

from rlhf_jax.data import Form, Template, chat_template_of, form_difference
from rlhf_jax.testing import byte_tokenizer

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PLAIN, RAW = Template(style="plain", prompt_format="{prompt}"), Template(style="raw")


def form(template: Template, chat_template: str | None = CHATML) -> Form:
    return Form(template, byte_tokenizer(chat_template))


@pytest.mark.parametrize(
    ("learned", "used"),
    [
        (form(PLAIN), form(PLAIN, None)),  # a plain format does not read the chat template
        (form(Template()), form(Template())),
        (form(Template()), form(Template(stop_token="<|eos|>"))),  # what ends a response is the same
        (form(PLAIN), form(Template(style="plain", prompt_format="{prompt}", bos="never"))),  # nobody writes a BOS
        (form(RAW), form(Template(style="raw", bos="never"))),
        (form(PLAIN), form(Template(), chat_template_of(PLAIN, byte_tokenizer()))),  # an export served as a chat model
    ],
)
def test_what_writes_the_same_agrees(learned: Form, used: Form) -> None:
    assert form_difference(learned, used, responses=True) is None


@pytest.mark.parametrize(
    ("learned", "used", "words"),
    [
        (form(PLAIN), form(Template()), "Template.style was 'plain', is 'chat', Template.prompt_format was '{prompt}'"),
        (form(PLAIN), form(Template(style="plain")), "prompt_format was '{prompt}', is 'Question"),
        (form(Template()), form(Template(), CHATML.replace("<|eos|>", "<|pad|>")), "chat templates differ: it learned"),
        (form(Template()), form(Template(bos="always")), "Template.bos was 'auto', is 'always'"),
        (
            form(PLAIN),
            form(Template(style="plain", prompt_format="{prompt}", stop_token="<|pad|>")),
            "stop_token was None",
        ),
        (form(PLAIN), form(Template(style="plain", prompt_format="{prompt}", turn_end="\n")), "turn_end was"),
        (
            form(PLAIN),
            form(Template(), None),
            "Template.style was 'plain', is 'chat'",
        ),  # nothing to compare: no chat template
    ],
)
def test_what_is_written_otherwise_is_named(learned: Form, used: Form, words: str) -> None:
    for responses in (False, True):
        assert words in (form_difference(learned, used, responses=responses) or "")


def test_a_policy_is_asked_for_its_prompts_alone() -> None:
    """A base model that learned texts as they are answers a prompt of "{prompt}", and writes a response as it learned."""
    assert form_difference(form(RAW), form(PLAIN), responses=False) is None
    assert "Template.style was 'raw'" in (form_difference(form(RAW), form(PLAIN), responses=True) or "")


def test_a_model_may_be_used_on_another_day() -> None:
    dated = "{{ strftime_now('%d %b %Y') }}" + CHATML
    learned, used = Template(date="2026-01-31"), Template(date="2026-11-30")
    assert form_difference(form(learned, dated), form(used, dated), responses=True) is None
    assert form_difference(form(learned, dated), form(Template(), dated), responses=True) is None
    thinking = Template(arguments={"enable_thinking": False})
    read = CHATML + "{{ enable_thinking }}"
    assert "Template.arguments was" in (form_difference(form(thinking, read), form(used, read), responses=False) or "")
