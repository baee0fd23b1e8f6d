"""A simulated annotator who compares two replies, with a taste that can be wrong on purpose.

The annotator's utility of a reply with gold score ``g`` (its true quality), ``w`` words and flattery or not is

    u = gold_scale * g + length_taste * min(w, length_cap) / length_cap + flattery_taste * [flatters]

and the first reply is preferred with probability sigmoid(u_1 - u_2) (Bradley & Terry 1952), after which the label is
flipped with probability ``noise``. With tastes above zero, labels reward what the gold score does not, so that a policy
optimised against a reward model learned from them can be seen to over-optimise (Gao et al. 2023, arXiv 2210.10760).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_jax.errors import InputError


@dataclass(frozen=True)
class AnnotatorConfig:
    """All in nats of preference, except ``noise`` (a probability below 0.5) and ``length_cap`` (words).

    At the defaults a perfect reply beats one of gold 0.5 (same length, no flattery) with probability
    0.95 * sigmoid(2.5) + 0.05 * sigmoid(-2.5) = 0.88.
    """

    gold_scale: float = 5.0
    length_taste: float = 0.5
    flattery_taste: float = 0.5
    length_cap: int = 60
    noise: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("gold_scale", "length_taste", "flattery_taste", "noise"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise InputError(f"AnnotatorConfig.{name} = {value!r}: must be a finite number")
        for name, least in (("length_cap", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"AnnotatorConfig.{name} = {value!r}: must be an integer >= {least}")
        if self.gold_scale < 0:
            raise InputError(f"AnnotatorConfig.gold_scale = {self.gold_scale!r}: must be >= 0")
        if not 0.0 <= self.noise < 0.5:
            raise InputError(f"AnnotatorConfig.noise = {self.noise!r}: must be in [0, 0.5); 0.5 would be a coin")


@dataclass(frozen=True)
class Reply:
    """A text to compare and its gold score (in [0, 1] for the gold_scale's meaning; any finite number works).

    ended: False when it was cut off; the gold score knows, the label carries it along.
    """

    text: str
    gold: float
    ended: bool = True

    def __post_init__(self) -> None:
        if not math.isfinite(self.gold):
            raise InputError(f"Reply.gold = {self.gold!r}: must be finite")


@dataclass(frozen=True)
class Labels:
    """comparisons: rows as `label` gives them, in the order of the pairs, without the dropped.

    dropped: pairs of identical texts, which cannot be compared. agreement: how often the label follows the higher gold
    score, over the pairs whose scores differ (NaN when there are none).
    """

    comparisons: list[dict[str, Any]]
    dropped: int
    agreement: float


def utility(config: AnnotatorConfig, reply: Reply, flatters: Callable[[str], bool]) -> float:
    """What the annotator feels about a reply (equation in the module's docstring)."""
    length = min(len(reply.text.split()), config.length_cap) / config.length_cap
    flattery = float(flatters(reply.text))
    return config.gold_scale * reply.gold + config.length_taste * length + config.flattery_taste * flattery


def preference_probability(config: AnnotatorConfig, first: float, second: float) -> float:
    """P(the first is labelled as preferred) of two utilities, flips included. Example: equal utilities give 0.5."""
    # tanh form of the sigmoid: no overflow whatever the difference.
    preferred = 0.5 * (1.0 + math.tanh(0.5 * (first - second)))
    return preferred * (1.0 - config.noise) + (1.0 - preferred) * config.noise


def prefers_first(
    config: AnnotatorConfig, prompt_id: str, first: Reply, second: Reply, flatters: Callable[[str], bool]
) -> bool:
    """The label of one pair: a fixed function of (seed, prompt id, the two replies), whichever is shown first."""
    if second.text < first.text:
        return not prefers_first(config, prompt_id, second, first, flatters)
    probability = preference_probability(config, utility(config, first, flatters), utility(config, second, flatters))
    return _uniform(config.seed, prompt_id, first.text, second.text) < probability


def label(
    config: AnnotatorConfig, row: tuple[str, Any], pair: tuple[Reply, Reply], flatters: Callable[[str], bool]
) -> dict[str, Any] | None:
    """``{"id", "prompt", "chosen", "rejected", "chosen_ended", "rejected_ended"}``.

    row: (prompt id, prompt: text or messages). None for identical texts.
    """
    prompt_id, prompt = row
    first, second = pair
    if first.text == second.text:
        return None
    chosen, rejected = pair if prefers_first(config, prompt_id, first, second, flatters) else (second, first)
    texts = {"chosen": chosen.text, "rejected": rejected.text}
    return {"id": prompt_id, "prompt": prompt, **texts, "chosen_ended": chosen.ended, "rejected_ended": rejected.ended}


def label_pairs(
    config: AnnotatorConfig,
    rows: Iterable[tuple[str, Any]],
    pairs: Iterable[tuple[Reply, Reply]],
    flatters: Callable[[str], bool],
) -> Labels:
    """Labels a pair of replies for each (prompt id, prompt text); both iterables have one length (else ValueError)."""
    comparisons: list[dict[str, Any]] = []
    dropped = agreed = decided = 0
    for row, pair in zip(rows, pairs, strict=True):
        comparison = label(config, row, pair, flatters)
        if comparison is None:
            dropped += 1
            continue
        comparisons.append(comparison)
        if pair[0].gold != pair[1].gold:
            decided += 1
            agreed += comparison["chosen"] == max(pair, key=lambda reply: reply.gold).text
    return Labels(comparisons, dropped, agreed / decided if decided else math.nan)


def _uniform(seed: int, *key: str) -> float:
    """A number in [0, 1) that depends on nothing but the key."""
    # The lengths keep the keys ("ab", "c") and ("a", "bc") apart.
    text = "".join(f"{len(part)}:{part}" for part in (str(seed), *key))
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return float(np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).random())
