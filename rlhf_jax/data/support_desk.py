"""Cases of a simulated support desk: the built-in task, with exactly known correct answers.

A case is a handful of fact lines about two products, two policy lines, a customer and one request. Case ``i`` of a
split depends only on ``(seed, split, i)``. A response must copy the right fact, obey the policy, keep the brand's
tone and stop, yet a transformer of a few million parameters can learn the task: each fact line is product, verb,
value, and the response repeats the same three words.

    Facts: kettle costs 25. lamp arrives Friday. lamp costs 60. kettle arrives Monday.
    Policy: refunds refused. discount code MAPLE.
    Customer Maria: When does my lamp arrive?
    Agent:
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from rlhf_jax.errors import InputError

T = TypeVar("T")


def _vocabulary(words: str) -> tuple[str, ...]:
    return tuple(words.split())


NAMES = _vocabulary(
    "Maria Tom Aisha Lena Omar Grace Ivan Chloe Diego Hana Peter Nadia Felix Ruth Samir Elena Hugo Priya Jonas Yuki "
    "Zara Oscar Noor Rosa"
)
ITEMS = _vocabulary(
    "kettle lamp chair mirror camera printer jacket guitar blender carpet teapot helmet pillow radio toaster ladder "
    "basket wallet clock sofa tent drum vase fan"
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
CITIES = _vocabulary(
    "Oslo Lisbon Madrid Vienna Prague Dublin Athens Warsaw Berlin Rome Paris Zurich Milan Porto Turin Lyon Geneva "
    "Basel Leeds Riga"
)
CODES = _vocabulary(
    "MAPLE OCEAN TIGER CEDAR COMET AMBER PEARL EAGLE LOTUS RIVER STORM CLOVER FALCON INDIGO LEMON MEADOW ORCHID PEPPER "
    "VELVET WILLOW"
)
NUMBERS = tuple(str(number) for number in range(10, 100))

FACT_LINES = {
    "arrival": "{item} arrives {value}",
    "price": "{item} costs {value}",
    "weight": "{item} weighs {value}",
    "place": "{item} reached {value}",
}
"""Intent that asks for a fact -> the line of the fact: product, verb, value. A response repeats the same words."""
FACT_VALUES = {"arrival": DAYS, "price": NUMBERS, "weight": NUMBERS, "place": CITIES}
POLICY_LINES = {
    "refund": ("refunds allowed", "refunds refused"),
    "address": ("address changes allowed", "address changes refused"),
    "discount": ("discount code {code}", "discount refused"),
}
"""Intent that the policy decides -> (line when allowed, line when refused)."""
INTENTS = (*FACT_LINES, *POLICY_LINES)

REQUESTS = {
    "arrival": (
        "When does my {item} arrive?",
        "What day will the {item} come?",
        "I am waiting for my {item}. Which day is it?",
        "Tell me the day my {item} gets here.",
        "On what day should I expect the {item}?",
    ),
    "price": (
        "What does the {item} cost?",
        "How much is my {item}?",
        "Please tell me the price of the {item}.",
        "What was I charged for the {item}?",
        "Remind me how much I paid for my {item}.",
    ),
    "weight": (
        "What does the {item} weigh?",
        "How heavy is my {item}?",
        "Please tell me the weight of the {item}.",
        "How many kilos is my {item}?",
        "Is the {item} heavy? I have to carry it.",
    ),
    "place": (
        "Where is my {item} now?",
        "Which city is the {item} in?",
        "Can you locate my {item}?",
        "Where did the {item} get to?",
        "Tell me where my {item} is.",
    ),
    "refund": (
        "Can I get a refund for my {item}?",
        "I want my money back for the {item}.",
        "Please refund the {item}.",
        "I would like to return my {item} for a refund.",
        "My {item} is broken. Will you refund it?",
    ),
    "address": (
        "Can you change the address for my {item}?",
        "Please send the {item} to a new address.",
        "I moved. Can my {item} go to another address?",
        "Is a new address possible for the {item}?",
        "I need the {item} at a different address.",
    ),
    "discount": (
        "Is there a discount for the {item}?",
        "Do you have a code for my {item}?",
        "Can I pay less for the {item}?",
        "I heard of a discount on the {item}. Is it true?",
        "Please give me a code for my {item}.",
    ),
}

SPLITS = {"train": range(0, 8), "validation": range(8, 9), "heldout": range(9, 10)}
"""Split -> its tenths of the hashes of prompt texts, so that no prompt text is in two splits, whatever the seeds."""


@dataclass(frozen=True)
class Fact:
    """A fact about a product. kind: a key of FACT_LINES. value: the text that a response must copy exactly."""

    item: str
    kind: str
    value: str


@dataclass(frozen=True)
class Policy:
    """A policy of the desk. topic: a key of POLICY_LINES. code: the discount code; empty unless a discount is allowed."""

    topic: str
    allowed: bool
    code: str = ""


@dataclass(frozen=True)
class Case:
    """A request with everything that is needed to judge a response.

    item: the product that the customer asks about. other_item: the distractor.
    intent: one of INTENTS.
    facts: two kinds for each of the two items.
    policies: two topics; when a policy decides the request, its topic is one of them.
    """

    id: str
    customer: str
    intent: str
    item: str
    other_item: str
    facts: tuple[Fact, ...]
    policies: tuple[Policy, ...]
    request: str

    @property
    def prompt(self) -> str:
        """The text of the prompt. A response follows after a space (RESPONSE_PREFIX)."""
        facts = " ".join(FACT_LINES[f.kind].format(item=f.item, value=f.value) + "." for f in self.facts)
        policies = " ".join(POLICY_LINES[p.topic][not p.allowed].format(code=p.code) + "." for p in self.policies)
        return f"Facts: {facts}\nPolicy: {policies}\nCustomer {self.customer}: {self.request}\nAgent:"

    @property
    def policy(self) -> Policy | None:
        """The policy that decides the request; None when the request asks for a fact."""
        return next((p for p in self.policies if p.topic == self.intent), None)

    @property
    def kind(self) -> str:
        """The kind of value that the response must state: a key of FACT_LINES, ``code``, or ``item`` for a decision."""
        if self.policy is None:
            return self.intent
        return "code" if self.policy.code else "item"

    @property
    def answer(self) -> str:
        """The correct value of ``kind``."""
        if self.policy is not None:
            return self.policy.code or self.item
        return self.value(self.item)

    def value(self, item: str) -> str:
        """Return the value of the requested fact for ``item``; only for requests that ask for a fact."""
        return next(f.value for f in self.facts if f.item == item and f.kind == self.intent)


RESPONSE_PREFIX = " "
"""The text between a prompt, which ends with ``Agent:``, and a response."""


def keyed_generator(*key: object) -> np.random.Generator:
    """Return a Philox generator keyed by the text of ``key``: equal keys give equal draws on every machine."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """Draw one of ``options`` uniformly."""
    return options[int(rng.integers(len(options)))]


def split_of(prompt: str) -> str:
    """Return the only split that may contain this prompt text."""
    tenth = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "little") % 10
    return next(split for split, tenths in SPLITS.items() if tenth in tenths)


@functools.lru_cache(maxsize=8192)
def make_case(seed: int, split: str, index: int) -> Case:
    """Draw case ``index`` (0, 1, ...) of a split, independently of the other cases.

    Cases are drawn until the hash of a prompt belongs to the split. Raises InputError for an unknown split or index < 0.
    """
    if split not in SPLITS:
        raise InputError(f"support desk: unknown split {split!r}; use one of {', '.join(SPLITS)}")
    if index < 0:
        raise InputError(f"support desk: case index {index} is negative; use 0, 1, ...")
    rng = keyed_generator("support desk case", seed, split, index)
    while True:
        case = _draw_case(rng, f"desk-{seed}-{split}-{index}")
        if split_of(case.prompt) == split:
            return case


def case_from_id(case_id: str) -> Case:
    """Return the case of an id such as ``desk-0-heldout-12``, so that a reward needs only a prompt's id. Raises InputError."""
    match case_id.split("-"):
        case ["desk", seed, split, index] if seed.isdecimal() and index.isdecimal():
            case = make_case(int(seed), split, int(index))
            if case.id == case_id:  # not so for other spellings of the numbers, such as 007
                return case
    raise InputError(f"prompt id {case_id!r}: not a support-desk case; ids look like desk-SEED-SPLIT-INDEX")


def _draw_case(rng: np.random.Generator, case_id: str) -> Case:
    intent = pick(rng, INTENTS)
    items = [ITEMS[i] for i in rng.choice(len(ITEMS), 2, replace=False)]
    kinds = [str(kind) for kind in rng.permutation(list(FACT_LINES)) if kind != intent]
    kinds = [intent, kinds[0]] if intent in FACT_LINES else kinds[:2]
    facts = _draw_facts(rng, kinds, items)
    topics = [str(topic) for topic in rng.permutation(list(POLICY_LINES)) if topic != intent]
    topics = [intent, topics[0]] if intent in POLICY_LINES else topics[:2]
    policies = [_draw_policy(rng, topic) for topic in topics]
    return Case(
        id=case_id,
        customer=pick(rng, NAMES),
        intent=intent,
        item=items[0],
        other_item=items[1],
        facts=tuple(facts[i] for i in rng.permutation(len(facts))),
        policies=tuple(policies[i] for i in rng.permutation(len(policies))),
        request=pick(rng, REQUESTS[intent]).format(item=items[0]),
    )


def _draw_facts(rng: np.random.Generator, kinds: Sequence[str], items: Sequence[str]) -> list[Fact]:
    """Draw a fact of each kind for each item. No two values have the same first character (25 and 27 are easily confused)."""
    facts: list[Fact] = []
    for kind in kinds:
        for item in items:
            initials = {fact.value[0] for fact in facts}
            facts.append(Fact(item, kind, pick(rng, [v for v in FACT_VALUES[kind] if v[0] not in initials])))
    return facts


def _draw_policy(rng: np.random.Generator, topic: str) -> Policy:
    allowed = bool(rng.integers(2))
    return Policy(topic, allowed, pick(rng, CODES) if allowed and topic == "discount" else "")
