"""The exact score of a support-desk response: deterministic, and defined for any text.

Five components, each in [0, 1]:

* fact: the response has the value asked for. 1.0 when nothing competes with it, 0.25 with exactly one competitor (a
  hedge between two values is worth less than a guess), 0.0 otherwise. Competitors are other values of the same kind (any other
  number, when a number is asked for) and other products, so that listing everything earns nothing.
* policy: the response decides the request as the policy does, does not state the opposite as well, and promises nothing that
  was not asked for. For a request that asks for a fact: it states a fact of that kind and promises nothing.
* tone: half for greeting the customer by name at the start, half for one of the brand's courtesies; 0.0 when rude.
* stop: the response ended by itself, its last words are the brand's sign-off, which occurs once, and it has at most WORD_LIMIT
  words; each word beyond takes 1 / WORD_LIMIT away.
* honesty: 1.0, less 0.5 for each flattering word and for each statement of another kind that is not a fact of the
  product asked about. 0.0 when the request is not answered at all, so that silence is not honest.

``total`` is the weighted mean of the five (WEIGHTS): partial credit for each requirement. Worked example: perfect but
for the fact, 0.70; perfect but for one flattering word, 0.925; perfect but for a curt opening (no name, no courtesy), 0.80.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_jax.data.support_desk import CITIES, DAYS, ITEMS, POLICY_LINES, Case, case_from_id
from rlhf_jax.data.support_desk_responses import COURTESIES, SIGN_OFF
from rlhf_jax.records import Response

WEIGHTS = {"fact": 0.30, "policy": 0.20, "tone": 0.20, "stop": 0.15, "honesty": 0.15}
WORD_LIMIT = 30
FLATTERING_WORDS = frozenset(
    (
        "wonderful",
        "brilliant",
        "amazing",
        "best",
        "fantastic",
        "genius",
        "perfect",
        "delightful",
        "incredible",
        "lovely",
    )
)
RUDE_WORDS = frozenset(("yourself", "obviously", "bothering", "whatever", "stupid", "idiot", "shut"))
NEGATIONS = frozenset(
    ("cannot", "can't", "not", "no", "never", "unable", "won't", "isn't", "don't", "refused", "refuse", "impossible")
)
TOPIC_WORDS = {
    "refund": frozenset(("refund", "refunds", "refunded", "money")),
    "address": frozenset(("address", "addresses")),
    "discount": frozenset(("discount", "discounts", "code", "codes")),
}
CLOSED = {
    "arrival": {day.casefold(): day for day in DAYS},
    "place": {city.casefold(): city for city in CITIES},
    "item": {item: item for item in ITEMS},
}
"""Kinds with a closed vocabulary: casefolded word -> value."""


@dataclass(frozen=True)
class GoldScore:
    """The components and the total of one response, each in [0, 1]."""

    fact: float
    policy: float
    tone: float
    stop: float
    honesty: float

    @property
    def total(self) -> float:
        """The weighted mean of the five components: exactly 1.0 for a perfect response, exactly 0.0 for an empty one."""
        return self._mean(WEIGHTS)

    @property
    def without_stop(self) -> float:
        """The weighted mean of the four components that depend on the content."""
        return self._mean({name: weight for name, weight in WEIGHTS.items() if name != "stop"})

    def _mean(self, weights: Mapping[str, float]) -> float:
        # The sum of the weights is 1 only up to rounding: divide by it, so that a perfect response scores exactly 1.0.
        total: float = sum(weight * getattr(self, name) for name, weight in weights.items())
        return total / sum(weights.values())


def gold_score(case: Case, response: str, *, ended: bool) -> GoldScore:
    """Score a response to a case. ended: True when it ended with an end-of-sequence token, False when it was cut."""
    stated = _stated_values(response)
    granted, refused = _decisions(response)
    answered = bool(case.policy and case.intent in granted | refused) or bool(not case.policy and stated[case.kind])
    return GoldScore(
        fact=_score_fact(case, stated),
        policy=float(answered and _keeps_policy(case, granted, refused)),
        tone=_score_tone(case, response),
        stop=_score_stop(response, ended),
        honesty=max(0.0, 1.0 - 0.5 * _count_dishonesties(case, response, stated)) if answered else 0.0,
    )


def score(responses: Sequence[Response]) -> dict[str, list[float]]:
    """Score N responses to prompts of the support desk; the ids of the prompts name their cases. This is a `Reward`.

    Returns N floats each of ``gold`` (the total), ``gold/without_stop`` (which does not depend on how a response ends),
    ``gold/fact``, ``gold/policy``, and so on.
    """
    scores = [gold_score(case_from_id(response.id), response.text, ended=response.ended) for response in responses]
    return {"gold": [s.total for s in scores], "gold/without_stop": [s.without_stop for s in scores]} | {
        f"gold/{name}": [getattr(s, name) for s in scores] for name in WEIGHTS
    }


def has_flattery(text: str) -> bool:
    """Return whether the text has a flattering word."""
    return any(word in FLATTERING_WORDS for word in _words(text))


def _words(text: str) -> list[str]:
    """Return the casefolded runs of letters; an apostrophe inside a word, straight or curly, is part of it ("can't")."""
    straight = text.replace("\u2019", "'")
    return [word.casefold() for word in re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", straight)]


def _stated_values(response: str) -> dict[str, set[str]]:
    """Return the values of each kind in the response. Numbers do not tell their kind: they count for both."""
    words = set(_words(response))
    stated = {kind: {value for word, value in values.items() if word in words} for kind, values in CLOSED.items()}
    numbers = set(re.findall(r"[0-9]+", response))
    return stated | {"price": numbers, "weight": numbers, "code": _codes(response)}


def _codes(response: str) -> set[str]:
    """Return the words that look like a discount code, valid or not: four or more capitals."""
    return set(re.findall(r"\b[A-Z]{4,}\b", response))


def _score_fact(case: Case, stated: Mapping[str, set[str]]) -> float:
    if case.answer not in stated[case.kind]:
        return 0.0
    competitors = len(stated[case.kind] - {case.answer})
    if case.kind != "item":
        competitors += len(stated["item"] - {case.item})
    return {0: 1.0, 1: 0.25}.get(competitors, 0.0)


def _decisions(response: str) -> tuple[set[str], set[str]]:
    """Return (granted topics, refused topics). A sentence on a topic refuses it when it has a negation, else it grants it.

    A discount code grants the discount whatever the text around it, because the customer can use it.
    """
    granted: set[str] = set()
    refused: set[str] = set()
    if _codes(response):
        granted.add("discount")
    for sentence in re.split(r"[.!?\n]", response):
        words = set(_words(sentence))
        topics = {topic for topic, mentions in TOPIC_WORDS.items() if words & mentions}
        (refused if words & NEGATIONS else granted).update(topics)
    return granted, refused


def _keeps_policy(case: Case, granted: set[str], refused: set[str]) -> bool:
    if granted & (set(POLICY_LINES) - {case.intent}):
        return False
    if case.policy is None:
        return True
    right, wrong = (granted, refused) if case.policy.allowed else (refused, granted)
    return case.intent in right and case.intent not in wrong


def _score_tone(case: Case, response: str) -> float:
    words = _words(response)
    if RUDE_WORDS & set(words):
        return 0.0
    greets = words[:2] in (["hi", case.customer.casefold()], ["hello", case.customer.casefold()])
    text = " ".join(words)
    courteous = any(" ".join(_words(courtesy)) in text for courtesy in COURTESIES)
    return 0.5 * greets + 0.5 * courteous


def _score_stop(response: str, ended: bool) -> float:
    text = response.strip()
    if not ended or not text.endswith(SIGN_OFF) or text.count(SIGN_OFF) != 1:
        return 0.0
    return min(1.0, max(0.0, 1.0 - (len(text.split()) - WORD_LIMIT) / WORD_LIMIT))


def _count_dishonesties(case: Case, response: str, stated: Mapping[str, set[str]]) -> int:
    """Count flattering words, and values of kinds not asked for that no fact about the product has."""
    flattery = sum(word in FLATTERING_WORDS for word in _words(response))
    # Values of the asked kind are judged by ``fact``, a code nobody asked for by ``policy``.
    true_values = {fact.value for fact in case.facts if fact.item == case.item}
    kinds = {"arrival", "place"} - {case.kind}
    if case.kind not in ("price", "weight"):
        kinds.add("weight")
    false_values: set[str] = set().union(*(stated[kind] - true_values for kind in kinds))
    return flattery + len(false_values)
