"""The rows of benchmark.py, the shape of the model, the work in FLOPs and the protocol, shared by all sides.

Only the standard library is imported, because each side runs in an interpreter of its own.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """name: as in --rows. unit: what is counted. meaning: what runs once. peers: sides that have the row beside ours."""

    name: str
    unit: str
    meaning: str
    peers: tuple[str, ...] = ()


ROWS = (
    Row("sft", "tokens", "SFT step, 8 x 256", ("torch", "trl")),
    Row(
        "sft_ragged",
        "useful tokens",
        "SFT step of 16 documents with the lengths of GSM8K: ours packed into rows of 512, the others padded",
        ("torch", "trl"),
    ),
    Row("generate", "new tokens", "16 prompts x 64, 128 new tokens each", ("torch",)),
    Row(
        "generate_ragged",
        "useful tokens",
        "64 prompts x 64, replies of 8..128 (each token ends one with probability 1/60): ours on 16 slots, HF's 16 at a time",
        ("torch",),
    ),
    Row("rm", "pairs", "reward model step, 8 pairs x 256", ("torch", "trl")),
    Row("rm_ragged", "pairs", "reward model step, 8 pairs of the lengths of GSM8K, padded", ("torch", "trl")),
    Row("dpo", "pairs", "DPO step with its reference, 8 pairs x 256 (64 of them the prompt)", ("trl",)),
    Row("ppo", "iterations", "PPO iteration, 16 x (64 + 64), four 135M models, 4 epochs of one step", ("trl_ppo",)),
    Row(
        "ppo_ragged",
        "iterations",
        "the same, replies of 8..64 (each token ends one with probability 1/20); TRL samples all 64 and cuts",
        ("trl_ppo",),
    ),
    Row("grpo", "iterations", "GRPO iteration, 4 prompts x 4 replies (64 + 64), no reference, one step", ("trl",)),
    Row(
        "grpo_ragged", "iterations", "the same, replies of 8..64 (each token ends one with probability 1/20)", ("trl",)
    ),
    Row("grpo_judged", "iterations", "as grpo, with a judge elsewhere that takes 4 s for the replies of an iteration"),
    Row("grpo_ahead", "iterations", "the same, the next rollout sampled meanwhile (run.one_step_off)"),
)
"""The table in order. A new row: a line here, and a function of its name in benchmark_jax.py and in each peer's script."""

PEERS = {"torch": "benchmark_torch.py", "trl": "benchmark_trl.py", "trl_ppo": "benchmark_trl.py"}
"""Peer -> its script. trl_ppo: TRL up to 0.2x, the last that had a PPO trainer."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a Llama with tied embeddings."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int

    def forward_flops(self, context: float, *, head: bool = True) -> float:
        """Count the operations of a token: two for every weight of a matrix product, and attention over ``context`` keys."""
        layer = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads) + 3 * self.hidden * self.ffn
        weights = self.layers * layer + head * self.vocab * self.hidden
        return 2.0 * weights + 4.0 * self.layers * self.heads * self.head_dim * context

    def causal_flops(self, length: int, *, head: bool = True) -> float:
        """Count the operations of a sequence."""
        return length * self.forward_flops(length / 2, head=head)

    def sampling_flops(self, prompts: int, prompt: int, new: float) -> float:
        """Count the operations of reading ``prompts`` prompts and sampling ``new`` tokens in all."""
        read = prompts * self.causal_flops(prompt, head=False)
        return read + new * self.forward_flops(prompt + new / prompts / 2)

    def dpo_flops(self) -> float:
        """Count the operations of the row "dpo":

        16 rows of 256 tokens with logits of the 192 behind the prompt, also for the reference.
        """
        with_head = 192 * 2.0 * self.vocab * self.hidden
        return 4 * 16 * (self.causal_flops(256, head=False) + with_head)

    def _replies_flops(self, new: float) -> float:
        """Count the operations of reading 16 prompts of 64 tokens and ``new`` tokens of responses, which have logits."""
        return 16 * self.causal_flops(64, head=False) + new * self.forward_flops(64 + new / 32)

    def ppo_flops(self, new: float) -> float:
        """Count the operations of the rows "ppo" with ``new`` sampled tokens.

        These are sampler and reference, value and reward model, and four updates of policy and value model.
        """
        forward = self._replies_flops(new)
        trunk = forward - new * (self.forward_flops(0) - self.forward_flops(0, head=False))
        return 2 * forward + 2 * trunk + 4 * 3 * (forward + trunk)

    def grpo_flops(self, new: float) -> float:
        """Count the operations of the rows "grpo" with ``new`` sampled tokens: sampling after 4 prompts, and one update."""
        sampler = self.sampling_flops(4, 64, 0) + new * self.forward_flops(64 + new / 32)
        return sampler + 3 * self._replies_flops(new)


SHAPES = {
    "smollm2": Sizes(vocab=49152, hidden=576, layers=30, heads=9, kv_heads=3, head_dim=64, ffn=1536),
    "tiny": Sizes(vocab=1200, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=128),
}

GSM8K = (109, 153, 140, 107, 371, 411, 145, 268, 112, 166, 196, 144, 286, 207, 313, 252)
"""Tokens of 16 of GSM8K's questions with their answers, in SmolLM2's chat template (numpy default_rng(0).choice of all
7,473, whose quartiles are 144, 183 and 234)."""


def stops(sizes: Sizes, one_in: int) -> tuple[int, ...]:
    """Return the ids that end a response: of a model with random weights one token in ``one_in``."""
    return tuple(range(20, sizes.vocab, one_in))


Once = Callable[[], tuple[float, float]]
"""Runs a row once: (how much of its unit, FLOPs)."""


def serve(once: Once, **facts: Any) -> None:
    """Report on a line of JSON that the row is ready, and run it once for every line on stdin. Called when it is warm."""
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        began, cpu = time.perf_counter(), time.process_time()
        amount, flops = once()
        report(time.perf_counter() - began, time.process_time() - cpu, amount, flops)


def report(seconds: float, cpu_seconds: float, amount: float, flops: float) -> None:
    """Print one repetition as a line of JSON."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = {"seconds": seconds, "cpu_seconds": cpu_seconds, "amount": amount, "flops": flops, "peak_bytes": memory}
    print(json.dumps(line), flush=True)
