"""A simulated annotator who compares two responses, with biases that can be set.

The annotator's utility of a response with gold score ``g`` (its true quality) and ``w`` words is

    u = gold_scale * g + length_taste * min(w, length_cap) / length_cap + flattery_taste * [flatters]

and the first response is preferred with probability sigmoid(u_1 - u_2) (Bradley & Terry 1952), after which the label is
flipped with probability ``noise``. With tastes above zero, the labels reward qualities that the gold score does not, so
that a policy trained against a reward model of these labels over-optimises (Gao et al. 2023, arXiv 2210.10760).
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
    """The utility and the noise of a simulated annotator.

    At the defaults a perfect response is preferred to one of gold 0.5 (same length, no flattery) with probability
    0.95 * sigmoid(2.5) + 0.05 * sigmoid(-2.5) = 0.88.

    gold_scale: nats of preference per unit of the gold score, >= 0.
    length_taste: nats of preference for a response of length_cap words or more over an empty one.
    flattery_taste: nats of preference for a response that flatters.
    length_cap: the number of words beyond which more length adds no utility, >= 1.
    noise: the probability that a label is flipped, below 0.5.
    seed: the seed of the labels, >= 0.
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
class AnnotatedResponse:
    """A response to compare.

    gold: its gold score, in [0, 1] for the meaning of gold_scale; any finite number works.
    ended: False when it was cut off. It does not change the preference; the label has it as chosen_ended or rejected_ended.
    """

    text: str
    gold: float
    ended: bool = True

    def __post_init__(self) -> None:
        if not math.isfinite(self.gold):
            raise InputError(f"AnnotatedResponse.gold = {self.gold!r}: must be finite")


@dataclass(frozen=True)
class Labels:
    """The labels of a list of pairs.

    comparisons: rows as `label` returns them, in the order of the pairs, without the dropped ones.
    dropped: the number of pairs of identical texts, which cannot be compared.
    agreement: the share of labels that prefer the higher gold score, of the pairs whose scores differ (NaN without any).
    """

    comparisons: list[dict[str, Any]]
    dropped: int
    agreement: float


def utility(config: AnnotatorConfig, response: AnnotatedResponse, flatters: Callable[[str], bool]) -> float:
    """Return the annotator's utility of a response, in nats (equation in the module's docstring)."""
    length = min(len(response.text.split()), config.length_cap) / config.length_cap
    flattery = float(flatters(response.text))
    return config.gold_scale * response.gold + config.length_taste * length + config.flattery_taste * flattery


def preference_probability(config: AnnotatorConfig, first: float, second: float) -> float:
    """Return P(the first is labelled as preferred) of two utilities, with flips. Example: equal utilities give 0.5."""
    # tanh form of the sigmoid: no overflow whatever the difference.
    preferred = 0.5 * (1.0 + math.tanh(0.5 * (first - second)))
    return preferred * (1.0 - config.noise) + (1.0 - preferred) * config.noise


def prefers_first(
    config: AnnotatorConfig,
    prompt_id: str,
    first: AnnotatedResponse,
    second: AnnotatedResponse,
    flatters: Callable[[str], bool],
) -> bool:
    """Return the label of one pair, which depends on the seed, the prompt id and the two texts but not on their order."""
    if second.text < first.text:
        return not prefers_first(config, prompt_id, second, first, flatters)
    probability = preference_probability(config, utility(config, first, flatters), utility(config, second, flatters))
    return _draw_uniform(config.seed, prompt_id, first.text, second.text) < probability


def label(
    config: AnnotatorConfig,
    row: tuple[str, Any],
    pair: tuple[AnnotatedResponse, AnnotatedResponse],
    flatters: Callable[[str], bool],
) -> dict[str, Any] | None:
    """Label a pair: ``{"id", "prompt", "chosen", "rejected", "chosen_ended", "rejected_ended"}``; None for identical texts.

    row: (prompt id, prompt: text or messages).
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
    pairs: Iterable[tuple[AnnotatedResponse, AnnotatedResponse]],
    flatters: Callable[[str], bool],
) -> Labels:
    """Label a pair of responses for each (prompt id, prompt). Raises ValueError when the iterables differ in length."""
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
            agreed += comparison["chosen"] == max(pair, key=lambda response: response.gold).text
    return Labels(comparisons, dropped, agreed / decided if decided else math.nan)


def _draw_uniform(seed: int, *key: str) -> float:
    """Draw a number in [0, 1) that depends on the seed and the key only."""
    # The lengths keep the keys ("ab", "c") and ("a", "bc") apart.
    text = "".join(f"{len(part)}:{part}" for part in (str(seed), *key))
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return float(np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).random())
