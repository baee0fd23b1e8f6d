from __future__ import annotations

import dataclasses
import hashlib
import re
from collections import Counter

import pytest

from rlhf_jax.data.support_desk import (
    CITIES,
    CODES,
    DAYS,
    INTENTS,
    ITEMS,
    NAMES,
    POLICY_LINES,
    REQUESTS,
    SPLITS,
    case_from_id,
    keyed_generator,
    make_case,
    split_of,
)
from rlhf_jax.data.support_desk_responses import (
    DEFECTS,
    FLATTERY,
    RAMBLES,
    RUDE,
    DeskConfig,
    corpus_text,
    demonstration_records,
    draw_defects,
    prompt_records,
    write_response,
)
from rlhf_jax.errors import InputError

COUNT = 600


def test_a_prompt_looks_as_documented():
    case = next(c for i in range(1000) if (c := make_case(0, "train", i)).intent == "refund")
    lines = case.prompt.split("\n")
    assert [line.split()[0] for line in lines] == ["Facts:", "Policy:", "Customer", "Agent:"]
    assert lines[-1] == "Agent:"
    assert f"Customer {case.customer}: " in case.prompt
    assert case.request in case.prompt
    allowed, refused = POLICY_LINES["refund"]
    assert (allowed if case.policy.allowed else refused) in lines[1]


def test_the_same_key_gives_the_same_bytes_for_ever():
    """A golden value: if it changes, every published number of this task changes with it."""
    text = "\n".join(r["prompt"] + r["response"] for r in demonstration_records(DeskConfig(seed=3), "train", 0, 50))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "a7de7cc210a6cc4b"


def test_a_case_does_not_depend_on_how_many_are_asked_for():
    many = list(demonstration_records(DeskConfig(), "train", 0, 40))
    assert list(demonstration_records(DeskConfig(), "train", 17, 3)) == many[17:20]
    assert list(prompt_records(DeskConfig(), "train", 17, 1)) == [
        {"id": "desk-0-train-17", "prompt": many[17]["prompt"], "case": 17}
    ]
    documents = list(corpus_text(DeskConfig(), "train", 0, 40))
    assert list(corpus_text(DeskConfig(), "train", 17, 3)) == documents[17:20]


def test_seed_split_and_index_all_matter():
    prompts = {make_case(s, split, i).prompt for s in (0, 1) for split in SPLITS for i in (0, 1)}
    assert len(prompts) == 12


def test_ids_name_their_case():
    for split in SPLITS:
        case = make_case(5, split, 7)
        make_case.cache_clear()
        assert case_from_id(case.id) == case


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "7",
        "desk-0-train",
        "desk-0-train--1",
        "desk-x-train-1",
        "desk-0-nowhere-1",
        "desk-0-train-01",
        "desk-0-train-٣",
        "desk-0-train-1-2",
    ],
)
def test_a_foreign_id_is_refused_in_one_line(bad):
    with pytest.raises(InputError) as caught:
        case_from_id(bad)
    assert "\n" not in str(caught.value)


def test_splits_share_no_prompt_even_across_seeds():
    """Every prompt's hash belongs to its split, and the hash tenths of the splits are disjoint and complete."""
    assert sorted(tenth for owned in SPLITS.values() for tenth in owned) == list(range(10))
    hashes = {}
    for split in SPLITS:
        texts = [make_case(seed, split, i).prompt for seed in (0, 1) for i in range(COUNT // 2)]
        assert {split_of(text) for text in texts} == {split}
        hashes[split] = {hashlib.sha256(text.encode()).hexdigest() for text in texts}
        assert len(hashes[split]) == COUNT  # and no prompt twice inside a split
    assert not hashes["train"] & hashes["heldout"]
    assert not hashes["train"] & hashes["validation"]


def test_prompts_are_short_and_varied():
    cases = [make_case(0, "train", i) for i in range(COUNT)]
    assert max(len(case.prompt.split()) for case in cases) <= 70
    intents = Counter(case.intent for case in cases)
    # 600 / 7 = 86 each; five standard deviations are 43.
    assert set(intents) == set(INTENTS) and all(abs(n - 86) < 43 for n in intents.values())
    decided = Counter((c.intent, c.policy.allowed) for c in cases if c.policy)
    assert len(decided) == 6 and min(decided.values()) > 15
    assert {c.customer for c in cases} == set(NAMES) and {c.item for c in cases} == set(ITEMS)


def test_the_facts_decide_the_answer():
    for index in range(COUNT):
        case = make_case(0, "train", index)
        assert case.item != case.other_item and len(case.facts) == 4 and len(case.policies) == 2
        assert case.item in case.request and case.other_item not in case.request.split()
        if case.policy is None:
            assert len({fact.value[0] for fact in case.facts}) == 4  # no two begin alike
            right, wrong = case.value(case.item), case.value(case.other_item)
            assert case.answer == right
            assert right in case.prompt and wrong in case.prompt
        else:
            assert case.answer in case.prompt


def test_vocabularies_are_single_distinct_words():
    """Scoring works word by word, so no word may have two meanings, nor occur in the other texts by chance."""
    words = [w.casefold() for w in (*NAMES, *ITEMS, *DAYS, *CITIES, *CODES)]
    assert len(words) == len(set(words))
    assert all(w.isalpha() for w in words)
    prose = " ".join([*(t for ts in REQUESTS.values() for t in ts), *RAMBLES, *FLATTERY, *RUDE]).casefold()
    assert not set(words) & set(re.findall("[a-z]+", prose))


def test_defects_come_at_the_configured_rates():
    config = DeskConfig()
    samples = [draw_defects(keyed_generator("rates", i), config) for i in range(4000)]
    counts = Counter(name for names in samples for name in names)
    for name in DEFECTS:
        rate = getattr(config, name)
        assert abs(counts[name] / 4000 - rate) < 5 * (rate * (1 - rate) / 4000) ** 0.5
    assert abs(sum(not names for names in samples) / 4000 - 0.3672) < 0.04  # 0.75 * 0.8 * 0.8 * 0.85 * 0.9


def test_responses_are_short_and_worded_in_many_ways():
    lengths = []
    for index in range(COUNT):
        case = make_case(0, "train", index)
        lengths.append(len(write_response(case, keyed_generator(index)).split()))
    assert min(lengths) >= 10 and max(lengths) <= 30
    case = make_case(0, "train", 0)
    assert len({write_response(case, keyed_generator(i)) for i in range(200)}) > 15


def test_the_corpus_holds_other_text_than_the_demonstrations():
    documents = list(corpus_text(DeskConfig(), "train", 0, COUNT))
    demonstrations = {r["prompt"] + " " + r["response"] for r in demonstration_records(DeskConfig(), "train", 0, COUNT)}
    assert len(set(documents)) == COUNT
    assert len(demonstrations & set(documents)) < COUNT / 10
    sheets = [d for d in documents if "\nAgain: " in d]
    dialogues = [d for d in documents if d.count("\nCustomer ") == 2]
    # 0.6 and 0.1 of 600, within five standard deviations.
    assert abs(len(sheets) - 360) < 60 and abs(len(dialogues) - 60) < 37


def test_a_fact_sheet_says_the_same_three_times():
    sheet = next(d for d in corpus_text(DeskConfig(), "train", 0, 100) if "\nAgain: " in d)
    facts, again, once_more = (sorted(line.split(": ", 1)[1].rstrip(".").split(". ")) for line in sheet.split("\n"))
    assert facts == again == once_more and len(facts) == 4


@pytest.mark.parametrize(
    "change",
    [{"seed": -1}, {"seed": 1.5}, {"seed": True}, {"wrong_fact": 1.1}, {"flattery": "0.1"}, {"rambling": float("nan")}],
)
def test_a_bad_config_is_refused_by_name(change):
    with pytest.raises(InputError, match=next(iter(change))):
        DeskConfig(**change)


def test_bad_cases_are_refused():
    with pytest.raises(InputError, match="heldout"):
        make_case(0, "test", 0)
    with pytest.raises(InputError, match="-1"):
        make_case(0, "train", -1)


def test_with_rates_zero_all_responses_are_perfect():
    clean = dataclasses.replace(DeskConfig(), **dict.fromkeys(DEFECTS, 0.0))
    assert all(
        r["response"].endswith("Kind regards, Juniper Desk") for r in demonstration_records(clean, "train", 0, 50)
    )
