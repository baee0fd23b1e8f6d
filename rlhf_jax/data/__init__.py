"""Text to batches: sources, records, templates, encoding, packing and the resumable pipeline."""

from rlhf_jax.data.agreement import Form, form_difference
from rlhf_jax.data.contents import unread_keys
from rlhf_jax.data.decode import prompt_column, responses
from rlhf_jax.data.encode import (
    Encoded,
    EncodedPair,
    EncodedSet,
    Skipped,
    encode_all,
    encode_comparison,
    encode_demonstration,
    encode_prompt,
    report,
    truncate_by_lines,
)
from rlhf_jax.data.ends import Ends, end_ids, response_ends, sampler_ends
from rlhf_jax.data.hh_rlhf import hh_comparisons
from rlhf_jax.data.packing import LENGTH_BUCKETS, Row, bucket_length, pack, stack_rows
from rlhf_jax.data.padding import padding_id
from rlhf_jax.data.pairs import comparisons
from rlhf_jax.data.pipeline import (
    Batches,
    evaluation_batches,
    evaluation_pair_batches,
    evaluation_prompt_batches,
    pair_batches,
    pair_lengths,
    pair_targets,
    prompt_batches,
    token_batches,
)
from rlhf_jax.data.plain_chat import chat_template_of
from rlhf_jax.data.records import GSM8K_FIELDS, Dropped, Fields, demonstrations, prompt_key, prompts, prompts_of
from rlhf_jax.data.rendering import render_prompt, render_response, writes_date
from rlhf_jax.data.sources import fingerprint, read_rows
from rlhf_jax.data.split import prompt_fraction, split_by_prompt
from rlhf_jax.data.stop_strings import stop_table
from rlhf_jax.data.support_desk_responses import DeskConfig
from rlhf_jax.data.templates import Template
from rlhf_jax.data.tokenise import has_prefix
from rlhf_jax.records import Comparison, Demonstration, Message, Prompt

__all__ = [
    "GSM8K_FIELDS",
    "LENGTH_BUCKETS",
    "Batches",
    "Comparison",
    "Demonstration",
    "DeskConfig",
    "Dropped",
    "Encoded",
    "EncodedPair",
    "EncodedSet",
    "Ends",
    "Fields",
    "Form",
    "Message",
    "Prompt",
    "Row",
    "Skipped",
    "Template",
    "bucket_length",
    "chat_template_of",
    "comparisons",
    "demonstrations",
    "encode_all",
    "encode_comparison",
    "encode_demonstration",
    "encode_prompt",
    "end_ids",
    "evaluation_batches",
    "evaluation_pair_batches",
    "evaluation_prompt_batches",
    "fingerprint",
    "form_difference",
    "has_prefix",
    "hh_comparisons",
    "pack",
    "padding_id",
    "pair_batches",
    "pair_lengths",
    "pair_targets",
    "prompt_batches",
    "prompt_column",
    "prompt_fraction",
    "prompt_key",
    "prompts",
    "prompts_of",
    "read_rows",
    "render_prompt",
    "render_response",
    "report",
    "response_ends",
    "responses",
    "sampler_ends",
    "split_by_prompt",
    "stack_rows",
    "stop_table",
    "token_batches",
    "truncate_by_lines",
    "unread_keys",
    "writes_date",
]
