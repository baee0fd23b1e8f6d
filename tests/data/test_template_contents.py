"""Records are refused unless their text contains all of the messages: content, reasoning, calls of tools, switches, date."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_jax.data import (
    Comparison,
    Demonstration,
    Encoded,
    EncodedPair,
    Message,
    Prompt,
    Skipped,
    Template,
    encode_comparison,
    encode_demonstration,
    encode_prompt,
    render_prompt,
    render_response,
    unread_keys,
    writes_date,
)
from rlhf_jax.data.row_problems import UnusableRecord
from rlhf_jax.data.turn_tokens import LossOn
from rlhf_jax.errors import InputError
from rlhf_jax.testing import byte_tokenizer

BODY = "{{ m['content'] }}"


def chatml(body: str = BODY, end: str = "") -> str:
    """A template that writes ``body`` of every message."""
    return (
        "{% for m in messages %}<" + "{{ m['role'] }}>" + body + "<|eos|>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>" + end + "{% endif %}"
    )


def user(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def learned(record: Demonstration, chat_template: str, loss_on: LossOn = "response") -> str:
    tokenizer = byte_tokenizer(chat_template)
    item = encode_demonstration(record, tokenizer, Template(), max_length=999, loss_on=loss_on)
    assert isinstance(item, Encoded)
    return tokenizer.decode([token for token, counts in zip(item.tokens, item.loss_mask, strict=True) if counts])


THOUGHT = "<think>17 and 5 more is 22</think>22"
STRIPS = chatml("{{ m['content'].split('</think>')[-1] }}")


@pytest.mark.parametrize(
    "body",
    [
        "{{ m['content'].split('</think>')[-1] }}",
        "{{ m['content'] | replace('<think>', '') }}",
        "{{ m['content'][:12] }}",
        "{{ m['content'] | truncate(12) }}",
    ],
)
@pytest.mark.parametrize("end", ["", "<think>"])
def test_a_response_is_learned_as_the_data_has_it(body: str, end: str) -> None:
    """A template that writes a part of it only puts it in a frame; where the prompt begins a thought, so must the data."""
    assert learned(Demonstration("d", user("q"), THOUGHT), chatml(body, end)) == THOUGHT.removeprefix(end) + "<|eos|>"
    tokenizer = byte_tokenizer(chatml(body, end))
    record = Comparison("c", user("q"), THOUGHT, "<think>no</think>a long way")
    pair = encode_comparison(record, tokenizer, Template(), max_length=999)
    assert isinstance(pair, EncodedPair)
    assert tokenizer.decode(pair.chosen.tokens) == f"<user>q<|eos|>\n<assistant>{THOUGHT}<|eos|>"


@pytest.mark.parametrize(
    "body",
    [
        "{{ m['content'] | upper }}",
        "{{ m['role'] }}",
        "<think></think>{{ m['content'].split('</think>')[-1] }}",
        "{% if 'think' in m['content'] %}x{% else %}y{{ m['content'] }}{% endif %}",
    ],
)
def test_a_response_without_a_frame_is_refused(body: str) -> None:
    refused = "leaves out (the content of a response|what the assistant says)"
    with pytest.raises(InputError, match=refused):
        learned(Demonstration("d", user("q"), THOUGHT), chatml(body))


def test_a_prompt_may_begin_the_response() -> None:
    """Qwen 3.5 ends a prompt with "<think>", and writes the thought of a response itself: the rest of it is learned."""
    body = (
        "{% if m['role'] == 'assistant' and not m['content'].startswith('<think>') %}<think></think>{% endif %}" + BODY
    )
    assert learned(Demonstration("d", user("q"), THOUGHT), chatml(body, "<think>")) == f"{THOUGHT[7:]}<|eos|>"


def test_what_ends_a_conversation_ends_no_turn_inside() -> None:
    """Phi-3 writes its EOS after the last turn only."""
    chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|pad|>\n{% endfor %}" + (
        "{% if add_generation_prompt %}<assistant>{% else %}<|eos|>{% endif %}"
    )
    record = Demonstration("d", (*user("q"), Message("assistant", "a"), *user("r")), "b")
    assert learned(record, chat_template, "assistant") == "a<|pad|>b<|pad|>"


def test_outer_white_space_may_go() -> None:
    record = Demonstration("d", user("q"), f"  {THOUGHT}\n")
    assert learned(record, chatml("{{ m['content'] | trim }}")) == f"{THOUGHT}<|eos|>"


def test_a_changed_turn_matters_only_where_it_is_a_target() -> None:
    """Templates of reasoning models drop the thoughts of earlier turns, for a sampler too; but nobody can learn them then."""
    talk = (*user("q"), Message("assistant", THOUGHT), *user("r"))
    record = Demonstration("d", talk, "plain")
    assert learned(record, STRIPS) == "plain<|eos|>"
    with pytest.raises(UnusableRecord, match="content of a turn .assistant."):
        learned(record, STRIPS, "assistant")
    with pytest.raises(UnusableRecord, match="content of a turn .assistant."):
        learned(record, STRIPS, "all")
    quiet = Demonstration("d", (*talk[:1], Message("assistant", THOUGHT, learned=False), *talk[2:]), "plain")
    assert learned(quiet, STRIPS, "assistant") == "plain<|eos|>"


def test_weights_reach_the_mask() -> None:
    talk = (
        *user("q"),
        Message("assistant", "Quito.", learned=False),
        *user("r"),
        Message("assistant", "Lima."),
        *user("s"),
    )
    record = Demonstration("d", talk, "Peru.")
    assert learned(record, chatml(), "assistant") == "Lima.<|eos|>Peru.<|eos|>"
    text_of_all = learned(record, chatml(), "all")
    expected = "\n<user>r<|eos|>\n<assistant>Lima.<|eos|>\n<user>s<|eos|>\n<assistant>Peru.<|eos|>"
    assert "Quito" not in text_of_all and text_of_all.endswith(expected)
    last = Demonstration("d", talk, "Peru.", learned=False)
    assert learned(last, chatml(), "assistant") == "Lima.<|eos|>"
    tokenizer = byte_tokenizer(chatml())
    skipped = encode_demonstration(last, tokenizer, Template(), max_length=999)
    assert skipped == Skipped("the response has weight 0")


def test_an_end_token_of_the_data_is_written_once() -> None:
    talk = (*user("q"), Message("assistant", "a<|eos|>"), *user("r"))
    record = Demonstration("d", talk, "b<|eos|>")
    assert learned(record, chatml(), "assistant") == "a<|eos|>b<|eos|>"


REASONS = chatml("{% if m.get('reasoning_content') %}<think>{{ m['reasoning_content'] }}</think>{% endif %}" + BODY)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_learned_or_refused(key: str) -> None:
    record = Demonstration("d", user("q"), "Lima.", keys={key: "seat of government"})
    assert learned(record, REASONS) == "<think>seat of government</think>Lima.<|eos|>"
    with pytest.raises(UnusableRecord, match="leaves out reasoning_content of a response"):
        learned(record, chatml())
    history = Demonstration("d", (*user("q"), Message("assistant", "a", {key: "why"}), *user("r")), "b")
    assert learned(history, REASONS) == "b<|eos|>"
    with pytest.raises(UnusableRecord, match="does not read reasoning_content"):
        learned(history, chatml())


CALL = {"type": "function", "id": "c1", "function": {"name": "order_state", "arguments": {"order": 77, "in": "Zürich"}}}
CALLS = chatml(
    "{{ m['content'] }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}({{ c.function.arguments | tojson }})"
    "{% endfor %}"
)


def called(content: str | None, call: dict[str, Any] = CALL) -> Message:
    keys: dict[str, Any] = {"tool_calls": [call]} | ({"content": None} if content is None else {})
    return Message("assistant", content or "", keys)


@pytest.mark.parametrize("content", [None, "", "One moment."])
def test_calls_and_results_of_tools_are_written(content: str | None) -> None:
    talk = (*user("Where is it?"), called(content), Message("tool", "left the depot", {"tool_call_id": "c1"}))
    template = CALLS.replace("{{ m['content'] }}", "{{ m['content'] if m['content'] is defined else '' }}")
    tokenizer = byte_tokenizer(template)
    data = [
        {"role": "user", "content": "Where is it?"},
        {"role": "assistant", "content": content, "tool_calls": [CALL]},
        {"role": "tool", "content": "left the depot", "tool_call_id": "c1"},
    ]
    prompt = render_prompt(talk, tokenizer, Template())
    assert prompt == tokenizer.apply_chat_template(data, tokenize=False, add_generation_prompt=True)
    assert "order_state" in prompt and "left the depot" in prompt
    response = Demonstration("d", talk[:1], content or "", keys=talk[1].keys)
    expected = f'{content or ""}<call>order_state({{"order": 77, "in": "Zürich"}})<|eos|>'
    assert learned(response, template) == expected


def test_arguments_of_a_call_may_be_a_text_of_json() -> None:
    function = CALL["function"] | {"arguments": '{"order":77}'}  # type: ignore[operator]
    record = Demonstration("d", user("q"), "", keys={"tool_calls": [CALL | {"function": function}]})
    as_text = chatml("{{ m['content'] }}{{ m.tool_calls[0].function if m.tool_calls }}")
    assert "order_state" in learned(record, as_text)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ((called(""), *user("And now?")), "leaves out tool_calls"),
        ((called(""), Message("tool", "left the depot")), "leaves out tool_calls"),
        ((Message("tool", "left the depot"),), "leaves out the message of a tool"),
    ],
)
def test_what_a_template_ignores_is_refused(messages: tuple[Message, ...], reason: str) -> None:
    ignores = "{% for m in messages %}{% if m['role'] != 'tool' %}{{ m['content'] }}{% endif %}{% endfor %}"
    with pytest.raises(UnusableRecord, match=reason):
        encode_prompt(Prompt("p", (*user("q"), *messages)), byte_tokenizer(ignores), Template(), max_prompt_length=99)
    for style in ("plain", "raw"):
        with pytest.raises(UnusableRecord, match=f"style '{style}'"):
            render_prompt((*user("q"), *messages), byte_tokenizer(), Template(style=style))  # type: ignore[arg-type]


TOOL = {"type": "function", "function": {"name": "order_state", "parameters": {"type": "object"}}}


def test_tools_are_written_or_refused() -> None:
    writes = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + chatml()
    record = Demonstration("d", user("q"), "r", tools=(TOOL,))
    assert learned(record, writes) == "r<|eos|>"
    assert '"name": "order_state"' in render_prompt(record.prompt, byte_tokenizer(writes), Template(), record.tools)
    with pytest.raises(UnusableRecord, match="leaves out the tools"):
        learned(record, chatml())
    with pytest.raises(UnusableRecord, match="style 'plain' does not write tools"):
        encode_demonstration(record, byte_tokenizer(), Template(style="plain"), max_length=99)


def test_keys_that_nothing_reads_are_listed() -> None:
    message = Message("user", "q", {"name": "Ann", "mood": "good", "tool_call_id": None})
    tokenizer = byte_tokenizer(chatml("{{ m.name }}" + BODY))
    assert unread_keys([message, message], tokenizer, Template()) == {"mood": 2}
    assert unread_keys([message], tokenizer, Template(style="plain")) == {"name": 1, "mood": 1}


SWITCH = chatml(end="{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}")


def test_arguments_reach_the_template() -> None:
    tokenizer = byte_tokenizer(SWITCH)
    assert render_prompt(user("q"), tokenizer, Template()).endswith("<assistant>")
    off = Template(arguments={"enable_thinking": False})
    assert render_prompt(user("q"), tokenizer, off).endswith("<assistant><think></think>")
    with pytest.raises(InputError, match="reads no 'enable_thinkin'; it reads enable_thinking"):
        render_prompt(user("q"), tokenizer, Template(arguments={"enable_thinkin": False}))


@pytest.mark.parametrize("response", ["Oak.", "<thicket>", "assistant", " x <think></think>"])
def test_a_response_follows_the_prompt_that_is_sampled(response: str) -> None:
    """The prompt ends with an empty thought that the template leaves out of a conversation: a sampler continues it."""
    tokenizer = byte_tokenizer(SWITCH)
    off = Template(arguments={"enable_thinking": False})
    item = encode_demonstration(Demonstration("d", user("q"), response), tokenizer, off, max_length=999)
    assert isinstance(item, Encoded)
    assert tokenizer.decode(item.tokens) == f"<user>q<|eos|>\n<assistant><think></think>{response}<|eos|>"
    prompt = encode_prompt(Prompt("p", user("q")), tokenizer, off, max_prompt_length=999)
    assert item.tokens[: item.prompt_length] == prompt


def test_a_response_without_the_thought_that_is_begun_is_refused() -> None:
    """After "<think>" a sampler writes a thought: an answer there would be learned as one."""
    with pytest.raises(UnusableRecord, match="not prefix-stable"):
        learned(Demonstration("d", user("q"), "Oak."), chatml(end="<think>"))


@pytest.mark.parametrize(
    "fields",
    [
        {"arguments": ["a"]},
        {"arguments": {"messages": []}},
        {"arguments": {"a": object()}},
        {"arguments": {"a": float("nan")}},
        {"arguments": {"a": 1}, "style": "plain"},
        {"date": "yesterday"},
        {"date": 20261130},
        {"date": "2026-11-30", "style": "raw"},
        {"special_tokens": "both"},
    ],
)
def test_fields_are_checked(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"Template\."):
        Template(**fields)


def test_the_date_is_the_templates() -> None:
    dated = "{{ strftime_now('%d %b %Y') }}" + chatml()
    tokenizer = byte_tokenizer(dated)
    assert writes_date(tokenizer, Template()) and not writes_date(byte_tokenizer(chatml()), Template())
    assert not writes_date(tokenizer, Template(style="plain"))
    assert render_prompt(user("q"), tokenizer, Template(date="2024-07-26")).startswith("26 Jul 2024<user>")
    with pytest.raises(InputError, match=r"set Template\.date"):
        render_prompt(user("q"), tokenizer, Template())


@pytest.mark.parametrize("chat_template", [5, ["x"], "{% if %}", {"other": "x"}])
def test_a_damaged_chat_template_is_an_input_error(chat_template: Any) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chat_template
    with pytest.raises(InputError) as caught:
        render_response(user("q"), "r", tokenizer, Template())
    assert "\n" not in str(caught.value)
