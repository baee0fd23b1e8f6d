"""Settings of sampling and of the slots of continuous batching."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import UnionType
from typing import get_args

from rlhf_jax.errors import InputError, require_number, require_whole
from rlhf_jax.models import Storage

SMALLEST_TEMPERATURE = 1e-6


def _is_number(value: object, kind: type | UnionType = int | float) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """The settings of sampling.

    temperature: 0 = greedy.
    top_k: keep the k most likely tokens; 0 = off.
    top_p: keep the most likely tokens whose probability reaches top_p; 1 = off.
    max_new_tokens: largest response length.
    min_p: keep tokens at least min_p times as likely as the most likely one; 0 = off.
    repetition_penalty: make tokens of prompt and response less likely; 1 = off.
    min_new_tokens: number of tokens before which a stop token is barred, counted as in transformers: a response that ends with
    a stop token has at least one token more. A stop string completed earlier does not end the response (in transformers it
    does).
    stop_strings: texts that end a response, with the token that completes one of them. A response also ends at a stop token of
    tokenizer and template.

    top_k, top_p, min_p and repetition_penalty change the distribution that is sampled, which biases the ratio of PPO; leave
    them off there.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 64
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and 0 <= self.temperature < float("inf")):
            raise InputError(f"SamplingConfig.temperature = {self.temperature!r}: give a number >= 0")
        if 0 < self.temperature < SMALLEST_TEMPERATURE:
            raise InputError(
                f"SamplingConfig.temperature = {self.temperature!r}: logits divided by it are infinite in float32; give 0 "
                f"(greedy), or at least {SMALLEST_TEMPERATURE:g}"
            )
        if not _is_number(self.top_k, int) or self.top_k < 0:
            raise InputError(f"SamplingConfig.top_k = {self.top_k!r}: give a whole number >= 0 (0 = off)")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise InputError(f"SamplingConfig.top_p = {self.top_p!r}: give a number in (0, 1]")
        if not _is_number(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise InputError(f"SamplingConfig.max_new_tokens = {self.max_new_tokens!r}: give a whole number >= 1")
        if not _is_number(self.min_p) or not 0 <= self.min_p <= 1:
            raise InputError(f"SamplingConfig.min_p = {self.min_p!r}: give a number in [0, 1]")
        if not (_is_number(self.repetition_penalty) and 0 < self.repetition_penalty < float("inf")):
            raise InputError(f"SamplingConfig.repetition_penalty = {self.repetition_penalty!r}: give a number > 0")
        if not _is_number(self.min_new_tokens, int) or not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise InputError(
                f"SamplingConfig.min_new_tokens = {self.min_new_tokens!r}: give a whole number in [0, max_new_tokens]"
            )
        for name in ("top_k", "max_new_tokens", "min_new_tokens"):
            require_whole(f"SamplingConfig.{name}", getattr(self, name), 0)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            require_number(f"SamplingConfig.{name}", getattr(self, name), 0.0)
        strings = self.stop_strings
        if not (isinstance(strings, list | tuple) and all(isinstance(string, str) and string for string in strings)):
            raise InputError(f"SamplingConfig.stop_strings = {strings!r}: give a list of strings, none of them empty")
        object.__setattr__(self, "stop_strings", tuple(strings))  # gin gives lists; a static argument must be hashable


@dataclasses.dataclass(frozen=True)
class SlotConfig:
    """Settings of continuous batching; the sampled tokens do not depend on them.

    slots: rows of the decode step (0 = one per completion); a completion that has ended frees its slot for the next.
    prefill: prompts read together to fill free slots (0 = as many as fill all). refill_at: number of free slots at
    which the next completions enter.
    smallest: when no completion waits, running completions are moved together into half as many slots, repeatedly while
    at least this many remain (0 = never; each halving compiles the decode step once more).
    prefill_chunk: columns of the prompts read at a time (0 = all): for prompts too long for attention scores of all
    columns to all.
    shared_prefix: the number of first tokens that are the same in all prompts (a system prompt) and are read once per
    call.
    ring_stages: when no completion waits for a slot, the cache begins with 1/ring_stages of the response columns and
    grows by as many when they are full, so that short responses do not attend over columns for long ones (each stage
    compiles the decode step once more).
    cache: keys and values stored in the model's "compute" dtype, as "bfloat16", or as "int8" with a scale for each
    vector: half to a quarter of the memory, with errors of log-probabilities in docs/performance.md.
    separate_layers: decode with a copy of the weights, layer by layer, in the layout for products with few rows: faster
    on a CPU and not on a TPU; compiles a decode step of all layers instead of one, and stores the weights twice.
    """

    slots: int = 0
    prefill: int = 0
    refill_at: int = 1
    smallest: int = 0
    prefill_chunk: int = 0
    shared_prefix: int = 0
    ring_stages: int = 1
    cache: Storage = "compute"
    separate_layers: bool = False

    def __post_init__(self) -> None:
        for name in ("slots", "prefill", "refill_at", "smallest", "prefill_chunk", "shared_prefix", "ring_stages"):
            least = 1 if name in ("refill_at", "ring_stages") else 0
            value = getattr(self, name)
            require_whole(f"SlotConfig.{name}", value, least)
        if self.cache not in get_args(Storage):
            raise InputError(f"SlotConfig.cache = {self.cache!r}: one of {', '.join(map(repr, get_args(Storage)))}")
        if not isinstance(self.separate_layers, bool):
            raise InputError(f"SlotConfig.separate_layers = {self.separate_layers!r}: give True or False")
        if self.slots and self.refill_at > self.slots:
            raise InputError(
                f"SlotConfig.refill_at = {self.refill_at}: more than SlotConfig.slots = {self.slots} are never free"
            )


def check_shared_prompts(prompts: Sequence[Sequence[int]], slots: SlotConfig) -> None:
    """Raise InputError when two prompts differ in their first ``slots.shared_prefix`` tokens, or one has no more than these.

    prompts: token ids without padding.
    """
    length = slots.shared_prefix
    for number, prompt in enumerate(prompts if length else ()):
        if len(prompt) <= length or list(prompt[:length]) != list(prompts[0][:length]):
            why = f"has {len(prompt)} tokens" if len(prompt) <= length else "begins with other tokens than prompt 0"
            raise InputError(
                f"SlotConfig.shared_prefix = {length}: prompt {number} {why}; set it to what all share, or 0"
            )


ALL_AT_ONCE = SlotConfig()
"""A slot for every completion."""
