"""How messages become text: the tokenizer's chat template, a plain format, or the text as it is.

A rendering is a text in which special tokens that a message only quotes are marked (``quotes``). What a template leaves
out is never learned silently: the content of every message that is a target must be in the text, or the record is unusable.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jinja2 import TemplateError

from rlhf_jax.data import sandbox
from rlhf_jax.data.quotes import Quotes, unmarked
from rlhf_jax.data.records import Message
from rlhf_jax.data.row_problems import UnusableRecord
from rlhf_jax.data.special_tokens import quotes_of
from rlhf_jax.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STYLES = ("chat", "plain", "raw")
_PLAIN_FIELDS = ("prompt_format", "system_format", "response_prefix", "turn_end")
_OURS = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception")
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's reasoning, as transformers knows them: a template that reads one reads them all."""
_PROBE = (Message("user", "1"), Message("assistant", "2"), Message("user", "3"))
_QUOTES: weakref.WeakKeyDictionary[Any, dict[tuple[int, str, str], Quotes]] = weakref.WeakKeyDictionary()
"""Of tokenizers, by all that they depend on: every record asks."""


@dataclass(frozen=True)
class Template:
    """How a conversation is written down. style: "chat" renders with ``tokenizer.chat_template``, "plain" with the
    formats below, "raw" takes texts as they are.

    Fields of style "plain" (setting them with another style is an error):
    prompt_format: a user turn with the header of the response; "{prompt}" stands for its content.
    system_format: a system message; "{system}" stands for its content.
    response_prefix: what a response begins with; not doubled when it is there already (TL;DR responses begin with " ").
    turn_end: what follows a response that is not the last.
    With prompt_format="\\n\\nHuman: {prompt}\\n\\nAssistant:" and turn_end="" the text is an hh-rlhf dialogue.

    Fields of style "chat":
    arguments: variables of the chat template, {"enable_thinking": False}.
    date: what a chat template that writes the date writes, "2026-11-30". None: programs take the date of the run's first
    start, or of the model's training, and keep it with the model.

    Fields of every style:
    bos: when the rendering has no beginning-of-sequence token, "auto" puts one first if the tokenizer does so by
    itself,
    "always" puts one first, "never" adds none.
    stop_token: the token that ends a response. None: the special token that the chat template writes after a response
    ("<end_of_turn>"), and the tokenizer's EOS where it writes none (`data.ends`).
    special_tokens: what a special token in the text of a message becomes: "text", tokens of ordinary text, or "control",
    the special token. None: "text"; with style "raw", whose texts may be renderings, records with one are unusable.
    """

    style: Literal["chat", "plain", "raw"] = "chat"
    prompt_format: str = "Question: {prompt}\nAnswer:"
    system_format: str = "{system}\n\n"
    response_prefix: str = " "
    turn_end: str = "\n\n"
    bos: Literal["auto", "always", "never"] = "auto"
    stop_token: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)
    date: str | None = None
    special_tokens: Literal["text", "control"] | None = None

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise InputError(f"Template.style = {self.style!r}: must be one of {', '.join(STYLES)}")
        if self.bos not in ("auto", "always", "never"):
            raise InputError(f"Template.bos = {self.bos!r}: must be 'auto', 'always' or 'never'")
        if self.special_tokens not in (None, "text", "control"):
            raise InputError(f"Template.special_tokens = {self.special_tokens!r}: must be 'text', 'control' or None")
        for name, place in (("prompt_format", "{prompt}"), ("system_format", "{system}")):
            value = getattr(self, name)
            if not isinstance(value, str) or value.count(place) != 1:
                raise InputError(f"Template.{name} = {value!r}: must hold {place} exactly once")
        for name in _PLAIN_FIELDS:
            if not isinstance(getattr(self, name), str):
                raise InputError(f"Template.{name} = {getattr(self, name)!r}: must be text")
            if self.style != "plain" and getattr(self, name) != getattr(type(self), name):
                raise InputError(
                    f"Template.{name} has no effect with style {self.style!r}; unset it or use style='plain'"
                )
        self._check_chat_fields()

    def _check_chat_fields(self) -> None:
        if not isinstance(self.arguments, dict) or not all(isinstance(name, str) for name in self.arguments):
            raise InputError(f"Template.arguments = {self.arguments!r}: must be variables by name, {{'name': value}}")
        for name in _OURS:
            if name in self.arguments:
                raise InputError(f"Template.arguments: {name!r} is set for every conversation; leave it out")
        try:
            json.dumps(self.arguments, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"Template.arguments = {self.arguments!r}: must be values of JSON ({error})") from None
        if self.date is not None:
            parse_date(self.date)
        for name in ("arguments", "date"):
            if self.style != "chat" and getattr(self, name):
                raise InputError(f"Template.{name} has no effect with style {self.style!r}; unset it")


class Turn(NamedTuple):
    """An assistant turn inside a prompt. begin, end: of what the model writes there, in characters of the prompt's text."""

    message: Message
    begin: int
    end: int


class _Format(NamedTuple):
    """A tokenizer's way to write messages, as ``template`` asks."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    tools: Sequence[Mapping[str, Any]]
    quotes: Quotes


def render_prompt(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Write the text up to where a response begins. Raises InputError when the template cannot render these messages."""
    return unmarked(prompt_rendering(messages, tokenizer, template, tools))


def render_reply(
    messages: Sequence[Message],
    reply: str | Message,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Write the text of a response after ``render_prompt(messages)``, with the chat template's own end of turn.

    Raises InputError for a template that rewrites earlier turns, or that leaves something of the response out.
    """
    return unmarked(response_rendering(messages, reply, tokenizer, template, tools))


def render_conversation(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    template: Template | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Write a whole conversation with the chat template, nothing to follow. Raises InputError as `render_prompt` does."""
    return unmarked(_chat(messages, _format(tokenizer, template or Template(), tools), generation=False))


def quotes_for(
    tokenizer: PreTrainedTokenizerBase, template: Template, tools: Sequence[Mapping[str, Any]] = ()
) -> Quotes:
    """Find what messages only quote when ``template`` writes them."""
    return _format(tokenizer, template, tools).quotes


def prompt_rendering(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """``render_prompt`` with its quotes marked."""
    form = _format(tokenizer, template, tools)
    if template.style == "chat":
        text = _chat(messages, form, generation=True)
        _check_tools(messages, form, unmarked(text))
        return text
    return "".join(text for text, _ in _plain_turns(messages, form))


def response_rendering(
    messages: Sequence[Message],
    response: str | Message,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """``render_reply`` with its quotes marked. The conversation is rendered with and without the response, whose text is
    the difference."""
    form = _format(tokenizer, template, tools)
    message = Message("assistant", response) if isinstance(response, str) else response
    if template.style == "chat":
        text = _chat_response(messages, message, form)
    else:
        text = _plain_response(message, form)
    check_written(message, text, "response")
    return text


def turns_of(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[Turn]:
    """Find the assistant turns in ``render_prompt(messages)``. Raises InputError when later turns change the text of one."""
    form = _format(tokenizer, template, tools)
    if template.style != "chat":
        return _plain_spans(messages, form)
    whole = _chat(messages, form, generation=True)
    turns = []
    for index, message in enumerate(messages):
        if message.role == "assistant":
            before = _chat(messages[:index], form, generation=True)
            after = _chat(messages[: index + 1], form, generation=False)
            _remainder(after, before, tokenizer)
            _remainder(whole, after, tokenizer)
            turns.append(Turn(message, len(unmarked(before)), len(unmarked(after))))
    return turns


def check_written(message: Message, rendering: str, what: str) -> None:
    """Raises UnusableRecord when ``rendering`` lacks something that ``message`` says."""
    text = unmarked(rendering)
    remedy = "use a template that writes messages whole, or style='plain'"
    if message.content.strip() not in text:
        raise UnusableRecord(f"the template changes or leaves out the content of a {what}", remedy)
    if _reasoning(message).strip() not in text:
        raise UnusableRecord(f"the template leaves out reasoning_content of a {what}", remedy)
    if not all(_is_written(value, text) for value in _leaves(message.keys.get("tool_calls") or [])):
        raise UnusableRecord(f"the template leaves out tool_calls of a {what}", remedy)


def unread_keys(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: Template) -> list[str]:
    """List the keys of ``messages`` that nothing reads, once for each message that has one."""
    source = str(tokenizer.chat_template) if template.style == "chat" else ""
    keys = [key for message in messages for key, value in message.keys.items() if value is not None]
    return [key for key in keys if not _reads(source, key)]


def writes_date(tokenizer: PreTrainedTokenizerBase, template: Template) -> bool:
    """Whether the text of a conversation depends on ``Template.date``. Raises InputError for a damaged chat template."""
    if template.style != "chat" or not tokenizer.chat_template:
        return False
    sources = tokenizer.chat_template
    return any(
        "strftime_now" in _variables(tokenizer, source)
        for source in (sources.values() if isinstance(sources, dict) else [sources])
    )


def parse_date(text: str) -> datetime.date:
    """Raises InputError."""
    try:
        return datetime.date.fromisoformat(text)
    except (TypeError, ValueError):
        raise InputError(f"Template.date = {text!r}: must be a date in quotes, '2026-11-30'") from None


# ---- chat templates


def _format(tokenizer: PreTrainedTokenizerBase, template: Template, tools: Sequence[Mapping[str, Any]]) -> _Format:
    known = _QUOTES.setdefault(tokenizer, {})
    key = (len(tokenizer), str(tokenizer.chat_template), repr(template))
    if key not in known:
        known[key] = _quotes(tokenizer, template)
    return _Format(tokenizer, template, tools, known[key])


def _quotes(tokenizer: PreTrainedTokenizerBase, template: Template) -> Quotes:
    """What messages only quote, with this template."""
    if template.style != "chat" or not tokenizer.chat_template:
        return quotes_of(tokenizer, _plain_texts(template), _plain_texts(template))
    sources = tokenizer.chat_template
    literals = "\0".join(
        _literals(tokenizer, source) for source in (sources.values() if isinstance(sources, dict) else [sources])
    )
    nothing = _Format(tokenizer, template, (), quotes_of(tokenizer, "", ""))
    for messages in (_PROBE, _PROBE[:1]):
        try:
            return quotes_of(tokenizer, literals, unmarked(_chat(messages, nothing, generation=False)))
        except UnusableRecord:
            continue
    return quotes_of(tokenizer, literals, literals)


def _chat(messages: Sequence[Message], form: _Format, *, generation: bool) -> str:
    tokenizer, template = form.tokenizer, form.template
    source = _source(form)
    unknown = sorted(template.arguments.keys() - _variables(tokenizer, source))
    if unknown:
        reads = ", ".join(sorted(_variables(tokenizer, source) - set(_OURS) - set(tokenizer.special_tokens_map)))
        raise InputError(
            f"Template.arguments: the chat template reads no {unknown[0]!r}; "
            + (f"it reads {reads}" if reads else "it reads none, unset it")
        )
    variables = {
        **tokenizer.special_tokens_map,
        **template.arguments,
        "messages": [_as_data(message, form) for message in messages],
        "tools": _marked(list(form.tools), form, is_response=False) if form.tools else None,
        "documents": None,
        "add_generation_prompt": generation,
    }
    date = None if template.date is None else parse_date(template.date)
    try:
        return sandbox.render(source, variables, date)
    except TemplateError as error:
        roles = ", ".join(message.role for message in messages) or "no messages"
        raise UnusableRecord(
            f"{_name(tokenizer)}: chat template refuses [{roles}] ({error})", "use style='plain'"
        ) from None


def _chat_response(messages: Sequence[Message], message: Message, form: _Format) -> str:
    """What a chat template writes of a response, after the prompt that a sampler continues.

    Some templates put an empty "<think></think>" at the end of a prompt and leave it out of a conversation: the response
    is then what follows the header that both have.
    """
    prompt = _chat(messages, form, generation=True)
    full = _chat([*messages, message], form, generation=False)
    before = "" if full.startswith(prompt) else _chat(messages, form, generation=False)
    if before and full.startswith(before) and prompt.startswith(before):
        header, rest = prompt[len(before) :], full[len(before) :]
        content = str(_marked(message.content, form, is_response=True))
        shared = len(os.path.commonprefix([header, rest]))  # noqa: RUF071  (of characters, as meant)
        begin = rest.rfind(content, 0, shared + len(content)) if content.strip() else -1
        if begin >= 0 and header.startswith(rest[:begin]) and _closes_its_tags(header[begin:]):
            return rest[begin:]
    return _remainder(full, prompt, form.tokenizer)


def _closes_its_tags(text: str) -> bool:
    """Whether ``text`` is whole: "<think></think>" is, and after "<think>" a thought is to follow."""
    opened, closed = (sorted(re.findall(pattern, text)) for pattern in (r"<(\w+)>", r"</(\w+)>"))
    return opened == closed


def _source(form: _Format) -> str:
    tokenizer = form.tokenizer
    if not tokenizer.chat_template:
        raise InputError(
            f"{_name(tokenizer)} has no chat template; use Template(style='plain') or a tokenizer with one"
        )
    try:
        source = tokenizer.get_chat_template(tools=[dict(tool) for tool in form.tools] or None)
    except ValueError as error:
        raise InputError(f"{_name(tokenizer)}: {' '.join(str(error).split())}") from None
    if not isinstance(source, str):
        raise InputError(f"{_name(tokenizer)}: chat_template is {type(source).__name__}, not text; correct the file")
    return source


def _variables(tokenizer: PreTrainedTokenizerBase, source: Any) -> frozenset[str]:
    return frozenset(_asked(tokenizer, source, sandbox.variables_of))


def _literals(tokenizer: PreTrainedTokenizerBase, source: Any) -> str:
    return str(_asked(tokenizer, source, sandbox.literals_of)) if source else ""


def _asked(tokenizer: PreTrainedTokenizerBase, source: Any, ask: Any) -> Any:
    if not isinstance(source, str):
        raise InputError(f"{_name(tokenizer)}: chat_template is {type(source).__name__}, not text; correct the file")
    try:
        return ask(source)
    except TemplateError as error:
        raise InputError(f"{_name(tokenizer)}: chat template cannot be read ({error}); correct it") from None


def _as_data(message: Message, form: _Format) -> dict[str, Any]:
    """A message as a chat template reads it: every key of the data, without null values, the quotes in it marked."""
    data = {"role": message.role, "content": message.content} | dict(message.keys)
    if reasoning := _reasoning(message):
        data = {"thinking": reasoning} | data | {"reasoning_content": reasoning}
    present = {key: value for key, value in data.items() if value is not None}
    return dict(_marked(present, form, is_response=message.role == "assistant"))


def _marked(value: Any, form: _Format, *, is_response: bool) -> Any:
    return value if form.template.special_tokens == "control" else form.quotes.mark(value, is_response=is_response)


def _remainder(full: str, beginning: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if not full.startswith(beginning):
        at = next((i for i, (a, b) in enumerate(zip(full, beginning, strict=False)) if a != b), len(full))
        before, after = (unmarked(text[at : at + 20]) for text in (beginning, full))
        raise UnusableRecord(
            f"{_name(tokenizer)}: chat template is not prefix-stable: adding a turn changes the text before it",
            f"from {before!r} to {after!r}: use style='plain' or a template that only appends",
        )
    return full[len(beginning) :]


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r}"


# ---- what a template writes of a message


def _reasoning(message: Message) -> str:
    value = next((message.keys[name] for name in _REASONING if message.keys.get(name) is not None), "")
    return value if isinstance(value, str) else json.dumps(value)


def _check_tools(messages: Sequence[Message], form: _Format, text: str) -> None:
    """Raises UnusableRecord for tools, calls of tools, results of tools and reasoning that the chat template ignores."""
    source = _source(form)
    remedy = "use a chat template that writes it, or remove it from the data"
    if any(_reasoning(message) for message in messages) and not _reads(source, _REASONING[0]):
        raise UnusableRecord("the chat template does not read reasoning_content", remedy)
    names = [leaf for tool in form.tools for leaf in _leaves(tool.get("function", tool).get("name"))]
    if not all(_is_written(name, text) for name in names) or (form.tools and not _reads(source, "tools")):
        raise UnusableRecord("the chat template leaves out the tools", remedy)
    for message in messages:
        calls = message.keys.get("tool_calls") or []
        if not all(_is_written(call.get("function", call).get("name"), text) for call in calls):
            raise UnusableRecord("the chat template leaves out tool_calls", remedy)
        if message.role == "tool" and not _is_written(message.content.strip(), text):
            raise UnusableRecord("the chat template leaves out the message of a tool", remedy)


def _reads(source: str, key: str) -> bool:
    names = _REASONING if key in _REASONING else (key,)
    return any(re.search(rf"\b{re.escape(name)}\b", source) for name in names)


def _leaves(value: Any) -> list[Any]:
    """The texts and numbers inside a JSON value, without ids and types of calls, which templates may leave out."""
    if isinstance(value, Mapping):
        return [leaf for key, item in value.items() if key not in ("id", "type") for leaf in _leaves(item)]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _leaves(item)]
    return [] if value is None or isinstance(value, bool) else [value]


def _is_written(value: Any, text: str) -> bool:
    """Whether a text or number stands in ``text``, as it is or as JSON writes it."""
    if not isinstance(value, str):
        return json.dumps(value) in text
    if value.strip() in text or any(json.dumps(value, ensure_ascii=ascii)[1:-1] in text for ascii in (False, True)):
        return True
    try:  # arguments of a call, a text of JSON, which a template may write anew
        inner = json.loads(value)
    except (ValueError, RecursionError):
        return False
    return isinstance(inner, dict | list) and all(_is_written(leaf, text) for leaf in _leaves(inner))


# ---- styles "plain" and "raw"


def _plain_texts(template: Template) -> str:
    return "\0".join(getattr(template, name) for name in _PLAIN_FIELDS) if template.style == "plain" else ""


def _plain_turns(messages: Sequence[Message], form: _Format) -> list[tuple[str, Message | None]]:
    """The texts of the turns, one after the other, each with its message where it is a response. No messages give no
    turns (plain text to learn from nothing)."""
    template = form.template
    _check_plain(messages, form)
    if template.style == "raw":
        if len(messages) > 1:
            raise UnusableRecord(f"style 'raw' takes one message, not {len(messages)}", "use style 'plain' or 'chat'")
        return [(_plain_content(message, form), None) for message in messages]
    turns = list(messages)
    texts: list[tuple[str, Message | None]] = []
    if turns and turns[0].role == "system":
        texts.append((template.system_format.replace("{system}", _plain_content(turns.pop(0), form)), None))
    roles = [message.role for message in turns]
    # user, assistant, user, ..., user: an odd number of turns that alternate
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2) or (
        messages and len(roles) % 2 == 0
    ):
        raise UnusableRecord(
            f"style 'plain': turns [{', '.join(roles)}] must alternate from user to user", "merge or use 'chat'"
        )
    for message in turns:
        if message.role == "user":
            texts.append((template.prompt_format.replace("{prompt}", _plain_content(message, form)), None))
        else:
            texts += [(_plain_response(message, form), message), (template.turn_end, None)]
    return texts


def _plain_spans(messages: Sequence[Message], form: _Format) -> list[Turn]:
    turns, at = [], 0
    for text, message in _plain_turns(messages, form):
        end = at + len(unmarked(text))
        if message is not None:
            turns.append(Turn(message, at, end))
        at = end
    return turns


def _plain_response(message: Message, form: _Format) -> str:
    _check_plain([message], form)
    prefix = "" if form.template.style == "raw" else form.template.response_prefix
    return ("" if message.content.startswith(prefix) else prefix) + _plain_content(message, form)


def _plain_content(message: Message, form: _Format) -> str:
    is_response = message.role == "assistant"
    text = str(_marked(message.content, form, is_response=is_response))
    if form.template.style == "raw" and form.template.special_tokens is None and text != message.content:
        raise UnusableRecord(
            "style 'raw': a text holds a special token",
            "set Template.special_tokens to 'text' (it is quoted there) or 'control' (the text is a rendering)",
        )
    return text


def _check_plain(messages: Sequence[Message], form: _Format) -> None:
    """Raises UnusableRecord for what only a chat template can write."""
    style, remedy = form.template.style, "use style 'chat', or remove it from the data"
    if form.tools:
        raise UnusableRecord(f"style {style!r} does not write tools", remedy)
    for message in messages:
        if message.role == "tool":
            raise UnusableRecord(f"style {style!r} does not write the message of a tool", remedy)
        for key in (*_REASONING, "tool_calls"):
            if message.keys.get(key):
                raise UnusableRecord(f"style {style!r} does not write {key}", remedy)
