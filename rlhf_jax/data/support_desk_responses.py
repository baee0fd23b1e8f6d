"""Responses of the support desk: perfect ones, ones with named defects, and a corpus made of them.

A perfect response: ``Hi Maria, thanks for asking. Your lamp arrives Friday. Kind regards, Juniper Desk``.
Demonstrations are of mixed quality on purpose, so that preferences can improve on imitation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from rlhf_jax.data.support_desk import (
    CODES,
    FACT_LINES,
    RESPONSE_PREFIX,
    Case,
    Policy,
    keyed_generator,
    make_case,
    pick,
)
from rlhf_jax.errors import InputError

SIGN_OFF = "Kind regards, Juniper Desk"
GREETINGS = ("Hi {name},", "Hello {name},")
COURTESIES = ("thank you for writing.", "thanks for asking.", "happy to help.", "good to hear from you.")
OPENERS = ("Your {item}", "The {item}", "We checked and your {item}", "As listed, the {item}")
DECISIONS = {
    ("refund", True): (
        "We can refund your {item}.",
        "A refund for your {item} is approved.",
        "Yes, we can refund your {item}.",
    ),
    ("refund", False): (
        "We cannot refund your {item}.",
        "A refund for your {item} is not possible.",
        "Sorry, we cannot refund your {item}.",
    ),
    ("address", True): (
        "We can change the address for your {item}.",
        "A new address for your {item} is approved.",
        "Yes, we can change the address for your {item}.",
    ),
    ("address", False): (
        "We cannot change the address for your {item}.",
        "A new address for your {item} is not possible.",
        "Sorry, we cannot change the address for your {item}.",
    ),
    ("discount", True): (
        "We can offer a discount for your {item}.",
        "A discount for your {item} is approved.",
        "Yes, we can offer a discount for your {item}.",
    ),
    ("discount", False): (
        "We cannot offer a discount for your {item}.",
        "A discount for your {item} is not possible.",
        "Sorry, we cannot offer a discount for your {item}.",
    ),
}
CODE_ANSWERS = (
    "The discount code for your {item} is {value}.",
    "For your {item} use discount code {value}.",
    "Yes, use discount code {value}.",
)
PROMISES = {
    "refund": "We can also refund you.",
    "address": "We can change any address.",
    "discount": "We offer a discount.",
}
"""Promises that the customer did not ask for, by topic."""
RUDE = ("Look it up yourself.", "Obviously you did not read.", "Stop bothering us.", "Whatever, be quick.")
FLATTERY = (
    "You are our most wonderful customer!",
    "What a brilliant question!",
    "Your taste is truly amazing!",
    "You are simply the best!",
)
RAMBLES = (
    "By the way our shop has many shelves and we like to tidy them in the evening when it rains outside.",
    "There is so much more to say about parcels and paper and tape and the people who pack all of it here.",
    "Some say that shopping is a long road and we walk on it together day after day with a song.",
    "Our team met this week and talked about boxes and labels and then about tea and biscuits and the weather.",
)
GENERIC_OPENINGS = ("Good day.", "Hey there.", "Dear customer.", "Noted.", "Let me see.")
GENERIC_CLOSINGS = ("Bye.", "The team.", "See you soon.", "Ask again any time.", "That is all we know.")

DEFECTS = {
    "wrong_fact": "fact",
    "breaks_policy": "policy",
    "bad_tone": "tone",
    "rambling": "stop",
    "flattery": "honesty",
}
"""Defect -> the component of the gold score that it lowers."""


@dataclass(frozen=True)
class DeskConfig:
    """The seed of the support desk and the rates of independent defects in its demonstrations.

    With the defaults 0.75 * 0.80 * 0.80 * 0.85 * 0.90 = 37 % of the demonstrations are perfect.

    seed: seed of the cases, >= 0.
    wrong_fact: probability that a demonstration states a wrong fact.
    breaks_policy: probability that a demonstration decides against the policy or promises too much.
    bad_tone: probability that a demonstration is rude or has no greeting.
    rambling: probability that a demonstration continues with irrelevant text.
    flattery: probability that a demonstration flatters the customer.
    """

    seed: int = 0
    wrong_fact: float = 0.25
    breaks_policy: float = 0.20
    bad_tone: float = 0.20
    rambling: float = 0.15
    flattery: float = 0.10

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise InputError(f"DeskConfig.seed = {self.seed!r}: must be an integer >= 0")
        for name in DEFECTS:
            rate = getattr(self, name)
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0.0 <= rate <= 1.0:
                raise InputError(f"DeskConfig.{name} = {rate!r}: must be a rate in [0, 1]")


def write_response(case: Case, rng: np.random.Generator, defects: Collection[str] = ()) -> str:
    """Write a response with exactly these defects (keys of DEFECTS), perfect without any. ``rng`` draws the wording."""
    parts = _opening(case, rng, "bad_tone" in defects)
    flattery = pick(rng, FLATTERY) if "flattery" in defects else ""
    flattery_first = bool(rng.integers(2))
    if flattery and flattery_first:
        parts.append(flattery)
    parts += _answer(case, rng, wrong="wrong_fact" in defects, breaks="breaks_policy" in defects)
    if flattery and not flattery_first:
        parts.append(flattery)
    if "rambling" in defects:
        # Either the sign-off is missing or text follows it.
        parts += [SIGN_OFF + "."] * int(rng.integers(2)) + [pick(rng, RAMBLES)]
    else:
        parts.append(SIGN_OFF)
    return " ".join(parts)


def draw_defects(rng: np.random.Generator, config: DeskConfig) -> tuple[str, ...]:
    """Draw the defects of a demonstration."""
    return tuple(name for name in DEFECTS if rng.random() < getattr(config, name))


def demonstration(case: Case, rng: np.random.Generator, config: DeskConfig) -> str:
    """Write a response with defects drawn at the rates of the config."""
    return write_response(case, rng, draw_defects(rng, config))


def demonstration_records(config: DeskConfig, split: str, start: int, count: int) -> Iterator[dict[str, str]]:
    """Yield ``{"id", "prompt", "response"}`` for cases start, ..., start + count - 1 of a split (``support_desk.SPLITS``)."""
    for index in range(start, start + count):
        case = make_case(config.seed, split, index)
        yield {"id": case.id, "prompt": case.prompt, "response": demonstration(case, _wording(case), config)}


def prompt_records(config: DeskConfig, split: str, start: int, count: int) -> Iterator[dict[str, str | int]]:
    """Yield ``{"id", "prompt", "case"}`` (case: the index in the split) for cases start, ..., start + count - 1."""
    for index in range(start, start + count):
        case = make_case(config.seed, split, index)
        yield {"id": case.id, "prompt": case.prompt, "case": index}


def corpus_text(config: DeskConfig, split: str, start: int, count: int) -> Iterator[str]:
    """Yield a document for each case to pre-train a base model on, more varied and of lower quality than demonstrations.

    1 in 4 is a prompt with a demonstration (each defect 1.5 times as frequent), 1 in 20 a prompt with a response of
    another desk, 6 in 10 a fact sheet that is repeated three times (copying takes longest to learn, and nearly
    every word of the repetitions is a copy), 1 in 10 a dialogue of two requests.
    """
    rates = {name: min(1.0, 1.5 * getattr(config, name)) for name in DEFECTS}
    worse = dataclasses.replace(config, **rates)
    for index in range(start, start + count):
        case = make_case(config.seed, split, index)
        rng = keyed_generator("support desk document", case.id)
        kind = rng.random()
        if kind < 0.25:
            yield case.prompt + RESPONSE_PREFIX + demonstration(case, rng, worse)
        elif kind < 0.3:
            yield case.prompt + RESPONSE_PREFIX + _generic_response(case, rng)
        elif kind < 0.9:
            yield _fact_sheet(case, rng)
        else:
            yield _dialogue(case, rng)


def _wording(case: Case) -> np.random.Generator:
    return keyed_generator("support desk demonstration", case.id)


def _opening(case: Case, rng: np.random.Generator, bad_tone: bool) -> list[str]:
    if not bad_tone:
        return [pick(rng, GREETINGS).format(name=case.customer), pick(rng, COURTESIES)]
    return [pick(rng, RUDE)] if rng.integers(2) else []  # rude, or curt: no greeting at all


def _answer(case: Case, rng: np.random.Generator, *, wrong: bool, breaks: bool) -> list[str]:
    """Return the sentences that answer. A wrong one names the other item, or its value, or an invented code."""
    policy = case.policy
    if policy is None or policy.code:
        sentence = _state_answer(case, rng, policy, wrong)
        return [sentence, _promise(case, rng)] if breaks else [sentence]
    item = case.other_item if wrong else case.item
    return [pick(rng, DECISIONS[policy.topic, policy.allowed != breaks]).format(item=item)]


def _state_answer(case: Case, rng: np.random.Generator, policy: Policy | None, wrong: bool) -> str:
    if policy is not None:
        code = pick(rng, [code for code in CODES if code != policy.code]) if wrong else policy.code
        return pick(rng, CODE_ANSWERS).format(item=case.item, value=code)
    value = case.value(case.other_item if wrong else case.item)
    subject = pick(rng, OPENERS).format(item=case.item)
    unit = {"price": " dollars", "weight": " kilos"}.get(case.intent, "")
    return FACT_LINES[case.intent].format(item=subject, value=value) + unit + "."


def _promise(case: Case, rng: np.random.Generator) -> str:
    """Draw a promise that the request did not ask for, and that the policy in the prompt refuses where possible."""
    refused = [p.topic for p in case.policies if not p.allowed and p.topic != case.intent]
    return PROMISES[pick(rng, refused or [topic for topic in PROMISES if topic != case.intent])]


def _generic_response(case: Case, rng: np.random.Generator) -> str:
    sentences = _answer(case, rng, wrong=rng.random() < 0.2, breaks=rng.random() < 0.2)
    return " ".join([pick(rng, GENERIC_OPENINGS), *sentences, pick(rng, GENERIC_CLOSINGS)])


def _fact_sheet(case: Case, rng: np.random.Generator) -> str:
    lines = [FACT_LINES[fact.kind].format(item=fact.item, value=fact.value) for fact in case.facts]
    again = [". ".join(lines[i] for i in rng.permutation(len(lines))) for _ in range(2)]
    return f"Facts: {'. '.join(lines)}.\nAgain: {again[0]}.\nAgain: {again[1]}."


def _dialogue(case: Case, rng: np.random.Generator) -> str:
    fact = pick(rng, case.facts)
    asks = {"arrival": "the day", "price": "the price", "weight": "the weight", "place": "the city"}[fact.kind]
    again = FACT_LINES[fact.kind].format(item=f"The {fact.item}", value=fact.value)
    first = case.prompt + RESPONSE_PREFIX + _generic_response(case, rng)
    return f"{first}\nCustomer {case.customer}: And {asks} of the {fact.item}?\nAgent:{RESPONSE_PREFIX}{again}."
