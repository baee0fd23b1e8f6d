"""The tokenizer of the GGUF files that the tests write."""

from __future__ import annotations

import gguf

from rlhf_jax.testing import byte_tokenizer

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def write_tokenizer(writer: gguf.GGUFWriter) -> None:
    """Bytes, three special tokens and the merge "ab", as a converter of llama.cpp writes them."""
    vocabulary = byte_tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*sorted(vocabulary, key=vocabulary.__getitem__), "ab"])
    writer.add_token_types([3] * 3 + [1] * 257)
    writer.add_token_merges(["a b"])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
