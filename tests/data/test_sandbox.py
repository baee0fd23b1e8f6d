"""Chat templates as programs: the text that transformers makes of them, no end without a bound, no clock, no randomness."""

from __future__ import annotations

import datetime

import pytest
from jinja2 import TemplateError

from rlhf_jax.data import sandbox
from rlhf_jax.testing import byte_tokenizer

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " <b>hi</b> & {'a': 1} "},
    {
        "role": "assistant",
        "content": "yo",
        "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1, None, "é"]}}}],
    },
]
DAY = datetime.date(2026, 1, 2)


def render(source: str) -> str:
    return sandbox.render(source, {"messages": TALK, "tools": None, "add_generation_prompt": True}, DAY)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m['role'] ~ ': ' + m.content|trim }}{% if loop.last %}.{% endif %}\n{% endfor %}",
        "{%- for m in messages -%}\n  {%- generation -%}{{ m.content }}{%- endgeneration -%}\n  {% break %}{% endfor %}",
        "{{ messages[2].tool_calls | tojson }}{{ messages | tojson(indent=2) }}{{ messages[2] }}",
        "{% set ns = namespace(n=0, text='') %}{% for m in messages if m.role != 'user' %}{% set ns.n = ns.n + loop.index0 %}"
        "{% set ns.text = ns.text + m.content %}{% endfor %}{{ ns.n }} {{ ns.text }} {{ dict(a=[1, (2, none)]) }}",
        "{% macro turn(m) %}<{{ m.role }}>{{ caller() if caller else m.content }}{% endmacro %}"
        "{% for m in messages %}{{ turn(m) }}{% endfor %}{% call turn(messages[0]) %}inside{% endcall %}",
        "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join('|') }}{{ nothing }}"
        "{{ '%05d' | format(3) }}{{ '{:>5}'.format(4) }}{{ 'a-b'.split('-')[-1] * 3 }}{{ [1, 2][::-1] }}{{ 7 % 4 }}",
        "{% for key, value in messages[0].items() %}{{ key }}={{ value }}{% if not loop.last %}, {% endif %}{% endfor %}"
        "{% for a in [[1, [2, []]]] recursive %}{% if a is iterable %}({{ loop(a) }}){% else %}{{ a }}{% endif %}{% endfor %}",
        "{% set x %}{% for m in messages %}{{ loop.cycle('odd', 'even') }}{% endfor %}{% endset %}"
        "{{ x | upper | replace('O', '0') }}",
    ],
)
def test_the_text_is_that_of_transformers(source: str) -> None:
    reference = byte_tokenizer(source).apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert render(source) == reference


def test_the_date_is_the_one_that_is_asked_for() -> None:
    assert render("{{ strftime_now('%d %b %Y') }}") == "02 Jan 2026"
    with pytest.raises(TemplateError, match=r"set Template\.date"):
        sandbox.render("{{ strftime_now('%Y') }}", {}, None)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1 / 0 }}",
        "{% if %}",
        "{{ messages[99].role.name }}",
        "{{ messages.foo() }}",
        "{{ ''.__class__.__mro__ }}",
        "{% include '/etc/passwd' %}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{% block a %}{{ self.a() }}{% endblock %}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ raise_exception('\x1b[31mred\nsecond line') }}",
        "{{ messages | random }}",
        "{{ lipsum() }}",
        "{{ cycler }}",
        "{{ messages | map(attribute='role') }}",
        "{{ namespace(a=1) }}",
    ],
)
def test_any_failure_is_a_template_error_on_one_line(source: str) -> None:
    with pytest.raises(TemplateError) as caught:
        render(source)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro a(n) %}{% if n %}{{ a(n - 1) }}{{ a(n - 1) }}{% endif %}{% endmacro %}{{ a(60) }}",
        "{{ 'a' * 10 ** 11 }}",
        "{{ [0] * 10 ** 10 }}",
        "{{ 2 ** 100000000 }}",
        "{{ 'a' | center(10000000000) }}",
        "{{ 'a'.ljust(10 ** 10) }}",
        "{{ '\t'.expandtabs(10 ** 10) }}",
        "{{ '%1000000000d' | format(5) }}",
        "{{ '%*d' % (10 ** 9, 5) }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ '{:>{w}}'.format(1, w=10 ** 10) }}",
        "{{ messages | tojson(indent=10 ** 9) }}",
        "{{ (['a' * 10 ** 6] * 10 ** 4) | join }}",
        "{{ ([{'x': 'a' * 10 ** 6}] * 10 ** 4) | map(attribute='x') | join }}",
        "{{ ('a' * 10 ** 6).join(['b'] * 10 ** 5) }}",
        "{% set x = 'a' * 10 ** 5 %}{{ x.replace('a', x) }}",
        "{% set x = 'a' * 10 ** 5 %}{{ x | replace('a', x) }}",
        "{{ ('a\n' * 10 ** 6) | indent(9999) }}",
        "{{ ('ab ' * 10 ** 5) | wordwrap(1, wrapstring='x' * 10 ** 6) }}",
        "{{ 1.5 | round(10 ** 9) }}",
        "{{ [1] | batch(10 ** 9, 'x') | list }}",
        "{{ [1] | slice(10 ** 9) | list }}",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}"
        "{% set n.x = y %}{% endfor %}",
        "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x=[1, 2]) %}{% for i in range(60) %}{% set n.x = (n.x + n.x) | batch(2) | list %}{% endfor %}",
        "{% set n = namespace(x=10) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    ],
)
def test_a_template_without_end_is_stopped(source: str) -> None:
    with pytest.raises(sandbox.OutOfBounds):
        render(source)


def test_long_conversations_are_within_bounds() -> None:
    """A quadratic template over 1,000 turns, and a text of 30 million characters."""
    turns = [{"role": "user", "content": "x"}] * 1000
    source = "{% for m in messages %}{% for n in messages %}{% endfor %}{{ m.content }}{% endfor %}"
    assert sandbox.render(source, {"messages": turns}, DAY) == "x" * 1000
    long = "y" * 30_000_000
    assert len(sandbox.render("{{ text | trim }}", {"text": long}, DAY)) == len(long)


def test_what_a_template_reads_and_holds() -> None:
    source = "{% if thinking is defined %}<a>{{ '<b>' ~ messages[0].content }}{% endif %}"
    assert sandbox.variables_of(source) == {"thinking", "messages"}
    assert set(sandbox.literals_of(source).split("\0")) == {"<a>", "<b>"}
