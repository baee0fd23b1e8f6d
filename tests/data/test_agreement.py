"""Two forms of conversations agree when they render the same text."""

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
    ("learned", "current"),
    [
        (form(PLAIN), form(PLAIN, None)),  # a plain format does not read the chat template
        (form(Template()), form(Template())),
        (form(Template()), form(Template(stop_token="<|eos|>"))),  # the same end of a response
        (form(PLAIN), form(Template(style="plain", prompt_format="{prompt}", bos="never"))),  # neither writes a BOS
        (form(RAW), form(Template(style="raw", bos="never"))),
        (form(PLAIN), form(Template(), chat_template_of(PLAIN, byte_tokenizer()))),  # an export served as a chat model
    ],
)
def test_forms_with_the_same_text_agree(learned: Form, current: Form) -> None:
    assert form_difference(learned, current, responses=True) is None


@pytest.mark.parametrize(
    ("learned", "current", "words"),
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
        ),  # no chat template to compare
    ],
)
def test_differences_of_the_text_are_described(learned: Form, current: Form, words: str) -> None:
    for responses in (False, True):
        assert words in (form_difference(learned, current, responses=responses) or "")


def test_only_the_prompts_of_a_policy_are_compared() -> None:
    """A base model trained on raw texts can answer a prompt of "{prompt}"; it writes responses as in its training."""
    assert form_difference(form(RAW), form(PLAIN), responses=False) is None
    assert "Template.style was 'raw'" in (form_difference(form(RAW), form(PLAIN), responses=True) or "")


def test_the_date_is_not_compared() -> None:
    dated = "{{ strftime_now('%d %b %Y') }}" + CHATML
    learned, current = Template(date="2026-01-31"), Template(date="2026-11-30")
    assert form_difference(form(learned, dated), form(current, dated), responses=True) is None
    assert form_difference(form(learned, dated), form(Template(), dated), responses=True) is None
    thinking = Template(arguments={"enable_thinking": False})
    read = CHATML + "{{ enable_thinking }}"
    assert "Template.arguments was" in (
        form_difference(form(thinking, read), form(current, read), responses=False) or ""
    )
