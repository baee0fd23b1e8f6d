"""The chat template of an export, so that a served model formats conversations as it was trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_jax.data.templates import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_template_of(template: Template, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the chat template (Jinja text) to ship with a served model, or None when the tokenizer's own is right.

    Style "plain": a Jinja chat template that renders the text of `data.render_prompt`, begins with BOS where the encoder writes
    one, and refuses the conversations that the format refuses. Style "chat" with arguments: the tokenizer's own template with the
    arguments as defaults. Style "raw": None, for it has no conversations.
    """
    own = tokenizer.chat_template
    if template.style == "chat" and template.arguments and isinstance(own, str):
        return "".join(_default(name, value) for name, value in template.arguments.items()) + own
    if template.style != "plain":
        return None
    bos = tokenizer.bos_token if begins_with_bos(template, tokenizer) else None
    start = "" if bos is None else "{{ " + _literal(bos) + " }}"
    before, after = (_literal(part) for part in template.prompt_format.split("{prompt}"))
    ahead, behind = (_literal(part) for part in template.system_format.split("{system}"))
    prefix = _literal(template.response_prefix)
    system = (
        "{% if messages and messages[0]['role'] == 'system' %}{{ "
        + ahead
        + " + messages[0]['content'] + "
        + behind
        + " }}"
        "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}"
    )
    user = "{{ " + before + " + message['content'] + " + after + " }}"
    assistant = (
        "{% if not message['content'].startswith(" + prefix + ") %}{{ " + prefix + " }}{% endif %}"
        "{{ message['content'] }}{% if not loop.last %}{{ " + _literal(template.turn_end) + " }}{% endif %}"
    )
    order = _refusal(
        "(message['role'] == 'user') != (loop.index0 % 2 == 0) or message['role'] not in ['user', 'assistant']",
        "turns must alternate between user and assistant",
    )
    turns = (
        "{% for message in turns %}" + order + "{% if message['role'] == 'user' %}" + user + "{% else %}" + assistant
    )
    return start + system + turns + "{% endif %}{% endfor %}"


def begins_with_bos(template: Template, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the encoder writes a beginning-of-sequence token before a text that has none."""
    bos = tokenizer.bos_token_id
    tokenizer_adds = bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]
    return template.bos == "always" or (template.bos == "auto" and tokenizer_adds)


def _refusal(condition: str, words: str) -> str:
    return "{% if " + condition + " %}{{ raise_exception(" + _literal(words) + ") }}{% endif %}"


def _default(name: str, value: Any) -> str:
    """Write Jinja code that sets a variable to ``value`` where it is undefined."""
    return f"{{% if {name} is not defined %}}{{% set {name} = {_expression(value)} %}}{{% endif %}}"


def _expression(value: Any) -> str:
    """Write a JSON value as a Jinja expression."""
    if isinstance(value, str):
        return _literal(value)
    if isinstance(value, list):
        return "[" + ", ".join(map(_expression, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(str(name))}: {_expression(item)}" for name, item in value.items()) + "}"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _literal(text: str) -> str:
    """Write a string literal of Jinja, which reads Python's escapes."""
    return '"' + text.encode("unicode_escape").decode("ascii").replace('"', '\\"') + '"'
