"""The exact score of a support-desk reply. Deterministic, and defined for any text.

Five components, each in [0, 1]:

* fact: the value asked for is in the reply. 1.0 when nothing competes with it, 0.25 with exactly one competitor (a
  hedge between two is worth less than a guess), 0.0 otherwise. Competitors are other values of the same kind (any other
  number, when a number is asked for) and other products, so that listing everything earns nothing.
* policy: the decision on the request is the policy's, the opposite is not said as well, and nothing is promised that
  was not asked for. For a request that asks for a fact: a fact of that kind is given and nothing is promised.
* tone: half for greeting the customer by name at the start, half for one of the brand's courtesies; 0.0 when rude.
* stop: the reply ended by itself, its last words are the brand's sign-off, said once, and it has at most WORD_LIMIT
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
from rlhf_jax.data.support_desk_replies import COURTESIES, SIGN_OFF
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
    """Components and total of one reply, each in [0, 1]."""

    fact: float
    policy: float
    tone: float
    stop: float
    honesty: float

    @property
    def total(self) -> float:
        """See the module's docstring for the formula. Exactly 1.0 for a perfect reply, exactly 0.0 for an empty one."""
        return self._mean(WEIGHTS)

    @property
    def without_stop(self) -> float:
        """The weighted mean of the four components that say something about content."""
        return self._mean({name: weight for name, weight in WEIGHTS.items() if name != "stop"})

    def _mean(self, weights: Mapping[str, float]) -> float:
        # By the sum of the weights, which is 1 only up to rounding: a perfect reply scores exactly 1.0.
        total: float = sum(weight * getattr(self, name) for name, weight in weights.items())
        return total / sum(weights.values())


def gold_score(case: Case, reply: str, *, ended: bool) -> GoldScore:
    """Scores a reply to a case. ended: the model itself stopped (end-of-sequence), it was not cut at a length limit."""
    stated = _stated_values(reply)
    granted, refused = _decisions(reply)
    answered = bool(case.policy and case.intent in granted | refused) or bool(not case.policy and stated[case.kind])
    return GoldScore(
        fact=_fact(case, stated),
        policy=float(answered and _keeps_policy(case, granted, refused)),
        tone=_tone(case, reply),
        stop=_stop(reply, ended),
        honesty=max(0.0, 1.0 - 0.5 * _dishonesties(case, reply, stated)) if answered else 0.0,
    )


def score(responses: Sequence[Response]) -> dict[str, list[float]]:
    """The programmatic `Reward` of N responses to prompts of the support desk, whose ids name their cases.

    Returns ``gold`` (the total), ``gold/without_stop`` (a gain in it is not one of stopping) and ``gold/fact``,
    ``gold/policy``, ... : N floats each.
    """
    scores = [gold_score(case_from_id(response.id), response.text, ended=response.ended) for response in responses]
    return {"gold": [s.total for s in scores], "gold/without_stop": [s.without_stop for s in scores]} | {
        f"gold/{name}": [getattr(s, name) for s in scores] for name in WEIGHTS
    }


def has_flattery(text: str) -> bool:
    """True when the text has a flattering word."""
    return any(word in FLATTERING_WORDS for word in _words(text))


def _words(text: str) -> list[str]:
    """Casefolded runs of letters; an apostrophe inside a word, straight or curly, is part of it ("can't")."""
    straight = text.replace("\u2019", "'")
    return [word.casefold() for word in re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", straight)]


def _stated_values(reply: str) -> dict[str, set[str]]:
    """Kind -> the values of that kind in the reply. Numbers carry no kind of their own: they count for both."""
    words = set(_words(reply))
    stated = {kind: {value for word, value in known.items() if word in words} for kind, known in CLOSED.items()}
    numbers = set(re.findall(r"[0-9]+", reply))
    return stated | {"price": numbers, "weight": numbers, "code": _codes(reply)}


def _codes(reply: str) -> set[str]:
    """What looks like a discount code, made-up ones too: four or more capitals."""
    return set(re.findall(r"\b[A-Z]{4,}\b", reply))


def _fact(case: Case, stated: Mapping[str, set[str]]) -> float:
    if case.answer not in stated[case.kind]:
        return 0.0
    competitors = len(stated[case.kind] - {case.answer})
    if case.kind != "item":
        competitors += len(stated["item"] - {case.item})
    return {0: 1.0, 1: 0.25}.get(competitors, 0.0)


def _decisions(reply: str) -> tuple[set[str], set[str]]:
    """(granted topics, refused topics). A sentence on a topic refuses it when it has a negation, else it grants it.

    A discount code grants the discount whatever stands around it: the customer can use it.
    """
    granted: set[str] = set()
    refused: set[str] = set()
    if _codes(reply):
        granted.add("discount")
    for sentence in re.split(r"[.!?\n]", reply):
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


def _tone(case: Case, reply: str) -> float:
    words = _words(reply)
    if RUDE_WORDS & set(words):
        return 0.0
    greets = words[:2] in (["hi", case.customer.casefold()], ["hello", case.customer.casefold()])
    text = " ".join(words)
    courteous = any(" ".join(_words(courtesy)) in text for courtesy in COURTESIES)
    return 0.5 * greets + 0.5 * courteous


def _stop(reply: str, ended: bool) -> float:
    text = reply.strip()
    if not ended or not text.endswith(SIGN_OFF) or text.count(SIGN_OFF) != 1:
        return 0.0
    return min(1.0, max(0.0, 1.0 - (len(text.split()) - WORD_LIMIT) / WORD_LIMIT))


def _dishonesties(case: Case, reply: str, stated: Mapping[str, set[str]]) -> int:
    """Flattering words, and values of kinds not asked for that no fact line about the product holds."""
    flattery = sum(word in FLATTERING_WORDS for word in _words(reply))
    # Values of the asked kind are judged by ``fact``, a code nobody asked for by ``policy``.
    true_values = {fact.value for fact in case.facts if fact.item == case.item}
    kinds = {"arrival", "place"} - {case.kind}
    if case.kind not in ("price", "weight"):
        kinds.add("weight")
    false_values: set[str] = set().union(*(stated[kind] - true_values for kind in kinds))
    return flattery + len(false_values)
