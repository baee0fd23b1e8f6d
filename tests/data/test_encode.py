"""The boundary between prompt and response in tokens, the targets of the loss, and records that do not fit."""

from __future__ import annotations

from collections import Counter

import pytest
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from rlhf_jax.data import (
    Comparison,
    Demonstration,
    Encoded,
    Message,
    Prompt,
    Skipped,
    Template,
    encode_all,
    encode_comparison,
    encode_demonstration,
    encode_prompt,
    report,
    truncate_by_lines,
)
from rlhf_jax.errors import InputError
from rlhf_jax.testing import byte_tokenizer

RAW = Template(style="raw")
CHATML = (
    "{% for message in messages %}<{{ message.role[0] }}>{{ message.content }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
WITH_BOS = "<|bos|>" + CHATML


def user(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def character_tokenizer(*, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a character, and the merge "ab". ids: a 0, b 1, c 2, x 3, ab 4, end = padding 5, bos 6."""
    vocab = {"a": 0, "b": 1, "c": 2, "x": 3, "ab": 4, "<e>": 5, "<s>": 6}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<e>", pad_token="<e>", bos_token="<s>")
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", 6)]
        )
    return tokenizer


def demonstration(prompt: str = "xa", response: str = "bc") -> Demonstration:
    return Demonstration("d", user(prompt) if prompt else (), response)


def require_encoded(result: Encoded | Skipped) -> Encoded:
    assert isinstance(result, Encoded)
    return result


def test_boundary_never_merges() -> None:
    """ "xa" + "bc" is [x ab c] when tokenised together: the mask could not say where the reply begins."""
    tokenizer = character_tokenizer()
    assert tokenizer("xabc")["input_ids"] == [3, 4, 2]
    encoded = require_encoded(encode_demonstration(demonstration(), tokenizer, RAW, max_length=10))
    assert encoded == Encoded([3, 0, 1, 2, 5], [False, False, True, True, True], 2, 0, "d")


def test_padding_equal_to_end_keeps_the_end_in_the_loss() -> None:
    tokenizer = character_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 5
    encoded = require_encoded(encode_demonstration(demonstration(), tokenizer, RAW, max_length=10))
    assert encoded.tokens[-1] == 5 and encoded.loss_mask[-1]


def test_loss_on_all_leaves_out_the_first_token_only() -> None:
    encoded = require_encoded(
        encode_demonstration(demonstration(), character_tokenizer(), RAW, max_length=10, loss_on="all")
    )
    assert encoded.loss_mask == [False, True, True, True, True]
    plain = require_encoded(encode_demonstration(demonstration(prompt=""), character_tokenizer(), RAW, max_length=10))
    assert plain == Encoded([1, 2, 5], [False, True, True], 0, 0, "d")


def test_chat_counts_every_response_through_its_end_token() -> None:
    """<u>a<|eos|>\\n<a>  b<|eos|>  \\n<u>c<|eos|>\\n<a>  d<|eos|>: the "\\n" after a reply is nobody's to learn."""
    tokenizer = byte_tokenizer(CHATML)
    record = Demonstration("d", (*user("a"), Message("assistant", "b"), Message("user", "c")), "d")
    last = require_encoded(encode_demonstration(record, tokenizer, Template(), max_length=99))
    every = require_encoded(encode_demonstration(record, tokenizer, Template(), max_length=99, loss_on="assistant"))
    assert tokenizer.decode(last.tokens) == "<u>a<|eos|>\n<a>b<|eos|>\n<u>c<|eos|>\n<a>d<|eos|>"
    assert every.tokens == last.tokens and every.prompt_length == last.prompt_length == len(last.tokens) - 2

    def counted(encoded: Encoded) -> list[str]:
        targets = zip(encoded.tokens, encoded.loss_mask, strict=True)
        return [tokenizer.decode([token]) for token, counts in targets if counts]

    assert counted(last) == ["d", "<|eos|>"]
    assert counted(every) == ["b", "<|eos|>", "d", "<|eos|>"]


@pytest.mark.parametrize("template", [Template(), Template(style="plain"), RAW])
def test_prompt_of_a_demonstration_is_what_a_sampler_continues(template: Template) -> None:
    tokenizer = byte_tokenizer(CHATML)
    encoded = require_encoded(encode_demonstration(demonstration("tell me", "no"), tokenizer, template, max_length=99))
    prompt = encode_prompt(Prompt("p", user("tell me")), tokenizer, template, max_prompt_length=99)
    assert encoded.tokens[: encoded.prompt_length] == prompt
    assert encoded.tokens.count(tokenizer.eos_token_id) == (2 if template.style == "chat" else 1)
    assert encoded.tokens[encoded.prompt_length :].count(tokenizer.eos_token_id) == 1


def test_bos_comes_exactly_once() -> None:
    def first(tokenizer: PreTrainedTokenizerFast, template: Template) -> list[int]:
        encoded = require_encoded(encode_demonstration(demonstration(), tokenizer, template, max_length=99))
        assert encoded.tokens.count(tokenizer.bos_token_id) <= 1
        return encoded.tokens[:1]

    assert first(character_tokenizer(), RAW) == [3]
    assert first(character_tokenizer(adds_bos=True), RAW) == [6]
    assert first(character_tokenizer(adds_bos=True), Template(style="raw", bos="never")) == [3]
    assert first(character_tokenizer(), Template(style="raw", bos="always")) == [6]
    chat = byte_tokenizer(WITH_BOS)
    for bos in ("auto", "always", "never"):
        assert first(chat, Template(bos=bos)) == [chat.bos_token_id]  # type: ignore[arg-type]
    with pytest.raises(InputError, match="two beginning-of-sequence tokens"):
        first(byte_tokenizer("<|bos|>" + WITH_BOS), Template())
    with pytest.raises(InputError, match="no beginning-of-sequence token"):
        silent = character_tokenizer()
        silent.bos_token = None
        first(silent, Template(style="raw", bos="always"))


def test_end_token_comes_exactly_once() -> None:
    tokenizer = character_tokenizer()
    encoded = require_encoded(encode_demonstration(demonstration(response="bc<e>"), tokenizer, RAW, max_length=9))
    assert encoded.tokens == [3, 0, 1, 2, 5]
    inside = encode_demonstration(demonstration(response="b<e>c"), tokenizer, RAW, max_length=9)
    assert inside == Skipped("end token inside the response")
    assert encode_demonstration(demonstration(response="<e>"), tokenizer, RAW, max_length=9) == Skipped(
        "response is empty"
    )


def test_stop_token_other_than_eos() -> None:
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.content }}<|pad|>\n{% endfor %}")
    record = demonstration("q", "r")
    explicit = require_encoded(encode_demonstration(record, tokenizer, Template(stop_token="<|pad|>"), max_length=9))
    assert tokenizer.decode(explicit.tokens) == "q<|pad|>\nr<|pad|>"
    assert require_encoded(encode_demonstration(record, tokenizer, Template(), max_length=9)) == explicit
    with pytest.raises(InputError, match="'end' is 3 tokens, not one"):
        encode_demonstration(record, tokenizer, Template(stop_token="end"), max_length=9)
    plain = Template(style="plain", prompt_format="{prompt}")
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end-of-sequence token"):
        encode_demonstration(record, tokenizer, plain, max_length=9)


def test_overflow_of_the_prompt() -> None:
    tokenizer = character_tokenizer(adds_bos=True)
    record = demonstration("xxcca", "bc")  # bos x x c c a | b c end: 9 tokens
    fits = require_encoded(encode_demonstration(record, tokenizer, RAW, max_length=9))
    assert len(fits.tokens) == 9 and fits.prompt_cut == 0
    assert encode_demonstration(record, tokenizer, RAW, max_length=8) == Skipped("prompt too long")
    cut = require_encoded(encode_demonstration(record, tokenizer, RAW, max_length=6, overflow="keep_end"))
    assert cut == Encoded([6, 2, 0, 1, 2, 5], [False, False, False, True, True, True], 3, 3, "d")
    # One prompt token must stay for the reply to be predicted from, and the reply is never cut.
    one = require_encoded(encode_demonstration(record, tokenizer, RAW, max_length=4, overflow="keep_end"))
    assert one.tokens == [0, 1, 2, 5] and one.loss_mask == [False, True, True, True]
    assert encode_demonstration(record, tokenizer, RAW, max_length=3, overflow="keep_end") == Skipped(
        "response too long"
    )


def test_overflow_drops_oldest_turns() -> None:
    tokenizer = byte_tokenizer(CHATML)
    talk = (Message("system", "s"), *user("old" * 9), Message("assistant", "b"), *user("c"), Message("assistant", "d"))
    record = Demonstration("d", (*talk, *user("e")), "f")
    whole = require_encoded(encode_demonstration(record, tokenizer, Template(), max_length=200))
    cut = require_encoded(encode_demonstration(record, tokenizer, Template(), max_length=60, overflow="drop_oldest"))
    assert tokenizer.decode(cut.tokens).startswith("<s>s<|eos|>\n<u>c<|eos|>\n<a>d<|eos|>\n<u>e")
    assert cut.prompt_cut == len(whole.tokens) - len(cut.tokens) > 0
    assert encode_demonstration(record, tokenizer, Template(), max_length=10, overflow="drop_oldest") == Skipped(
        "prompt too long"
    )


def test_a_response_that_was_cut_off_gets_no_end_token() -> None:
    """PPO scores its cut replies without one; with one, a reward model could not learn that stopping matters."""
    tokenizer = character_tokenizer()
    pair = encode_comparison(Comparison("c", user("xa"), "b", "cc", rejected_ended=False), tokenizer, RAW, max_length=9)
    assert not isinstance(pair, Skipped)
    assert pair.chosen.tokens == [3, 0, 1, 5] and pair.rejected.tokens == [3, 0, 2, 2]
    assert pair.rejected.loss_mask == [False, False, True, True]
    # A template that writes the end token itself: nothing from it on stays.
    chat = byte_tokenizer(CHATML)
    for ended, text in ((True, "<u>q<|eos|>\n<a>r<|eos|>"), (False, "<u>q<|eos|>\n<a>r")):
        record = Demonstration("d", user("q"), "r", ended)
        assert (
            chat.decode(require_encoded(encode_demonstration(record, chat, Template(), max_length=99)).tokens) == text
        )


def test_first_token_of_a_promptless_comparison_is_no_target() -> None:
    """Nothing stands before it that could predict it, as in a demonstration."""
    pair = encode_comparison(Comparison("c", (), "bc", "c"), character_tokenizer(), RAW, max_length=9)
    assert not isinstance(pair, Skipped)
    assert pair.chosen == Encoded([1, 2, 5], [False, True, True], 0, 0, "c")
    assert pair.rejected == Encoded([2, 5], [False, True], 0, 0, "c")


def test_both_sides_of_a_comparison_share_their_prompt() -> None:
    tokenizer = character_tokenizer()
    record = Comparison("c", user("xcxa"), "b", "bccc", 0.5)
    pair = encode_comparison(record, tokenizer, RAW, max_length=7, overflow="keep_end")
    assert not isinstance(pair, Skipped)
    assert pair.chosen == Encoded([3, 0, 1, 5], [False, False, True, True], 2, 2, "c")
    assert pair.rejected == Encoded([3, 0, 1, 2, 2, 2, 5], [False] * 2 + [True] * 5, 2, 2, "c")
    assert pair.margin == 0.5
    assert encode_comparison(record, tokenizer, RAW, max_length=7) == Skipped("prompt too long")
    same = Comparison("c", user("x"), "b", "b<e>")
    assert encode_comparison(same, tokenizer, RAW, max_length=9) == Skipped("chosen equals rejected")


def test_encode_prompt_overflow_and_emptiness() -> None:
    tokenizer = character_tokenizer()
    record = Prompt("p", user("xcab"))
    assert encode_prompt(record, tokenizer, RAW, max_prompt_length=3) == [3, 2, 4]
    assert encode_prompt(record, tokenizer, RAW, max_prompt_length=2) == Skipped("prompt too long")
    assert encode_prompt(record, tokenizer, RAW, max_prompt_length=2, overflow="keep_end") == [2, 4]
    assert encode_prompt(Prompt("p", ()), tokenizer, RAW, max_prompt_length=2) == Skipped("prompt is empty")


def test_wrong_options() -> None:
    with pytest.raises(InputError, match="loss_on = 'prompt'"):
        encode_demonstration(demonstration(), character_tokenizer(), RAW, max_length=9, loss_on="prompt")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="max_length = 1"):
        encode_demonstration(demonstration(), character_tokenizer(), RAW, max_length=1)
    with pytest.raises(InputError, match="max_prompt_length = 0"):
        encode_prompt(Prompt("p", user("x")), character_tokenizer(), RAW, max_prompt_length=0)
    with pytest.raises(InputError, match="overflow = 'cut'"):
        encode_prompt(Prompt("p", user("x")), character_tokenizer(), RAW, max_prompt_length=9, overflow="cut")  # type: ignore[arg-type]


def test_encode_all_counts_and_keeps_records_parallel() -> None:
    records = [demonstration("x" * n) for n in (1, 9, 2)]
    result = encode_all(records, lambda record: encode_demonstration(record, character_tokenizer(), RAW, max_length=6))
    assert [item.prompt_length for item in result.items] == [1, 2]
    assert result.records == [records[0], records[2]]
    assert result.dropped == Counter({"prompt too long": 1})
    with pytest.raises(InputError, match=r"no example left to learn from: prompt too long \(1\)"):
        encode_all(records[1:2], lambda record: encode_prompt(record, character_tokenizer(), RAW, max_prompt_length=8))


def test_truncate_by_lines_cuts_lines_then_characters() -> None:
    def form(post: str) -> str:
        return f"POST: {post}\n\nTL;DR:"  # 14 characters besides the post

    # 3 lines: "aaaa\nbbbb\ncccc" is 14 characters, 28 with the format; without the last line 23.
    assert truncate_by_lines(form, "aaaa\nbbbb\ncccc", 28, list) == "aaaa\nbbbb\ncccc"  # type: ignore[arg-type]
    assert truncate_by_lines(form, "aaaa\nbbbb\ncccc", 25, list) == "aaaa\nbbbb"  # type: ignore[arg-type]
    assert truncate_by_lines(form, "abcdefgh", 17, list) == "abc"  # type: ignore[arg-type]
    with pytest.raises(InputError, match="does not fit in 14 tokens"):
        truncate_by_lines(form, "abc", 14, list)  # type: ignore[arg-type]


def test_report() -> None:
    documents = [Encoded([1] * n, [False] + [True] * (n - 1), 1, cut) for n, cut in ((2, 0), (4, 3), (6, 0), (8, 0))]
    assert report(documents, {"prompt too long": 2}) == {
        "examples": 4.0,
        "tokens": 20.0,
        "length/mean": 5.0,
        "length/p50": 6.0,
        "length/p90": 8.0,
        "length/p99": 8.0,
        "length/p100": 8.0,
        "loss_fraction": 16 / 20,
        "prompts_cut": 1.0,
        "dropped/prompt too long": 2.0,
    }
    with pytest.raises(InputError, match="no encoded example"):
        report([])
